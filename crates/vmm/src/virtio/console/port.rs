//! One port: the host's end of it, and the bytes between that and the port's two queues.
//!
//! Nothing is buffered here. From the guest, a chain stays in its queue until the host has taken all of it (how far that is,
//! is remembered); to the guest, bytes are read from the host straight into a buffer that the driver has given. What does
//! not fit stays in the host's socket, whose writer then waits.

use std::os::{
    fd::{AsFd, OwnedFd},
    unix::net::UnixListener,
};

use rustix::{
    fs::OFlags,
    io::Errno,
    net::{RecvFlags, SocketFlags},
};
use serde::{Deserialize, Serialize};
use vm_memory::{ReadVolatile as _, VolatileSlice, WriteVolatile as _};

use super::{
    super::{LoadError, Progress, QueueError, Queues, chain::io_error},
    HostEnd, PortConfig,
    control::News,
};
use crate::events::{Readiness, Watcher};

/// Bytes moved by one call for one port and direction, about: then it is another device's turn.
const TURN_BYTES: usize = 256 << 10;

/// How many bytes one system call may move. Bounds the time in which nothing else of the device can go on.
const PIECE_BYTES: usize = 64 << 10;

/// A port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) number: u32,
    pub(super) name: String,
    pub(super) news: News,
    /// The guest's side has the port open.
    pub(super) guest_open: bool,
    end: End,
    /// Bytes of the first chain in the transmit queue that the host has already.
    sent: u64,
    /// The transmit queue holds what could not be sent yet.
    behind: bool,
    watcher: Option<Watcher>,
}

/// What a saved port consists of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PortState {
    number: u32,
    name: String,
    news: News,
    guest_open: bool,
    sent: u64,
    behind: bool,
}

#[derive(Debug)]
enum End {
    Pipe(Pipe),
    Socket { listener: UnixListener, may_accept: bool, connection: Option<Connection> },
}

/// A pipe's end for writing. As far as the guest sees, somebody always reads it.
#[derive(Debug)]
struct Pipe {
    fd: OwnedFd,
    writable: bool,
    /// Only once it was full: a pipe that never is costs no event.
    watched: bool,
}

/// A host at a socket. The flags say what was not yet answered with "would block".
#[derive(Debug)]
struct Connection {
    stream: OwnedFd,
    readable: bool,
    writable: bool,
    hang_up: bool,
    /// It takes nothing any more; what it has sent is still to be delivered.
    deaf: bool,
}

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It was as much as was asked for.
    Full,
    /// The descriptor would block.
    Blocked,
    /// The other side is gone.
    Ended,
}

impl Port {
    pub(super) fn new(config: PortConfig) -> Result<Self, Errno> {
        let end = match config.end {
            HostEnd::Pipe(fd) => {
                set_nonblocking(&fd)?;
                End::Pipe(Pipe { fd, writable: true, watched: false })
            }
            HostEnd::Socket(listener) => {
                set_nonblocking(&listener)?;
                End::Socket { listener, may_accept: true, connection: None }
            }
        };
        Ok(Self {
            number: config.number,
            name: config.name,
            news: News::default(),
            guest_open: false,
            end,
            sent: 0,
            behind: false,
            watcher: None,
        })
    }

    /// Whether the host's side is there.
    pub(super) fn host_open(&self) -> bool {
        match &self.end {
            End::Pipe(_) => true,
            End::Socket { connection, .. } => connection.is_some(),
        }
    }

    fn receive_queue(&self) -> u16 {
        u16::try_from(2 * self.number + 2).unwrap_or(u16::MAX)
    }

    fn transmit_queue(&self) -> u16 {
        self.receive_queue().saturating_add(1)
    }

    fn key(&self) -> u32 {
        2 * self.number
    }

    pub(super) fn attach(&mut self, watcher: Watcher) -> std::io::Result<()> {
        match &self.end {
            End::Pipe(_) => {}
            End::Socket { listener, .. } => watcher.add(listener, self.key())?,
        }
        self.watcher = Some(watcher);
        Ok(())
    }

    /// Remembers what became possible. `connection`: the event is the connection's, not the listener's or the pipe's.
    pub(super) fn ready(&mut self, connection: bool, readiness: Readiness) {
        match &mut self.end {
            End::Pipe(pipe) => pipe.writable |= readiness.writable,
            End::Socket { may_accept, .. } if !connection => *may_accept = true,
            // May be the event of a connection that is over: then the next call would block, and that is all.
            End::Socket { connection, .. } => {
                if let Some(connection) = connection {
                    connection.readable |= readiness.readable;
                    connection.writable |= readiness.writable;
                    connection.hang_up |= readiness.hang_up;
                }
            }
        }
    }

    /// Takes the next host, if one waits and none is there. True if one was taken.
    pub(super) fn accept(&mut self) -> bool {
        let key = self.key() + 1;
        let End::Socket { listener, may_accept, connection: connection @ None } = &mut self.end else { return false };
        while *may_accept {
            match rustix::net::accept_with(&*listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(stream) => {
                    if let Some(watcher) = &self.watcher
                        && watcher.add(&stream, key).is_err()
                    {
                        // Unwatched it would hang; closed, its owner is told.
                        continue;
                    }
                    *connection =
                        Some(Connection { stream, readable: true, writable: true, hang_up: false, deaf: false });
                    self.news.host(true);
                    return true;
                }
                Err(Errno::AGAIN) => *may_accept = false,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // No more descriptors: tried again at the next event.
                Err(_) => break,
            }
        }
        false
    }

    /// Moves bytes of the host to the guest.
    pub(super) fn receive(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let queue = self.receive_queue();
        let guest_open = self.guest_open;
        let End::Socket { connection: Some(connection), .. } = &mut self.end else { return Ok(Progress::Done) };
        let mut moved = 0;
        while connection.readable {
            let chain = if guest_open { queues.next(queue)? } else { None };
            let Some(chain) = chain else {
                // No room now. A host that is gone and has left nothing is gone for the guest as well; one that has left
                // something, once that is delivered.
                if connection.hang_up && connection.is_drained() {
                    return self.host_gone(queues);
                }
                break;
            };
            if moved >= TURN_BYTES {
                return Ok(Progress::More);
            }
            let slices = chain.writable_slices(queues.memory(), 0, PIECE_BYTES)?;
            if slices.is_empty() {
                // Reading nothing would look like the host's end.
                return Err(QueueError::Small);
            }
            let (count, outcome) = connection.read(&slices);
            if count > 0 {
                queues.complete(&chain, u32::try_from(count).unwrap_or(u32::MAX))?;
                moved += count;
            }
            match outcome {
                Outcome::Full => {}
                Outcome::Blocked => connection.readable = false,
                Outcome::Ended => return self.host_gone(queues),
            }
        }
        Ok(Progress::Done)
    }

    /// Whether the guest waits for [`transmit`](Self::transmit).
    pub(super) fn is_behind(&self) -> bool {
        self.behind
    }

    /// Moves bytes of the guest to the host; if nobody is there, they go nowhere.
    pub(super) fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let queue = self.transmit_queue();
        let mut moved = 0;
        self.behind = true;
        for _ in 0..queues.waiting(queue)? {
            let Some(chain) = queues.next(queue)? else { break };
            let bytes = chain.readable_bytes();
            while self.sent < bytes {
                let Some(sink) = self.end.sink() else { break };
                if moved >= TURN_BYTES {
                    return Ok(Progress::More);
                }
                if !sink.is_writable() {
                    return Ok(Progress::Done);
                }
                let slices = chain.readable_slices(queues.memory(), self.sent, PIECE_BYTES)?;
                let (count, outcome) = sink.write(&slices);
                moved += count;
                self.sent += u64::try_from(count).unwrap_or_default();
                match outcome {
                    Outcome::Full => {}
                    Outcome::Blocked => {
                        self.full();
                        return Ok(Progress::Done);
                    }
                    Outcome::Ended => {
                        self.sent = bytes;
                        if let End::Socket { connection: Some(connection), .. } = &mut self.end {
                            connection.deaf = true;
                            connection.readable = true;
                            connection.hang_up = true;
                        }
                    }
                }
            }
            self.sent = 0;
            queues.complete(&chain, 0)?;
        }
        self.behind = false;
        Ok(Progress::Done)
    }

    /// The host's end took no more.
    fn full(&mut self) {
        let key = self.key();
        match &mut self.end {
            End::Socket { connection, .. } => {
                if let Some(connection) = connection {
                    connection.writable = false;
                }
            }
            End::Pipe(pipe) => {
                pipe.writable = false;
                if !pipe.watched
                    && let Some(watcher) = &self.watcher
                {
                    // If there is room again already, the first event says so.
                    pipe.watched = watcher.add(&pipe.fd, key).is_ok();
                }
                // What can not be watched is tried at every call.
                pipe.writable = !pipe.watched;
            }
        }
    }

    /// The host has hung up and all it sent is delivered. What the guest has for it goes nowhere.
    fn host_gone(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        if let End::Socket { connection, .. } = &mut self.end
            && let Some(connection) = connection.take()
            && let Some(watcher) = &self.watcher
        {
            watcher.remove(&connection.stream);
        }
        self.news.host(false);
        // With nobody there all of it goes, so nothing is left to do.
        let _ = self.transmit(queues)?;
        // The next host may be waiting. It is taken on the device thread.
        Ok(Progress::More)
    }

    /// The driver starts over. A host stays.
    pub(super) fn reset(&mut self) {
        self.news = News::default();
        self.guest_open = false;
        self.sent = 0;
        self.behind = false;
    }

    pub(super) fn save(&self) -> PortState {
        PortState {
            number: self.number,
            name: self.name.clone(),
            news: self.news,
            guest_open: self.guest_open,
            sent: self.sent,
            behind: self.behind,
        }
    }

    pub(super) fn load(&mut self, state: PortState) -> Result<(), LoadError> {
        if state.number != self.number || state.name != self.name {
            return Err(LoadError::OtherDevice);
        }
        if !state.news.is_possible() {
            return Err(LoadError::Impossible);
        }
        self.news = state.news;
        self.guest_open = state.guest_open;
        self.sent = state.sent;
        self.behind = state.behind;
        // The host of then is not the host of now.
        self.news.host(self.host_open());
        Ok(())
    }
}

/// Where a port's bytes go.
enum Sink<'a> {
    Pipe(&'a Pipe),
    Connection(&'a Connection),
}

impl End {
    fn sink(&self) -> Option<Sink<'_>> {
        match self {
            Self::Pipe(pipe) => Some(Sink::Pipe(pipe)),
            Self::Socket { connection, .. } => {
                connection.as_ref().filter(|connection| !connection.deaf).map(Sink::Connection)
            }
        }
    }
}

impl Sink<'_> {
    fn is_writable(&self) -> bool {
        match self {
            Self::Pipe(pipe) => pipe.writable,
            Self::Connection(connection) => connection.writable,
        }
    }

    fn write(&self, slices: &[VolatileSlice<'_>]) -> (usize, Outcome) {
        let mut fd = match self {
            Self::Pipe(pipe) => pipe.fd.as_fd(),
            Self::Connection(connection) => connection.stream.as_fd(),
        };
        transfer(slices, |slice| fd.write_volatile(slice).map_err(io_error))
    }
}

impl Connection {
    fn read(&mut self, slices: &[VolatileSlice<'_>]) -> (usize, Outcome) {
        let mut stream = self.stream.as_fd();
        transfer(slices, |slice| stream.read_volatile(&mut slice.clone()).map_err(io_error))
    }

    /// Whether nothing that the host sent is left, now that it has hung up.
    fn is_drained(&mut self) -> bool {
        match rustix::net::recv(&self.stream, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => true,
            Ok(_) | Err(Errno::INTR) => false,
            Err(Errno::AGAIN) => {
                // The hang-up was another connection's.
                self.hang_up = false;
                false
            }
            Err(_) => true,
        }
    }
}

/// Moves slice after slice until one is not moved completely; the bytes moved, and how it ended. A slice moved in part says
/// nothing about the descriptor yet.
fn transfer(
    slices: &[VolatileSlice<'_>],
    mut one: impl FnMut(&VolatileSlice<'_>) -> std::io::Result<usize>,
) -> (usize, Outcome) {
    let mut moved = 0;
    for slice in slices {
        let count = loop {
            match one(slice) {
                Ok(count) => break count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return (moved, Outcome::Blocked),
                Err(_) => return (moved, Outcome::Ended),
            }
        };
        if count == 0 {
            return (moved, Outcome::Ended);
        }
        moved += count;
        if count < slice.len() {
            break;
        }
    }
    (moved, Outcome::Full)
}

fn set_nonblocking(fd: impl AsFd) -> Result<(), Errno> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
}
