//! The socket for a fork's acknowledgements: inside its namespace, on the gateway's address, for nobody but the guest.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, recvfrom},
};

use crate::address::Addresses;

/// The port of the gateway that acknowledgements go to. It is the same for every fork: each has a gateway of its own.
pub const ACK_PORT: u16 = 28518;

/// Longest datagram that is taken, in bytes. It is below every link's packet size: a fragment of an acknowledgement is never waited for.
pub const MAX_DATAGRAM: usize = 1024;

/// Most datagrams that are taken in one go. A guest that is well sends one, and it again after 20 ms.
pub const MAX_AT_ONCE: usize = 64;

/// A datagram that came from the guest's own address. What it says is not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckDatagram {
    /// Its bytes, at most [`MAX_DATAGRAM`].
    pub bytes: Vec<u8>,
    from: SocketAddr,
}

/// Receives the acknowledgements of one fork. It works while the link is closed: the guest's datagram goes no further than its namespace,
/// whose rules have dropped what does not come from the fork's MAC and address.
#[derive(Debug)]
pub struct AckSocket {
    socket: UdpSocket,
    guest: Ipv4Addr,
}

impl AckSocket {
    /// Makes the socket, in the thread's namespace.
    pub(crate) fn bind(addresses: &Addresses) -> io::Result<Self> {
        let socket = UdpSocket::bind((addresses.gateway_v4, ACK_PORT))?;
        Ok(Self { socket, guest: addresses.v4 })
    }

    /// Waits for the next datagram. `None` when the deadline has passed. Datagrams that are empty, too long, or not from the
    /// guest's address are dropped, and do not put the deadline off.
    ///
    /// # Errors
    /// The socket's.
    pub fn receive(&self, deadline: Instant) -> io::Result<Option<AckDatagram>> {
        // One byte more than is taken tells what is too long.
        let mut buffer = [0; MAX_DATAGRAM + 1];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let (length, from) = match self.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            if self.is_good(from, length) {
                return Ok(Some(AckDatagram { bytes: buffer[..length].to_vec(), from }));
            }
        }
    }

    /// The datagrams that are there already, without waiting, at most [`MAX_AT_ONCE`] with those that are dropped: a guest can send faster than they
    /// are looked at, and whoever takes them has a deadline to look at as well. What is dropped by [`receive`](Self::receive) is dropped here too.
    ///
    /// # Errors
    /// The socket's.
    pub fn take(&self) -> io::Result<Vec<AckDatagram>> {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        let mut taken = Vec::new();
        for _ in 0..MAX_AT_ONCE {
            let (length, from) = match recvfrom(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((length, _, from)) => (length, from),
                Err(Errno::WOULDBLOCK) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let from = from.and_then(|from| SocketAddr::try_from(from).ok());
            if let Some(from) = from.filter(|from| self.is_good(*from, length)) {
                taken.push(AckDatagram { bytes: buffer[..length].to_vec(), from });
            }
        }
        Ok(taken)
    }

    fn is_good(&self, from: SocketAddr, length: usize) -> bool {
        from.ip() == self.guest && (1..=MAX_DATAGRAM).contains(&length)
    }

    /// Answers a datagram, so that the guest stops sending it.
    ///
    /// # Errors
    /// The socket's.
    pub fn confirm(&self, datagram: &AckDatagram, answer: &[u8]) -> io::Result<()> {
        self.socket.send_to(answer, datagram.from).map(drop)
    }
}

impl AsFd for AckSocket {
    /// For waiting on several things together.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
