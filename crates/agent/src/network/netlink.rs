//! Talking to the kernel over netlink: several requests in one datagram, and one answer for all of them.
//!
//! The messages are put together by hand. A fork does this on its way to its ack, where under emulation every piece of code that runs
//! for the first time costs its translation; a general encoder of all that netlink has would be most of the step.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink, recv, sendto,
    socket_with,
};
use thiserror::Error;

// include/uapi/linux/netlink.h
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
/// `NLM_F_CREATE | NLM_F_REPLACE`: what is there is made to be so, what is not is made.
pub(super) const PUT: u16 = 0x500;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;

/// How long the kernel may take: it answers within the call, but for locks that others hold.
const PATIENCE: Duration = Duration::from_secs(10);
/// The kernel's dumps come in parts of at most this size.
const MAX_PART: usize = 32 * 1024;
/// An answer to a request: its number and what was asked.
const MAX_ANSWER: usize = 1024;

/// A request that the kernel refused.
#[derive(Debug, Error)]
#[error("{doing}: {source}")]
pub struct NetlinkError {
    /// What was asked for.
    pub doing: &'static str,
    /// The kernel's reason.
    #[source]
    pub source: io::Error,
}

pub(super) fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> NetlinkError {
    move |source| NetlinkError { doing, source: source.into() }
}

/// Requests that are sent together. The kernel carries out every one, in this order, also after one that it refused.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where the last message begins.
    last: usize,
    doing: Vec<&'static str>,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::with_capacity(512), last: 0, doing: Vec::with_capacity(8) }
    }

    /// Begins a request. `header` is what follows netlink's own.
    pub(super) fn request(&mut self, kind: u16, flags: u16, header: &[u8], doing: &'static str) {
        self.last = self.bytes.len();
        self.doing.push(doing);
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(header);
        self.close();
    }

    /// Adds an attribute to the request begun last.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.close();
    }

    /// Aligns the end, and writes the length.
    #[inline(never)]
    fn close(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let len = u32::try_from(self.bytes.len() - self.last).unwrap_or(u32::MAX);
        self.bytes[self.last..][..4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Numbers the messages from `first`, and has the last one answered. Errors are answered in any case.
    fn finish(&mut self, first: u32) {
        let (mut at, mut sequence) = (0, first);
        while at < self.bytes.len() {
            self.bytes[at + 8..][..4].copy_from_slice(&sequence.to_ne_bytes());
            sequence = sequence.wrapping_add(1);
            if at == self.last {
                self.bytes[at + 6] |= ACK.to_ne_bytes()[0];
                return;
            }
            at += length_at(&self.bytes[at..]);
        }
    }
}

/// The length of the message that begins here, with its padding, and at least 1.
fn length_at(bytes: &[u8]) -> usize {
    let len = bytes.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len));
    usize::try_from(len).unwrap_or(usize::MAX).next_multiple_of(4).max(1)
}

/// A netlink socket. It belongs to the network namespace its thread was in when it was made.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// For links, addresses, routes, neighbours.
    pub(super) fn route() -> io::Result<Self> {
        // Its protocol has the number 0.
        Self::open(None)
    }

    /// For sockets of other protocols.
    pub(super) fn diagnosis() -> io::Result<Self> {
        Self::open(Some(rustix::net::netlink::SOCK_DIAG))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        rustix::net::sockopt::set_socket_timeout(&fd, rustix::net::sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// The index of a card.
    pub(super) fn index_of(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.fd, name)?)
    }

    /// Carries out requests.
    ///
    /// # Errors
    /// The first that the kernel refused.
    pub(super) fn carry_out(&mut self, mut batch: Batch) -> Result<(), NetlinkError> {
        let count = u32::try_from(batch.doing.len()).unwrap_or(u32::MAX);
        if count == 0 {
            return Ok(());
        }
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(count);
        batch.finish(first);
        self.send(&batch.bytes).map_err(failed("asking the kernel"))?;
        let mut refused = None;
        let mut buffer = [0; MAX_ANSWER];
        loop {
            let len = self.receive(&mut buffer).map_err(failed("waiting for the kernel's answer"))?;
            let Some((ERROR, sequence, payload)) = message(&buffer[..len]).map(|(message, _)| message) else {
                continue;
            };
            // An answer from before (its deadline had passed) is none of these.
            let at = sequence.wrapping_sub(first);
            if at >= count {
                continue;
            }
            if let Some(source) = error_of(payload).filter(|_| refused.is_none()) {
                let doing = usize::try_from(at).ok().and_then(|at| batch.doing.get(at));
                refused = Some(NetlinkError { doing: doing.copied().unwrap_or_default(), source });
            }
            if at == count - 1 {
                return refused.map_or(Ok(()), Err);
            }
        }
    }

    /// Asks for a list; each entry goes to `take` (what follows netlink's own header).
    ///
    /// # Errors
    /// If the kernel refuses; the list may then have begun.
    pub(super) fn list(&mut self, kind: u16, header: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.request(kind, DUMP, header, "");
        self.sequence = self.sequence.wrapping_add(1);
        batch.finish(self.sequence);
        self.send(&batch.bytes)?;
        let mut buffer = vec![0; MAX_PART];
        loop {
            let len = self.receive(&mut buffer)?;
            let mut rest = &buffer[..len];
            while let Some(((kind, sequence, payload), after)) = message(rest) {
                rest = after;
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    ERROR | DONE => return error_of(payload).map_or(Ok(()), Err),
                    _ => take(payload),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
                Ok((len, _)) => return Ok(len),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Kind, number and content of a message.
type Message<'a> = (u16, u32, &'a [u8]);

/// The first message, and what is behind it.
fn message(bytes: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let header = bytes.first_chunk::<HEADER>()?;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let end = length_at(bytes).min(bytes.len());
    Some(((kind, sequence, bytes.get(HEADER..end)?), &bytes[end..]))
}

/// What an answer says; `None` for success.
fn error_of(payload: &[u8]) -> Option<io::Error> {
    let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}

/// The attributes of a message: kind and value.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        // The top bits say how the value is made.
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_aligned_numbered_and_only_the_last_is_answered() {
        let mut batch = Batch::new();
        batch.request(16, PUT, &[1, 2, 3, 4], "one");
        batch.attribute(1, &[9; 6]);
        batch.request(20, 0, &[5, 6, 7, 8], "two");
        batch.finish(u32::MAX);
        let ((kind, sequence, payload), rest) = message(&batch.bytes).unwrap();
        assert_eq!((kind, sequence, payload.len()), (16, u32::MAX, 4 + 12));
        assert_eq!(attributes(&payload[4..]).collect::<Vec<_>>(), [(1, &[9; 6][..])]);
        assert_eq!(u16::from_ne_bytes([batch.bytes[6], batch.bytes[7]]), PUT | REQUEST);
        let ((kind, sequence, payload), after) = message(rest).unwrap();
        assert_eq!((kind, sequence, payload), (20, 0, &[5, 6, 7, 8][..]));
        assert_eq!(u16::from_ne_bytes([rest[6], rest[7]]), ACK | REQUEST);
        assert!(after.is_empty());
    }

    #[test]
    fn what_is_cut_is_no_message_and_ends_the_attributes() {
        assert!(message(&[0; 15]).is_none());
        assert!(message(&[0; 16]).is_none());
        assert_eq!(attributes(&[8, 0, 1, 0, 1]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0, 1, 2, 3, 4]).count(), 0);
    }
}
