//! What host and worker say to each other over the control socket.
//!
//! ```text
//! frame    u32 little endian: length of what follows, 1 to MAX_FRAME
//!          u8: VERSION
//!          postcard: a Request, or a Reply
//! ```
//!
//! The host asks, the worker answers, one at a time. A descriptor (for `Capture`) comes along with the first byte of its
//! frame. A frame may hold secrets, so its memory is wiped after use, and bytes are borrowed from it and never copied.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

/// Version of the protocol; the two sides must have the same.
pub const VERSION: u8 = 2;
/// Most bytes of a frame after its length: sixteen mailboxes of 64 KiB, and room.
pub const MAX_FRAME: usize = 2 << 20;
/// Most ranges in one request.
pub const MAX_RANGES: usize = 4096;
/// Most bytes of a refusal's reason.
pub const MAX_REASON: usize = 1000;

/// Bytes at a place in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write<'a> {
    /// Offset in the memory file.
    pub offset: u64,
    /// What.
    #[serde(borrow)]
    pub bytes: &'a [u8],
}

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Offset in the memory file.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// What the host asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request<'a> {
    /// Where the machine is in its life.
    Status,
    /// Bytes of guest memory, one after the other. Only before the first run.
    Read(Vec<Range>),
    /// Writes into the machine's private memory, all or nothing. Only before the first run of a fork.
    Deliver {
        /// What must be there before the first byte is written.
        #[serde(borrow)]
        expected: Vec<Write<'a>>,
        /// What is written, in this order.
        #[serde(borrow)]
        writes: Vec<Write<'a>>,
    },
    /// Lets it run, for the first time or after a pause.
    Resume,
    /// Stops its vCPUs.
    Pause,
    /// Writes the state to the descriptor that comes along. Only while paused after a run.
    Capture,
    /// Ends the process.
    Quit,
}

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Loaded, and has never run.
    Loaded,
    /// It runs.
    Running,
    /// It ran, and is stopped.
    Paused,
}

/// The worker's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply<'a> {
    /// To `Status`.
    Status {
        /// Where the machine is in its life.
        phase: Phase,
        /// Bytes of guest memory.
        memory_bytes: u64,
    },
    /// To `Read`.
    #[serde(borrow)]
    Bytes(&'a [u8]),
    /// It was done.
    Done,
    /// It was not done, and nothing was changed unless it says so.
    Refused(&'a str),
}

/// Why a frame can not be used. The connection is of no use after it.
#[derive(Debug, Error)]
pub enum FrameError {
    /// Its length is out of bounds.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// Another version.
    #[error("protocol version {0}, and this is version {VERSION}")]
    Version(u8),
    /// It is not what it should be.
    #[error("a malformed message: {0}")]
    Malformed(#[from] postcard::Error),
    /// Bytes after the message.
    #[error("{0} bytes after the end of a message")]
    Trailing(usize),
    /// More ranges than [`MAX_RANGES`].
    #[error("too many ranges")]
    TooMany,
    /// The connection.
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

/// A frame: length, version, message.
#[derive(Debug)]
pub struct Frame(Zeroizing<Vec<u8>>);

const LENGTH: usize = size_of::<u32>();

impl Frame {
    /// A request.
    ///
    /// # Errors
    /// [`FrameError::Length`] if it is longer than a frame may be.
    pub fn request(request: &Request<'_>) -> Result<Self, FrameError> {
        let payload = match request {
            Request::Deliver { expected, writes } => {
                expected.iter().chain(writes).map(|part| part.bytes.len() + 24).sum()
            }
            Request::Read(ranges) => ranges.len() * 16,
            _ => 0,
        };
        Self::build(request, payload)
    }

    /// A reply.
    ///
    /// # Errors
    /// [`FrameError::Length`] if it is longer than a frame may be.
    pub fn reply(reply: &Reply<'_>) -> Result<Self, FrameError> {
        let payload = match reply {
            Reply::Bytes(bytes) => bytes.len(),
            Reply::Refused(reason) => reason.len(),
            _ => 0,
        };
        Self::build(reply, payload)
    }

    /// `payload` is what `message` needs at most beside some fixed bytes: the memory is never moved, so that no copy of a
    /// secret stays behind.
    fn build(message: &impl Serialize, payload: usize) -> Result<Self, FrameError> {
        let room = payload.saturating_add(64);
        if room > MAX_FRAME {
            return Err(FrameError::Length(room));
        }
        let mut bytes = Zeroizing::new(vec![0; LENGTH + 1 + room]);
        bytes[LENGTH] = VERSION;
        let used = postcard::to_slice(message, &mut bytes[LENGTH + 1..])?.len() + 1;
        bytes.truncate(LENGTH + used);
        let length = u32::try_from(used).map_err(|_| FrameError::Length(used))?;
        bytes[..LENGTH].copy_from_slice(&length.to_le_bytes());
        Ok(Self(bytes))
    }

    /// Everything that is sent.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads the rest of a frame whose first bytes, those of the length, are there already.
    ///
    /// # Errors
    /// [`FrameError::Length`] before any memory is taken for it; [`FrameError::Io`]; [`FrameError::Version`].
    pub fn receive(length: [u8; LENGTH], from: &mut impl Read) -> Result<Self, FrameError> {
        let len = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if len == 0 || len > MAX_FRAME {
            return Err(FrameError::Length(len));
        }
        let mut bytes = Zeroizing::new(vec![0; LENGTH + len]);
        bytes[..LENGTH].copy_from_slice(&length);
        from.read_exact(&mut bytes[LENGTH..])?;
        match bytes[LENGTH] {
            VERSION => Ok(Self(bytes)),
            other => Err(FrameError::Version(other)),
        }
    }

    /// Its message as a request.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn as_request(&self) -> Result<Request<'_>, FrameError> {
        let request = self.parse()?;
        match &request {
            Request::Read(ranges) if ranges.len() > MAX_RANGES => Err(FrameError::TooMany),
            Request::Deliver { expected, writes } if expected.len().max(writes.len()) > MAX_RANGES => {
                Err(FrameError::TooMany)
            }
            _ => Ok(request),
        }
    }

    /// Its message as a reply.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn as_reply(&self) -> Result<Reply<'_>, FrameError> {
        self.parse()
    }

    fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, FrameError> {
        let (message, rest) = postcard::take_from_bytes(self.0.get(LENGTH + 1..).unwrap_or_default())?;
        if rest.is_empty() { Ok(message) } else { Err(FrameError::Trailing(rest.len())) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn receive(bytes: &[u8]) -> Result<Frame, FrameError> {
        let (length, mut rest) = bytes.split_at(LENGTH);
        Frame::receive(length.try_into().unwrap(), &mut rest)
    }

    #[test]
    fn what_is_sent_is_received() {
        let writes = vec![Write { offset: 4096, bytes: b"secret" }, Write { offset: u64::MAX, bytes: &[0xff; 5000] }];
        let ranges = vec![Range { offset: u64::MAX, len: u32::MAX }; 100];
        let deliver = Request::Deliver { expected: writes[..1].to_vec(), writes };
        for request in [deliver, Request::Read(ranges), Request::Status, Request::Quit] {
            let frame = Frame::request(&request).unwrap();
            assert_eq!(receive(frame.bytes()).unwrap().as_request().unwrap(), request);
        }
        for reply in [Reply::Bytes(&[7; 70000]), Reply::Refused("no"), Reply::Done] {
            let frame = Frame::reply(&reply).unwrap();
            assert_eq!(receive(frame.bytes()).unwrap().as_reply().unwrap(), reply);
        }
    }

    #[test]
    fn hostile_frames_are_refused_before_they_cost_anything() {
        let frame = |length: u32, body: &[u8]| [&length.to_le_bytes(), body].concat();
        assert!(matches!(receive(&frame(0, b"")), Err(FrameError::Length(0))));
        assert!(matches!(receive(&frame(u32::MAX, b"")), Err(FrameError::Length(_))));
        assert!(matches!(receive(&frame(10, b"short")), Err(FrameError::Io(_))));
        assert!(matches!(receive(&frame(2, &[VERSION + 1, 0])), Err(FrameError::Version(_))));
        let request = |body: &[u8]| {
            let body = [&[VERSION], body].concat();
            receive(&frame(u32::try_from(body.len()).unwrap(), &body)).unwrap().as_request().map(drop)
        };
        assert!(matches!(request(&[]), Err(FrameError::Malformed(_))));
        assert!(matches!(request(&[200]), Err(FrameError::Malformed(_))), "no such request");
        assert!(matches!(request(&[0, 1]), Err(FrameError::Trailing(1))));
        // A list that says it has 2^60 entries, and one whose bytes say so.
        for tag in [1, 2] {
            let huge = [tag, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10];
            assert!(matches!(request(&huge), Err(FrameError::Malformed(_))));
            assert!(matches!(request(&[&[tag, 1, 0][..], &huge[1..]].concat()), Err(FrameError::Malformed(_))));
        }
        let many = vec![Write { offset: 0, bytes: b"" }; MAX_RANGES + 1];
        for (expected, writes) in [(Vec::new(), many.clone()), (many, Vec::new())] {
            let frame = Frame::request(&Request::Deliver { expected, writes }).unwrap();
            assert!(matches!(frame.as_request(), Err(FrameError::TooMany)));
        }
    }

    #[test]
    fn a_message_too_long_is_not_sent() {
        let bytes = vec![0; MAX_FRAME];
        assert!(matches!(Frame::reply(&Reply::Bytes(&bytes)), Err(FrameError::Length(_))));
    }
}
