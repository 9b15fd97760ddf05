//! What the cards of a network namespace see.

use std::{
    net::IpAddr,
    num::NonZero,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socket_with, sockopt::set_socket_recv_buffer_size,
};

use crate::{servers::is_ready, world::Place};

/// Every protocol (`ETH_P_ALL`).
const ALL: u16 = 3;
/// The first bytes of the address of a wire out of a fork's namespace.
const WIRE: [u8; 2] = [0x06, 0x6f];

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame(pub Vec<u8>);

/// All frames that any card of a namespace sees from now on, in their order. Those that leave it as well.
#[derive(Debug)]
pub struct Capture {
    frames: Arc<Mutex<Vec<Frame>>>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Begins.
    #[must_use]
    pub fn start(place: &Place) -> Self {
        let socket = place.within(open);
        let frames = Arc::new(Mutex::new(Vec::new()));
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        let seen = frames.clone();
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while is_ready(socket.as_fd(), there.as_fd()) {
                while let Ok((length, _)) = recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                    seen.lock().expect("nobody panics with it").push(Frame(buffer[..length].to_vec()));
                }
            }
        });
        Self { frames, stop: Some(here), thread: Some(thread) }
    }

    /// What was seen so far.
    #[must_use]
    pub fn frames(&self) -> Vec<Frame> {
        self.frames.lock().expect("nobody panics with it").clone()
    }

    /// Whether such a frame was seen.
    #[must_use]
    pub fn any(&self, is: impl Fn(&Frame) -> bool) -> bool {
        self.frames().iter().any(is)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open() -> OwnedFd {
    let all = NonZero::new(u32::from(ALL.to_be())).map(rustix::net::Protocol::from_raw);
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, all).expect("root may watch a namespace");
    let _ = set_socket_recv_buffer_size(&socket, 8 << 20);
    socket
}

impl Frame {
    /// Whether it is on a wire between a fork's namespace and the host's, not on a tap.
    #[must_use]
    pub fn is_on_wire(&self) -> bool {
        self.0[6..8] == WIRE
    }

    /// The sender's card, as text.
    #[must_use]
    pub fn mac(&self) -> String {
        let bytes: Vec<_> = self.0[6..12].iter().map(|byte| format!("{byte:02x}")).collect();
        bytes.join(":")
    }

    /// The address it says it is from: that of its packet, or what an ARP packet announces.
    #[must_use]
    pub fn source(&self) -> Option<IpAddr> {
        self.address(26, 28, 22)
    }

    /// The address it is for.
    #[must_use]
    pub fn destination(&self) -> Option<IpAddr> {
        self.address(30, 38, 38)
    }

    fn address(&self, v4: usize, arp: usize, v6: usize) -> Option<IpAddr> {
        let four = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(self.0.get(at..at + 4)?).ok()?));
        match self.0.get(12..14)? {
            [0x08, 0x00] => four(v4),
            [0x08, 0x06] => four(arp),
            [0x86, 0xdd] => Some(IpAddr::from(<[u8; 16]>::try_from(self.0.get(v6..v6 + 16)?).ok()?)),
            _ => None,
        }
    }

    /// What a datagram to this port of an IPv4 address says.
    #[must_use]
    pub fn datagram_to(&self, port: u16) -> Option<&[u8]> {
        let is_udp = self.0.get(12..14)? == [0x08, 0x00] && *self.0.get(23)? == 17;
        (is_udp && self.0.get(36..38)? == port.to_be_bytes()).then(|| self.0.get(42..)).flatten()
    }

    /// Whether these bytes are anywhere in it, but for what a datagram over IPv4 says, with its checksum.
    #[must_use]
    pub fn contains(&self, bytes: &[u8]) -> bool {
        let is_datagram = self.0.get(12..14) == Some(&[0x08, 0x00]) && self.0.get(23) == Some(&17);
        let headers = if is_datagram { &self.0[..40.min(self.0.len())] } else { &self.0[..] };
        memchr::memmem::find(headers, bytes).is_some()
    }
}
