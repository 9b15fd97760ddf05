//! Waiting for devices: the kernel announces each on a netlink socket, so nothing has to poll.

use std::{fs, io, os::fd::OwnedFd, path::Path, time::Instant};

use rustix::{
    event::{PollFd, PollFlags},
    fs::{Mode, OFlags},
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink},
};

/// Hears of every device that appears or changes from its creation on.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// Starts listening.
    ///
    /// # Errors
    /// If the socket can not be opened.
    pub fn new() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )?;
        // Group 1 is the kernel's own messages.
        rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
        Ok(Self(socket))
    }

    /// Calls `look` now and after each announcement until it finds what it looks for.
    ///
    /// # Errors
    /// `TimedOut` at the deadline.
    pub fn wait_for<T>(&mut self, deadline: Instant, mut look: impl FnMut() -> Option<T>) -> io::Result<T> {
        loop {
            // Drained before the look: what comes after it wakes the poll. A lost message (ENOBUFS) wakes it too.
            let mut buffer = [0_u8; 1];
            while !matches!(
                rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::TRUNC),
                Err(rustix::io::Errno::AGAIN)
            ) {}
            if let Some(found) = look() {
                return Ok(found);
            }
            let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
            let timeout = left.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
            match rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether there is a file at `path`.
#[must_use]
pub fn exists(path: &str) -> Option<()> {
    Path::new(path).exists().then_some(())
}

/// Opens the virtio-serial port called `name`, non-blocking; `None` if it is not there (yet).
#[must_use]
pub fn open_port(name: &str) -> Option<OwnedFd> {
    let port = fs::read_dir("/sys/class/virtio-ports").ok()?.filter_map(Result::ok).find(|port| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|text| text.trim_end_matches('\n') == name)
    })?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(Path::new("/dev").join(port.file_name()), flags, Mode::empty()).ok()
}
