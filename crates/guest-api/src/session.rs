//! Sessions over a byte stream that has no connections: a virtio-serial port here, a unix socket there.
//!
//! A host process may die in the middle of a frame and another take its place; a template may be captured in the middle
//! of a session, and a fork starts with stale bytes on the way. So each host process opens a session with a number of its
//! own; the guest drops whatever it had at each `Hello`; and frames of any other session are dropped on both sides.
//!
//! Flow control is the stream's: a side that does not read stops the other one. Nothing is buffered without bound.

mod frame;

pub use frame::{Decoder, Frame, Kind, MAX_PAYLOAD, encode};

use std::{collections::VecDeque, io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, duplex, split},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
    time::timeout,
};

/// Bytes that may wait between a session and its user, each way.
pub const BUFFER: usize = 64 * 1024;

/// How long an answer to a `Hello` is awaited before it is sent again. The guest answers each.
const AGAIN: Duration = Duration::from_millis(1000);

/// Opens a session from the host's side and returns its byte stream. `session` must be fresh and random. The stream ends when
/// the guest's side does; dropping it ends the session.
///
/// # Errors
/// `TimedOut` if the guest does not answer within `limit`; else what the socket says.
pub async fn connect(stream: UnixStream, session: u64, limit: Duration) -> io::Result<DuplexStream> {
    let (mut reader, mut writer) = stream.into_split();
    let mut decoder = Decoder::default();
    let mut early = VecDeque::new();
    let hello = async {
        let mut bytes = Vec::new();
        encode(Kind::Hello, session, &[], &mut bytes);
        writer.write_all(&bytes).await?;
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let Ok(count) = timeout(AGAIN, reader.read(&mut buffer)).await else {
                // An answer can be lost while the guest's driver has not heard yet that we are there.
                writer.write_all(&bytes).await?;
                continue;
            };
            let count = count?;
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let mut answered = false;
            decoder.push(&buffer[..count], |frame| {
                if frame.session != session {
                    // Left over from another session.
                } else if frame.kind == Kind::HelloAck {
                    answered = true;
                } else {
                    early.push_back(frame);
                }
            });
            if answered {
                return Ok(());
            }
        }
    };
    timeout(limit, hello).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let (ours, theirs) = duplex(BUFFER);
    let (from_user, to_user) = split(theirs);
    let receiving = tokio::spawn(receive(reader, decoder, early, session, to_user));
    tokio::spawn(send(from_user, writer, session, receiving));
    Ok(ours)
}

async fn receive(
    mut reader: OwnedReadHalf,
    mut decoder: Decoder,
    mut frames: VecDeque<Frame>,
    session: u64,
    mut to_user: tokio::io::WriteHalf<DuplexStream>,
) {
    let mut buffer = vec![0; MAX_PAYLOAD];
    loop {
        while let Some(frame) = frames.pop_front() {
            match frame.kind {
                Kind::Data if to_user.write_all(&frame.payload).await.is_ok() => {}
                Kind::HelloAck | Kind::Hello => {}
                _ => {
                    let _ = to_user.shutdown().await;
                    return;
                }
            }
        }
        match reader.read(&mut buffer).await {
            Ok(count) if count > 0 => decoder.push(&buffer[..count], |frame| {
                if frame.session == session {
                    frames.push_back(frame);
                }
            }),
            _ => {
                let _ = to_user.shutdown().await;
                return;
            }
        }
    }
}

async fn send(
    mut from_user: ReadHalf<DuplexStream>,
    mut writer: OwnedWriteHalf,
    session: u64,
    receiving: JoinHandle<()>,
) {
    let mut buffer = vec![0; MAX_PAYLOAD];
    let mut bytes = Vec::new();
    while let Ok(count) = from_user.read(&mut buffer).await {
        bytes.clear();
        let (kind, payload) = if count == 0 { (Kind::Close, &[][..]) } else { (Kind::Data, &buffer[..count]) };
        encode(kind, session, payload, &mut bytes);
        if writer.write_all(&bytes).await.is_err() || kind == Kind::Close {
            break;
        }
    }
    // The user is gone: nobody reads what the guest still sends.
    receiving.abort();
}

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
