//! The host's end of a worker's control socket.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, IoSlice, Read, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    time::Duration,
};

use identity::mailbox::{PAGE_SIZE, Page, offset};
use memory::PrivateMemory;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::worker::protocol::{Frame, FrameError, MAX_FRAME, Phase, Range, Reply, Request, Write};

use crate::EngineError;

/// [`PAGE_SIZE`], for ranges.
const PAGE_LEN: u32 = 4096;
const _: () = assert!(PAGE_LEN as usize == PAGE_SIZE);

/// A connection to a worker.
#[derive(Debug)]
pub(super) struct Control(UnixStream);

/// Why a worker did not do what it was asked.
#[derive(Debug)]
pub(super) enum ControlError {
    /// The connection broke, or its other end does not keep to the protocol.
    Broken(io::Error),
    /// No answer in time.
    Late(Duration),
    /// It refused.
    Refused(String),
}

impl ControlError {
    pub(super) fn during(self, during: &'static str) -> EngineError {
        match self {
            Self::Broken(source) => EngineError::Control { during, source },
            Self::Late(limit) => EngineError::Timeout { during, limit },
            Self::Refused(reason) => EngineError::Refused { during, reason },
        }
    }

    fn into_io(self) -> io::Error {
        match self {
            Self::Broken(error) => error,
            Self::Late(_) => io::ErrorKind::TimedOut.into(),
            Self::Refused(reason) => io::Error::other(reason),
        }
    }
}

impl From<FrameError> for ControlError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Io(error) => Self::Broken(error),
            error => Self::Broken(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}

impl Control {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Where the machine is in its life, and how many bytes of memory it has. Answered once it is loaded.
    pub(super) fn status(&self, limit: Duration) -> Result<(Phase, u64), ControlError> {
        match self.ask(&Request::Status, None, limit)?.as_reply()? {
            Reply::Status { phase, memory_bytes } => Ok((phase, memory_bytes)),
            other => Err(unexpected(&other)),
        }
    }

    /// Anything that is just done.
    pub(super) fn run(
        &self,
        request: &Request<'_>,
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<(), ControlError> {
        match self.ask(request, descriptor, limit)?.as_reply()? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Pages of the machine's memory.
    fn pages(&self, offsets: &[u64], limit: Duration) -> Result<Vec<Page>, ControlError> {
        let mut pages = Vec::with_capacity(offsets.len());
        for some in offsets.chunks(MAX_FRAME / PAGE_SIZE / 2) {
            let ranges = some.iter().map(|&offset| Range { offset, len: PAGE_LEN }).collect();
            match self.ask(&Request::Read(ranges), None, limit)?.as_reply()? {
                Reply::Bytes(bytes) if bytes.len() == some.len() * PAGE_SIZE => {
                    pages.extend_from_slice(bytes.as_chunks::<PAGE_SIZE>().0);
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(pages)
    }

    fn ask(
        &self,
        request: &Request<'_>,
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Frame, ControlError> {
        let set = |limit| self.0.set_read_timeout(Some(limit)).and_then(|()| self.0.set_write_timeout(Some(limit)));
        set(limit).map_err(ControlError::Broken)?;
        let late = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ControlError::Late(limit),
            _ => ControlError::Broken(error),
        };
        let frame = Frame::request(request)?;
        self.send(frame.bytes(), descriptor).map_err(late)?;
        let mut length = [0; size_of::<u32>()];
        (&self.0).read_exact(&mut length).map_err(late)?;
        let reply = Frame::receive(length, &mut &self.0).map_err(|error| match error {
            FrameError::Io(error) => late(error),
            error => error.into(),
        })?;
        if let Reply::Refused(reason) = reply.as_reply()? {
            let plain = reason.chars().map(|character| if character.is_control() { ' ' } else { character });
            return Err(ControlError::Refused(plain.take(500).collect()));
        }
        Ok(reply)
    }

    fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let sent = match descriptor {
            None => 0,
            Some(descriptor) => {
                let descriptors = [descriptor];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                sendmsg(self.0.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?
            }
        };
        (&self.0).write_all(bytes.get(sent..).unwrap_or_default())
    }
}

fn unexpected(reply: &Reply<'_>) -> ControlError {
    let kind = match reply {
        Reply::Status { .. } => "a status",
        Reply::Bytes(_) => "bytes",
        Reply::Done => "that it was done",
        Reply::Refused(_) => "a refusal",
    };
    ControlError::Broken(io::Error::new(io::ErrorKind::InvalidData, format!("it answered {kind}")))
}

/// A worker's machine that has never run, as memory.
///
/// It is a private mapping that nobody has written to, so what is to be seen in that of a template stands in its file as well;
/// reading that instead of asking saves a question. The worker makes sure of it before it writes.
#[derive(Debug)]
pub(super) struct WorkerMemory<'a> {
    control: &'a Control,
    /// `None` for what a captured fork had for itself above its template.
    template: Option<&'a File>,
    size: u64,
    limit: Duration,
    /// The heads of the pages that were read, by offset.
    seen: RefCell<Vec<(u64, [u8; HEAD])>>,
}

/// Bytes of a mailbox's page that say what it is, and that nothing was written to it yet.
const HEAD: usize = offset::PAYLOAD_LEN;

impl<'a> WorkerMemory<'a> {
    pub(super) fn new(control: &'a Control, template: Option<&'a File>, size: u64, limit: Duration) -> Self {
        Self { control, template, size, limit, seen: RefCell::default() }
    }
}

impl PrivateMemory for WorkerMemory<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_pages(&self, offsets: &[u64]) -> io::Result<Vec<Page>> {
        let pages = match self.template {
            None => self.control.pages(offsets, self.limit).map_err(ControlError::into_io)?,
            Some(template) => {
                let read = |&offset: &u64| {
                    let mut page: Page = [0; PAGE_SIZE];
                    template.read_exact_at(&mut page, offset)?;
                    Ok::<_, io::Error>(page)
                };
                offsets.iter().map(read).collect::<Result<_, _>>()?
            }
        };
        let heads = offsets.iter().zip(&pages);
        self.seen.borrow_mut().extend(heads.filter_map(|(&offset, page)| Some((offset, *page.first_chunk()?))));
        Ok(pages)
    }

    /// In one request: all or nothing.
    fn write_in_order(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        let seen = self.seen.borrow();
        let expected = seen.iter().map(|(offset, head)| Write { offset: *offset, bytes: head }).collect();
        let writes = writes.iter().map(|&(offset, bytes)| Write { offset, bytes }).collect();
        let deliver = Request::Deliver { expected, writes };
        self.control.run(&deliver, None, self.limit).map_err(ControlError::into_io)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);

    /// A worker that answers everything it is sent with these bytes, then closes the connection.
    fn answering(bytes: Vec<u8>) -> Control {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut length = [0; 4];
            theirs.read_exact(&mut length).unwrap();
            Frame::receive(length, &mut theirs).unwrap();
            theirs.write_all(&bytes).unwrap();
        });
        Control::new(ours)
    }

    fn reply(reply: &Reply<'_>) -> Vec<u8> {
        Frame::reply(reply).unwrap().bytes().to_vec()
    }

    #[test]
    fn a_worker_that_does_not_keep_to_the_protocol_is_an_error() {
        let good = reply(&Reply::Done);
        answering(good.clone()).run(&Request::Pause, None, LIMIT).unwrap();
        let cut = good[..good.len() - 1].to_vec();
        let other = reply(&Reply::Bytes(b"what for?"));
        for bytes in [Vec::new(), vec![0xff; 64], vec![0; 64], cut, other, vec![2, 0, 0, 0, 1, 0xff]] {
            let answer = answering(bytes.clone()).run(&Request::Pause, None, LIMIT);
            assert!(matches!(answer, Err(ControlError::Broken(_))), "{bytes:?}");
        }
    }

    #[test]
    fn a_refusal_is_cleaned_for_a_terminal() {
        let answer = answering(reply(&Reply::Refused("no\x1b[2J"))).run(&Request::Pause, None, LIMIT);
        assert!(matches!(answer, Err(ControlError::Refused(reason)) if reason == "no [2J"));
    }

    #[test]
    fn a_silent_worker_is_waited_for_only_so_long() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let answer = Control::new(ours).status(Duration::from_millis(50));
        assert!(matches!(answer, Err(ControlError::Late(_))));
    }

    #[test]
    fn a_delivery_says_what_must_be_there() {
        let template = tempfile::tempfile().unwrap();
        template.set_len(3 * 4096).unwrap();
        template.write_all_at(b"marker", 4096).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let worker = thread::spawn(move || {
            let mut length = [0; 4];
            theirs.read_exact(&mut length).unwrap();
            let frame = Frame::receive(length, &mut theirs).unwrap();
            theirs.write_all(&reply(&Reply::Done)).unwrap();
            let Request::Deliver { expected, writes } = frame.as_request().unwrap() else { panic!("no delivery") };
            (expected[0].offset, expected[0].bytes.to_vec(), writes[0].bytes.to_vec())
        });
        let control = Control::new(ours);
        let memory = WorkerMemory::new(&control, Some(&template), 3 * 4096, LIMIT);
        assert_eq!(&memory.read_pages(&[4096]).unwrap()[0][..6], b"marker");
        assert!(memory.read_pages(&[3 * 4096]).is_err());
        memory.write_in_order(&[(4096 + 300, b"letter")]).unwrap();
        let (offset, head, letter) = worker.join().unwrap();
        assert_eq!((offset, &head[..6], head.len(), letter.as_slice()), (4096, &b"marker"[..], HEAD, &b"letter"[..]));
    }

    #[test]
    fn above_a_template_the_worker_is_asked() {
        let own: Page = [7; PAGE_SIZE];
        let control = answering(reply(&Reply::Bytes(&own)));
        let memory = WorkerMemory::new(&control, None, 3 * 4096, LIMIT);
        assert_eq!(memory.read_pages(&[4096]).unwrap(), [own]);
        let short = answering(reply(&Reply::Bytes(&own[1..])));
        assert!(WorkerMemory::new(&short, None, 3 * 4096, LIMIT).read_pages(&[4096]).is_err());
    }
}
