//! Frames: what makes a byte stream without connections carry sessions.
//!
//! A frame is `0x7E`, the escaped bytes of header and payload, `0x7E`. Escaped: `0x7E` is `7D 5E`, `0x7D` is `7D 5D`. The
//! header is kind (1 byte), session (8 bytes) and payload length (4 bytes), little endian. Whoever dies in the middle of a
//! frame leaves a frame whose length does not match; it is dropped, and the next `0x7E` starts anew.

use memchr::memchr2;

/// Longest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 16 * 1024;

const FLAG: u8 = 0x7E;
const ESCAPE: u8 = 0x7D;
const FLIP: u8 = 0x20;
const HEADER: usize = 13;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host → guest: a new session; every older one is over.
    Hello = 1,
    /// Guest → host: the session is there.
    HelloAck = 2,
    /// Bytes of the session.
    Data = 3,
    /// The session is over.
    Close = 4,
}

impl Kind {
    fn from_u8(value: u8) -> Option<Self> {
        [Self::Hello, Self::HelloAck, Self::Data, Self::Close].into_iter().find(|&kind| kind as u8 == value)
    }
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// Which session.
    pub session: u64,
    /// Its payload, at most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// Appends a frame to `out`.
///
/// # Panics
/// If the payload is longer than [`MAX_PAYLOAD`].
pub fn encode(kind: Kind, session: u64, payload: &[u8], out: &mut Vec<u8>) {
    assert!(payload.len() <= MAX_PAYLOAD, "a frame's payload is bounded");
    let mut header = [0; HEADER];
    header[0] = kind as u8;
    header[1..9].copy_from_slice(&session.to_le_bytes());
    header[9..].copy_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.reserve(payload.len() + payload.len() / 64 + 32);
    out.push(FLAG);
    escape(&header, out);
    escape(payload, out);
    out.push(FLAG);
}

fn escape(mut bytes: &[u8], out: &mut Vec<u8>) {
    while let Some(at) = memchr2(FLAG, ESCAPE, bytes) {
        out.extend_from_slice(&bytes[..at]);
        out.extend_from_slice(&[ESCAPE, bytes[at] ^ FLIP]);
        bytes = &bytes[at + 1..];
    }
    out.extend_from_slice(bytes);
}

/// Finds frames in a stream. It never holds more than one frame.
#[derive(Debug, Default)]
pub struct Decoder {
    frame: Vec<u8>,
    escaped: bool,
    /// The frame is too long or malformed: everything up to the next flag is dropped.
    broken: bool,
}

impl Decoder {
    /// Takes bytes and hands on the frames that they end.
    pub fn push(&mut self, mut bytes: &[u8], mut take: impl FnMut(Frame)) {
        while let Some(&first) = bytes.first() {
            if self.escaped {
                self.escaped = false;
                match first ^ FLIP {
                    byte @ (FLAG | ESCAPE) => self.append(&[byte]),
                    _ => self.broken = true,
                }
                // A flag here ends a frame that was cut off inside an escape; it is looked at below.
                if first != FLAG {
                    bytes = &bytes[1..];
                    continue;
                }
            }
            let at = memchr2(FLAG, ESCAPE, bytes).unwrap_or(bytes.len());
            self.append(&bytes[..at]);
            match bytes.get(at) {
                Some(&FLAG) => {
                    if let Some(frame) = self.finish() {
                        take(frame);
                    }
                }
                Some(_) => self.escaped = true,
                None => return,
            }
            bytes = &bytes[at + 1..];
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.broken || self.frame.len() + bytes.len() > HEADER + MAX_PAYLOAD {
            self.broken = true;
            self.frame.clear();
        } else {
            self.frame.extend_from_slice(bytes);
        }
    }

    fn finish(&mut self) -> Option<Frame> {
        let whole = !std::mem::take(&mut self.broken);
        let frame = self.frame.split_first_chunk::<HEADER>().and_then(|(header, payload)| {
            let kind = Kind::from_u8(header[0])?;
            let session = u64::from_le_bytes(header[1..9].try_into().ok()?);
            let len = u32::from_le_bytes(header[9..].try_into().ok()?);
            (whole && payload.len() as u64 == u64::from(len)).then(|| Frame {
                kind,
                session,
                payload: payload.to_vec(),
            })
        });
        // Its memory serves the next frame.
        self.frame.clear();
        frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8], pieces: usize) -> Vec<Frame> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in bytes.chunks(pieces.max(1)) {
            decoder.push(piece, |frame| frames.push(frame));
        }
        frames
    }

    fn encoded(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            encode(frame.kind, frame.session, &frame.payload, &mut bytes);
        }
        bytes
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let kind = proptest::sample::select(vec![Kind::Hello, Kind::HelloAck, Kind::Data, Kind::Close]);
        let byte = proptest::prop_oneof![Just(FLAG), Just(ESCAPE), any::<u8>()];
        (kind, any::<u64>(), proptest::collection::vec(byte, 0..200)).prop_map(|(kind, session, payload)| Frame {
            kind,
            session,
            payload,
        })
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(frames in proptest::collection::vec(frame(), 0..5), pieces in 1..64_usize) {
            prop_assert_eq!(decode(&encoded(&frames), pieces), frames);
        }

        #[test]
        fn a_frame_cut_off_anywhere_does_not_hide_the_next(cut in frame(), at in 0..100_usize, next in frame()) {
            let mut bytes = encoded(std::slice::from_ref(&cut));
            bytes.truncate(at.min(bytes.len() - 1));
            bytes.extend(encoded(std::slice::from_ref(&next)));
            prop_assert_eq!(decode(&bytes, 7).pop(), Some(next));
        }

        #[test]
        fn any_garbage_before_a_frame_is_harmless(garbage in proptest::collection::vec(any::<u8>(), 0..300), next in frame()) {
            let mut bytes = garbage;
            bytes.extend(encoded(std::slice::from_ref(&next)));
            prop_assert_eq!(decode(&bytes, 13).pop(), Some(next));
        }
    }

    #[test]
    fn an_endless_frame_is_dropped_and_keeps_no_memory() {
        let mut decoder = Decoder::default();
        decoder.push(&[FLAG], |_| {});
        for _ in 0..100 {
            decoder.push(&[1; 4096], |frame| panic!("{frame:?}"));
            assert!(decoder.frame.capacity() <= 4 * MAX_PAYLOAD);
        }
        let hello = Frame { kind: Kind::Hello, session: 7, payload: Vec::new() };
        let mut frames = Vec::new();
        decoder.push(&encoded(std::slice::from_ref(&hello)), |frame| frames.push(frame));
        assert_eq!(frames, [hello]);
    }
}
