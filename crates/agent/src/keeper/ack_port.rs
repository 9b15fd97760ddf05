//! The port on which acks leave the guest.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use rustix::event::{Timespec, epoll};

/// The port `offshoot.ack`, opened before the capture.
#[derive(Debug)]
pub struct AckPort {
    port: Mutex<OwnedFd>,
    epoll: OwnedFd,
}

impl AckPort {
    /// The open (non-blocking) port.
    ///
    /// # Errors
    /// If it can not be watched.
    pub fn new(port: OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge-triggered: while its host side is closed the port reports a hang-up for ever.
        let events = epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, &port, epoll::EventData::new_u64(0), events)?;
        Ok(Self { port: Mutex::new(port), epoll })
    }

    /// Writes one line, which gets its newline here, in one piece: lines of several threads do not mix.
    ///
    /// # Errors
    /// `TimedOut` if the host does not read until the deadline.
    pub fn send(&self, line: &str, deadline: Instant) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(line.len() + 1);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match rustix::io::write(&*port, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        let timeout: Timespec = left.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
