//! What a card is connected to on the host.
//!
//! Nothing here ever waits. A descriptor is used until it says "would block", and then again when the [device
//! thread](crate::events) says so.
//!
//! The other end of a stream counts as hostile. Of what it says only the lengths are believed, and each is bounded before anything is
//! done with it; after a length that no frame has, nobody knows where the next one begins, so the stream is closed.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::OFlags,
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};

use super::FRAME_MAX;
use crate::events::Readiness;

/// Bytes before each frame of a stream: its length, big endian.
pub(super) const LENGTH_BYTES: usize = size_of::<u32>();

/// What a card is connected to.
#[derive(Debug)]
pub enum Cable {
    /// Nothing: what is sent is lost.
    Loose,
    /// A tap (`IFF_TAP | IFF_NO_PI`), or a datagram socket: each read and each write is one frame.
    Tap(OwnedFd),
    /// A stream socket: each frame has its length before it.
    Stream(OwnedFd),
}

/// A cable in use.
#[derive(Debug)]
pub(super) struct Plug {
    end: End,
    /// The last read, and the last write, did not say "would block".
    readable: bool,
    writable: bool,
}

#[derive(Debug)]
enum End {
    Loose,
    Tap(OwnedFd),
    Stream(Stream),
}

/// A stream, with the pieces of frames that are on their way.
#[derive(Debug)]
struct Stream {
    socket: OwnedFd,
    /// What was read and is no frame yet, or was not asked for: `read` in `incoming`.
    incoming: Box<[u8]>,
    read: std::ops::Range<usize>,
    /// The rest of a frame of which a part is sent: one frame at most.
    outgoing: Vec<u8>,
}

/// What came of looking for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// A frame of so many bytes, perhaps none.
    Frame(usize),
    /// A piece of one: there may be more at once.
    Piece,
    /// Nothing, until the host's end becomes readable.
    Nothing,
}

/// The stream can not be used any more: its other end is gone, or is not one that keeps to the framing.
struct Broken;

impl Plug {
    /// # Errors
    /// If a descriptor can not be made non-blocking.
    pub(super) fn new(cable: Cable) -> io::Result<Self> {
        let end = match cable {
            Cable::Loose => End::Loose,
            Cable::Tap(tap) => {
                do_not_block(&tap)?;
                End::Tap(tap)
            }
            Cable::Stream(socket) => {
                do_not_block(&socket)?;
                let incoming = vec![0; LENGTH_BYTES + FRAME_MAX].into_boxed_slice();
                End::Stream(Stream { socket, incoming, read: 0..0, outgoing: Vec::new() })
            }
        };
        Ok(Self { end, readable: true, writable: true })
    }

    /// What to watch.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.end {
            End::Loose => None,
            End::Tap(tap) => Some(tap.as_fd()),
            End::Stream(stream) => Some(stream.socket.as_fd()),
        }
    }

    pub(super) fn ready(&mut self, readiness: Readiness) {
        self.readable |= readiness.readable;
        self.writable |= readiness.writable;
    }

    /// Looks for a frame with one read at most. `frame` has room for the longest.
    pub(super) fn receive(&mut self, frame: &mut [u8]) -> Received {
        match &mut self.end {
            End::Loose => Received::Nothing,
            End::Tap(_) if !self.readable => Received::Nothing,
            End::Tap(tap) => match rustix::io::read(tap, frame) {
                Ok(count) => Received::Frame(count),
                Err(Errno::INTR) => Received::Piece,
                // Would block; or an interface that is gone, which has nothing to say any more either.
                Err(_) => {
                    self.readable = false;
                    Received::Nothing
                }
            },
            End::Stream(stream) => match stream.receive(frame, &mut self.readable) {
                Ok(received) => received,
                Err(Broken) => self.pull(),
            },
        }
    }

    /// Sends a frame that has room for its length before it. Whether it is gone: sent, or lost; if not, there is no room for it until the
    /// host's end becomes writable.
    pub(super) fn send(&mut self, room_and_frame: &mut [u8]) -> bool {
        let Some((room, frame)) = room_and_frame.split_at_mut_checked(LENGTH_BYTES) else { return true };
        match &mut self.end {
            End::Loose => true,
            End::Tap(_) if !self.writable => false,
            End::Tap(tap) => {
                let sent = until_uninterrupted(|| rustix::io::write(&*tap, frame));
                self.writable = sent != Err(Errno::AGAIN);
                // What else is wrong with a frame is not the guest's to know: on a network it would be lost.
                self.writable
            }
            End::Stream(stream) => {
                let Ok(length) = u32::try_from(frame.len()) else { return true };
                room.copy_from_slice(&length.to_be_bytes());
                match stream.send(room_and_frame, &mut self.writable) {
                    Ok(taken) => taken,
                    Err(Broken) => {
                        self.pull();
                        true
                    }
                }
            }
        }
    }

    /// Sends what is left of a frame.
    pub(super) fn flush(&mut self) {
        if let End::Stream(stream) = &mut self.end
            && stream.flush(&mut self.writable).is_err()
        {
            self.pull();
        }
    }

    /// Closes the host's end for good, which also ends its watch.
    fn pull(&mut self) -> Received {
        self.end = End::Loose;
        Received::Nothing
    }
}

impl Stream {
    fn receive(&mut self, frame: &mut [u8], readable: &mut bool) -> Result<Received, Broken> {
        if let Some(count) = self.next_frame(frame)? {
            return Ok(Received::Frame(count));
        }
        if !*readable {
            return Ok(Received::Nothing);
        }
        // A piece of one frame is all that is left: less than there is room for.
        self.incoming.copy_within(self.read.clone(), 0);
        self.read = 0..self.read.len();
        let room = self.incoming.get_mut(self.read.end..).unwrap_or_default();
        match recv(&self.socket, room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(Broken),
            Ok((count, _)) => {
                self.read.end += count;
                Ok(self.next_frame(frame)?.map_or(Received::Piece, Received::Frame))
            }
            Err(Errno::INTR) => Ok(Received::Piece),
            Err(Errno::AGAIN) => {
                *readable = false;
                Ok(Received::Nothing)
            }
            Err(_) => Err(Broken),
        }
    }

    /// Takes the next frame of what was read, if it is whole.
    fn next_frame(&mut self, frame: &mut [u8]) -> Result<Option<usize>, Broken> {
        let read = self.incoming.get(self.read.clone()).unwrap_or_default();
        let Some((length, rest)) = read.split_first_chunk() else { return Ok(None) };
        let count = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| Broken)?;
        if count > FRAME_MAX {
            return Err(Broken);
        }
        let (Some(from), Some(to)) = (rest.get(..count), frame.get_mut(..count)) else { return Ok(None) };
        to.copy_from_slice(from);
        self.read.start += LENGTH_BYTES + count;
        Ok(Some(count))
    }

    /// Whether the frame is taken: sent, or kept here to be sent on.
    fn send(&mut self, bytes: &[u8], writable: &mut bool) -> Result<bool, Broken> {
        self.flush(writable)?;
        if !*writable {
            return Ok(false);
        }
        let rest = self.write(bytes, writable)?;
        let untouched = rest == bytes.len();
        if !untouched {
            self.outgoing.extend_from_slice(bytes.get(bytes.len() - rest..).unwrap_or_default());
        }
        Ok(!untouched)
    }

    fn flush(&mut self, writable: &mut bool) -> Result<(), Broken> {
        if *writable && !self.outgoing.is_empty() {
            let mut outgoing = std::mem::take(&mut self.outgoing);
            let rest = self.write(&outgoing, writable)?;
            outgoing.drain(..outgoing.len() - rest);
            self.outgoing = outgoing;
        }
        Ok(())
    }

    /// Writes until all is written or the socket takes no more; answers with how many bytes are left.
    fn write(&self, mut bytes: &[u8], writable: &mut bool) -> Result<usize, Broken> {
        while !bytes.is_empty() {
            match until_uninterrupted(|| send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN) => {
                    *writable = false;
                    break;
                }
                Err(_) => return Err(Broken),
            }
        }
        Ok(bytes.len())
    }
}

fn do_not_block(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

fn until_uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
