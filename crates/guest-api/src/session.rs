//! Sessions over a byte stream that has no connections: a virtio-serial port here, a unix socket there.
//!
//! A host process may die in the middle of a frame and another take its place; a template may be captured in the middle
//! of a session, and a fork starts with stale bytes on the way. So each host process opens a session with a number of its
//! own; the guest drops whatever it had at each `Hello`; and frames of any other session are dropped on both sides.
//!
//! Flow control is the stream's: a side that does not read stops the other one. Nothing is buffered without bound.

mod frame;
mod stream;

pub use frame::{Decoder, Frame, Kind, MAX_PAYLOAD, encode};
pub use stream::{Session, connect};

/// Bytes that may wait between the guest's end of a session and its user, each way.
pub const BUFFER: usize = 64 * 1024;

/// The guest's side of one stream: bytes in, bytes out, and at most one session at a time.
#[derive(Debug, Default)]
pub struct Acceptor {
    decoder: Decoder,
}

/// What happened on the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A new session begins; whatever was before is over.
    Opened(u64),
    /// Bytes of a session.
    Data(u64, Vec<u8>),
    /// A session is over.
    Closed(u64),
}

impl Acceptor {
    /// Takes bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.decoder.push(bytes, |frame| match frame.kind {
            Kind::Hello => events.push(Event::Opened(frame.session)),
            Kind::Data => events.push(Event::Data(frame.session, frame.payload)),
            Kind::Close => events.push(Event::Closed(frame.session)),
            Kind::HelloAck => {}
        });
        events
    }
}
