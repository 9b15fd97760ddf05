//! Talking to the kernel over netlink, blocking. The messages are the netlink-packet crates'; what is here is sending and waiting.
//!
//! `rtnetlink` would bring an asynchronous runtime along for some ten requests, and starting a tool takes longer than a fork may for its whole
//! network: `nft` 4 ms on the machine where a prepared link is opened in 0.5 ms.

pub(crate) mod link;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use netlink_packet_core::{
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::{self, SocketAddrNetlink},
    recv, sendto, socket_with,
};

/// Longest datagram read. The kernel's dumps come in parts of at most 32 KiB.
const MAX_DATAGRAM: usize = 64 * 1024;

/// What fits into a socket's buffer on every host, in bytes: half of what the kernel gives it (`net.core.wmem_default`).
const SMALL: usize = 100 * 1024;

/// How long the kernel may take for an answer. It waits for locks of its own, which on a loaded host takes a while.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is read after an error.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AfterError {
    /// The answers to the other requests.
    ReadOn,
    /// Nothing: a transaction that failed is not answered to its end. The socket is not used again.
    Stop,
}

/// A netlink socket. It belongs to the network namespace its thread was in when it was made, and stays in it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// For links, addresses, routes, queues.
    pub(crate) fn route() -> io::Result<Self> {
        // Its protocol has the number 0.
        Self::open(None)
    }

    /// For packet rules.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(Some(netlink::NETFILTER))
    }

    fn open(protocol: Option<rustix::net::Protocol>) -> io::Result<Self> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        rustix::net::sockopt::set_socket_timeout(&fd, rustix::net::sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; MAX_DATAGRAM] })
    }

    /// The next message's number.
    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// The index of an interface in this socket's namespace.
    pub(crate) fn index_of(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(self.fd.as_fd(), name)?)
    }

    /// Sends messages to the kernel, in one datagram.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > SMALL {
            // Packet rules are one datagram, however many ports they have. Who may not do this may not write rules either.
            rustix::net::sockopt::set_socket_send_buffer_size_force(&self.fd, bytes.len())?;
        }
        let sent = sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Carries out requests in their order. Every one is tried, also after one that failed.
    ///
    /// # Errors
    /// That of the first that failed.
    pub(crate) fn carry_out(&mut self, requests: Vec<NetlinkMessage<RouteNetlinkMessage>>) -> io::Result<()> {
        let mut bytes = Vec::new();
        for mut request in requests {
            request.header.sequence_number = self.next_sequence();
            append(&mut bytes, request);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.send(&bytes)?;
        self.wait_for(self.sequence, AfterError::ReadOn, |_, _| {})
    }

    /// Asks for something; each part of the answer goes to `take`.
    pub(crate) fn ask(
        &mut self,
        mut request: NetlinkMessage<RouteNetlinkMessage>,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        request.header.sequence_number = self.next_sequence();
        let mut bytes = Vec::new();
        append(&mut bytes, request);
        self.send(&bytes)?;
        self.wait_for(self.sequence, AfterError::ReadOn, |kind, payload| {
            let mut header = NetlinkHeader::default();
            header.message_type = kind;
            // A message that a newer kernel has and this build does not know is none that we look for.
            if let Ok(message) = RouteNetlinkMessage::deserialize(&header, payload) {
                take(message);
            }
        })
    }

    /// Reads answers until the one to message `last`, and gives those that are neither acknowledgements nor errors to `take`.
    ///
    /// # Errors
    /// The first error among the answers; `TimedOut` if the kernel does not answer within [`PATIENCE`].
    pub(crate) fn wait_for(
        &mut self,
        last: u32,
        after_error: AfterError,
        mut take: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        let mut failed = None;
        loop {
            let (length, _) = loop {
                match recv(&self.fd, &mut self.buffer[..], RecvFlags::empty()) {
                    Err(rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                    other => break other?,
                }
            };
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
                let (kind, sequence) = (message.message_type(), message.sequence_number());
                let payload = message.payload();
                match kind {
                    NLMSG_ERROR => {
                        let code = payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                        if code != 0 && failed.is_none() {
                            failed = Some(io::Error::from_raw_os_error(-code));
                        }
                        if matches!(after_error, AfterError::Stop)
                            && let Some(error) = failed.take()
                        {
                            return Err(error);
                        }
                    }
                    NLMSG_DONE => {}
                    _ => take(kind, payload),
                }
                if sequence == last && matches!(kind, NLMSG_ERROR | NLMSG_DONE) {
                    return failed.map_or(Ok(()), Err);
                }
                let padded = (message.length() as usize).next_multiple_of(4).min(rest.len());
                rest = &rest[padded..];
            }
        }
    }
}

/// Adds a message, aligned as the kernel wants the next.
fn append(bytes: &mut Vec<u8>, mut message: NetlinkMessage<RouteNetlinkMessage>) {
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}
