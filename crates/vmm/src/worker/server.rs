//! The worker's main thread: serves one host process at a time, and ends when the guest does.

use std::{
    fmt::Debug,
    fs::File,
    io::{self, IoSliceMut, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    launch::Purpose,
    protocol::{Frame, FrameError, MAX_FRAME, MAX_REASON, Phase, Range, Reply, Request, Write},
};

/// Time for the rest of a message whose beginning is there, and for an answer to be taken.
const MESSAGE_LIMIT: Duration = Duration::from_secs(10);

/// What the server needs of a machine.
pub trait Guest: Debug {
    /// Bytes of guest memory.
    fn memory_bytes(&self) -> u64;

    /// Reads guest memory by offset in the memory file; the range lies inside.
    ///
    /// # Errors
    /// If it can not be read.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes guest memory by offset in the memory file; the range lies inside.
    ///
    /// # Errors
    /// If it can not be written.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// If they can not.
    fn resume(&mut self) -> io::Result<()>;

    /// Stops the vCPUs and the devices.
    ///
    /// # Errors
    /// If they do not stop.
    fn pause(&mut self) -> io::Result<()>;

    /// The state of a machine that is paused, encoded.
    ///
    /// # Errors
    /// If it can not be had.
    fn capture(&mut self) -> io::Result<Vec<u8>>;

    /// Becomes readable when the machine has come to its end by itself.
    fn ended(&self) -> BorrowedFd<'_>;

    /// How it ended, once it did.
    fn end(&mut self) -> String;
}

/// Why a worker serves no more.
#[derive(Debug)]
pub enum End {
    /// It was asked to.
    Quit,
    /// Whoever started it is gone, and it is of no use to anybody.
    Orphaned,
    /// The guest came to its end.
    Guest(String),
}

/// Serving failed.
#[derive(Debug, Error)]
#[error("the control socket failed")]
pub struct ServeError(#[from] io::Error);

/// The server.
#[derive(Debug)]
pub struct Server<G> {
    listener: UnixListener,
    guest: G,
    purpose: Purpose,
    phase: Phase,
}

/// A host process that is connected.
#[derive(Debug)]
struct Client(UnixStream);

impl<G: Guest> Server<G> {
    /// For a machine that is loaded and has never run.
    pub fn new(listener: UnixListener, guest: G, purpose: Purpose) -> Self {
        Self { listener, guest, purpose, phase: Phase::Loaded }
    }

    /// Serves until the end.
    ///
    /// # Errors
    /// [`ServeError`] if no host process can be served any more.
    pub fn serve(&mut self) -> Result<End, ServeError> {
        let mut client: Option<Client> = None;
        loop {
            // One at a time; whoever comes next waits in the socket's queue.
            let next = client.as_ref().map_or(self.listener.as_fd(), |client| client.0.as_fd());
            let mut events = [
                PollFd::from_borrowed_fd(next, PollFlags::IN),
                PollFd::from_borrowed_fd(self.guest.ended(), PollFlags::IN),
            ];
            match poll(&mut events, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let (next, ended) = (!events[0].revents().is_empty(), !events[1].revents().is_empty());
            if ended {
                return Ok(End::Guest(self.guest.end()));
            }
            if !next {
                continue;
            }
            let Some(open) = client.as_mut() else {
                client = self.accept()?;
                continue;
            };
            match self.serve_one(open) {
                Ok(Next::More) => {}
                Ok(Next::Quit) => return Ok(End::Quit),
                Err(gone) => {
                    if !gone {
                        eprintln!("the connection was closed: it did not keep to the protocol");
                    }
                    client = None;
                    if self.is_orphan() {
                        return Ok(End::Orphaned);
                    }
                }
            }
        }
    }

    fn accept(&self) -> Result<Option<Client>, ServeError> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_read_timeout(Some(MESSAGE_LIMIT))?;
                stream.set_write_timeout(Some(MESSAGE_LIMIT))?;
                Ok(Some(Client(stream)))
            }
            // Whoever it was is gone again.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether nobody can want this machine any more, now that its host process has left.
    fn is_orphan(&self) -> bool {
        match self.purpose {
            Purpose::Template => true,
            Purpose::Fork => self.phase == Phase::Loaded,
            Purpose::Spare => false,
        }
    }

    /// Takes one request. `Err(true)`: the client has left. `Err(false)`: it must.
    fn serve_one(&mut self, client: &mut Client) -> Result<Next, bool> {
        let malformed = |error: FrameError| matches!(error, FrameError::Io(_));
        let Some((frame, descriptor)) = client.receive().map_err(malformed)? else { return Err(true) };
        let request = frame.as_request().map_err(malformed)?;
        let quit = request == Request::Quit;
        let reply = match self.answer(&request, descriptor) {
            Ok(Answer::Bytes(bytes)) => Frame::reply(&Reply::Bytes(&bytes)),
            Ok(Answer::Done) => Frame::reply(&Reply::Done),
            Ok(Answer::Status) => {
                Frame::reply(&Reply::Status { phase: self.phase, memory_bytes: self.guest.memory_bytes() })
            }
            Err(reason) => Frame::reply(&Reply::Refused(short(&reason))),
        };
        let sent = reply.map_err(malformed)?;
        let sent = (&client.0).write_all(sent.bytes());
        if quit { Ok(Next::Quit) } else { sent.map(|()| Next::More).map_err(|_| true) }
    }

    fn answer(&mut self, request: &Request<'_>, descriptor: Option<OwnedFd>) -> Result<Answer, String> {
        let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        match request {
            Request::Status => Ok(Answer::Status),
            Request::Read(ranges) => self.read(ranges).map(Answer::Bytes),
            Request::Deliver { expected, writes } => self.deliver(expected, writes).map(|()| Answer::Done),
            Request::Resume => {
                if self.phase == Phase::Running {
                    return Err("it runs already".into());
                }
                self.guest.resume().map_err(failed("it can not be resumed"))?;
                self.phase = Phase::Running;
                Ok(Answer::Done)
            }
            Request::Pause => {
                self.expect(Phase::Running, "it does not run")?;
                self.guest.pause().map_err(failed("it can not be paused"))?;
                self.phase = Phase::Paused;
                Ok(Answer::Done)
            }
            Request::Capture => {
                self.expect(Phase::Paused, "it is not paused")?;
                let file = descriptor.ok_or("no descriptor came along")?;
                let state = self.guest.capture().map_err(failed("its state can not be had"))?;
                File::from(file).write_all(&state).map_err(failed("its state can not be written"))?;
                Ok(Answer::Done)
            }
            Request::Quit => Ok(Answer::Done),
        }
    }

    fn expect(&self, phase: Phase, otherwise: &str) -> Result<(), String> {
        if self.phase == phase { Ok(()) } else { Err(otherwise.into()) }
    }

    fn read(&self, ranges: &[Range]) -> Result<Zeroizing<Vec<u8>>, String> {
        self.expect(Phase::Loaded, "it has run: its memory is its own")?;
        let mut total = 0_usize;
        for range in ranges {
            let len = self.inside(range.offset, u64::from(range.len))?;
            total = total.checked_add(len).filter(|total| *total < MAX_FRAME).ok_or("too many bytes")?;
        }
        let mut bytes = Zeroizing::new(vec![0; total]);
        let mut rest = bytes.as_mut_slice();
        for range in ranges {
            let len = self.inside(range.offset, u64::from(range.len))?;
            let (part, after) = rest.split_at_mut_checked(len).ok_or("too many bytes")?;
            self.guest.read(range.offset, part).map_err(|error| format!("its memory can not be read: {error}"))?;
            rest = after;
        }
        Ok(bytes)
    }

    /// All or nothing: nothing is written before every place is known to be good and to hold what it should.
    fn deliver(&self, expected: &[Write<'_>], writes: &[Write<'_>]) -> Result<(), String> {
        if self.purpose == Purpose::Template {
            return Err("a template has no private memory".into());
        }
        self.expect(Phase::Loaded, "it has run: nothing is written into it any more")?;
        for part in expected.iter().chain(writes) {
            self.inside(part.offset, part.bytes.len() as u64)?;
        }
        for Write { offset, bytes } in expected {
            let mut found = Zeroizing::new(vec![0; bytes.len()]);
            self.guest.read(*offset, &mut found).map_err(|error| format!("its memory can not be read: {error}"))?;
            if found.as_slice() != *bytes {
                return Err("its memory is not what it was captured with".into());
            }
        }
        for write in writes {
            self.guest.write(write.offset, write.bytes).map_err(|error| format!("half-written: {error}"))?;
        }
        Ok(())
    }

    /// The length of a range, if the range lies inside guest memory.
    fn inside(&self, offset: u64, len: u64) -> Result<usize, String> {
        offset
            .checked_add(len)
            .filter(|end| *end <= self.guest.memory_bytes())
            .and_then(|_| usize::try_from(len).ok())
            .ok_or_else(|| "a range lies outside of its memory".into())
    }
}

enum Next {
    More,
    Quit,
}

enum Answer {
    Status,
    Bytes(Zeroizing<Vec<u8>>),
    Done,
}

impl Client {
    /// The next frame, and the descriptor that came with it; `None` once the client has left.
    fn receive(&mut self) -> Result<Option<(Frame, Option<OwnedFd>)>, FrameError> {
        let mut length = [0; size_of::<u32>()];
        let mut descriptor = None;
        let mut have = 0;
        while have < length.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(length.get_mut(have..).unwrap_or_default())];
            // More than one descriptor is cut off by the kernel, and closed.
            let received = match recvmsg(&self.0, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => received,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(io::Error::from(error).into()),
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    descriptor = descriptors.last();
                }
            }
            if received.bytes == 0 {
                return if have == 0 { Ok(None) } else { Err(FrameError::Length(have)) };
            }
            have += received.bytes;
        }
        Ok(Some((Frame::receive(length, &mut self.0)?, descriptor)))
    }
}

fn short(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_REASON)).unwrap_or_default()
}
