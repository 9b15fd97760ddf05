//! A control port: two threads that move its bytes, and a task that makes sessions of them.
//!
//! The port is watched edge-triggered. While the host's side is closed it reports a hang-up for ever, which would make a
//! level-triggered watch (tokio's as well, whose "closed" is final) spin in every idle fork.

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use guest_api::session::{Acceptor, BUFFER, Event, Kind, MAX_PAYLOAD, encode};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    sync::mpsc,
};

/// Chunks that may wait on each way. Together with [`BUFFER`] this bounds what one port can hold.
const CHUNKS: usize = 4;

/// How long a host that has sent something may look absent: until the kernel's worker has heard of it, which on a busy machine without
/// hardware virtualisation can take as long as a second. What is given up then is lost to a host that may well be there.
const OPENS_WITHIN: Duration = Duration::from_secs(5);

/// How long a closed port must stay closed to count as a host that went away; for the same reason not less. A host that ends in peace says so
/// itself, and the next one is a new session at once.
const SETTLES_WITHIN: Duration = Duration::from_secs(3);

/// What the reading thread saw.
#[derive(Debug)]
enum Input {
    Bytes(Vec<u8>),
    /// The host's side was closed: what was under way is over.
    HangUp,
}

/// Starts the threads and the task of one port (open and non-blocking). Each session goes to `sessions`.
pub(super) fn start(port: OwnedFd, sessions: mpsc::Sender<DuplexStream>) -> io::Result<()> {
    let port = Arc::new(port);
    let (input, from_port) = mpsc::channel(CHUNKS);
    let (to_port, output) = mpsc::channel(CHUNKS);
    let small = || thread::Builder::new().stack_size(128 * 1024);
    let reader = Arc::clone(&port);
    small().name("port-read".into()).spawn(move || read(&reader, &input))?;
    small().name("port-write".into()).spawn(move || write(&port, output))?;
    tokio::spawn(relay(from_port, to_port, sessions));
    Ok(())
}

fn read(port: &OwnedFd, input: &mpsc::Sender<Input>) -> Option<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    epoll::add(&epoll, port, epoll::EventData::new_u64(0), flags).ok()?;
    let mut buffer = vec![0; MAX_PAYLOAD];
    // Whether a host has sent something since the last hang-up.
    let mut connected = false;
    loop {
        // Before the wait: the first bytes may have come with the edge that opened the port.
        loop {
            match rustix::io::read(port, &mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    connected = true;
                    input.blocking_send(Input::Bytes(buffer[..count].to_vec())).ok()?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => break,
            }
        }
        let looks_closed = connected && is_closed(port);
        let limit = looks_closed.then(|| Timespec::try_from(SETTLES_WITHIN).ok()).flatten();
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        match epoll::wait(&epoll, &mut events, limit.as_ref()) {
            Ok(0) if looks_closed && is_closed(port) => {
                connected = false;
                input.blocking_send(Input::HangUp).ok()?;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Whether the driver thinks that the host's side is closed. A new host's first bytes may be there before the driver has
/// heard of it (they travel in different queues), so this is believed only once nothing has changed for a while.
fn is_closed(port: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(port, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

fn write(port: &OwnedFd, mut output: mpsc::Receiver<Vec<u8>>) -> Option<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
    epoll::add(&epoll, port, epoll::EventData::new_u64(0), epoll::EventFlags::OUT | epoll::EventFlags::ET).ok()?;
    while let Some(bytes) = output.blocking_recv() {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match rustix::io::write(port, rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                // Full, or nobody there. In the second case the bytes belong to a session that is over.
                Err(rustix::io::Errno::AGAIN) if is_writable(port, &epoll) => {}
                Err(_) => break,
            }
        }
    }
    None
}

/// Waits until the port takes bytes; false if the host's side is closed.
///
/// A host's first bytes can come before the driver has heard that the host is there (they travel in different queues), so a
/// port that looks closed gets a moment to look open.
fn is_writable(port: &OwnedFd, epoll: &OwnedFd) -> bool {
    let patience = Instant::now() + OPENS_WITHIN;
    loop {
        let mut polled = [PollFd::new(port, PollFlags::OUT)];
        match poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        let seen = polled[0].revents();
        let limit = if seen.contains(PollFlags::HUP) {
            match patience.checked_duration_since(Instant::now()) {
                Some(left) => Timespec::try_from(left).ok(),
                None => return false,
            }
        } else if seen.contains(PollFlags::OUT) {
            return true;
        } else {
            None
        };
        // Edge-triggered, so a port that stays closed does not wake us again and again.
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let _ = epoll::wait(epoll, &mut events, limit.as_ref());
    }
}

struct Session {
    number: u64,
    to_user: WriteHalf<DuplexStream>,
    sending: tokio::task::JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sending.abort();
    }
}

/// Makes sessions of a port's bytes until the port is gone.
async fn relay(
    mut from_port: mpsc::Receiver<Input>,
    to_port: mpsc::Sender<Vec<u8>>,
    sessions: mpsc::Sender<DuplexStream>,
) {
    let mut acceptor = Acceptor::default();
    let mut current: Option<Session> = None;
    while let Some(input) = from_port.recv().await {
        let Input::Bytes(bytes) = input else {
            if let Some(session) = current.take() {
                // If somebody does listen after all, it must not wait for ever.
                let mut close = Vec::new();
                encode(Kind::Close, session.number, &[], &mut close);
                let _ = to_port.try_send(close);
            }
            continue;
        };
        for event in acceptor.push(&bytes) {
            match event {
                Event::Opened(number) if current.as_ref().is_some_and(|session| session.number == number) => {
                    // Asked again, because our answer was late or lost.
                    let mut answer = Vec::new();
                    encode(Kind::HelloAck, number, &[], &mut answer);
                    if to_port.send(answer).await.is_err() {
                        return;
                    }
                }
                Event::Opened(number) => {
                    // The old session's stream ends before the new one is there.
                    drop(current.take());
                    let (ours, theirs) = duplex(BUFFER);
                    let (from_user, to_user) = split(ours);
                    let mut answer = Vec::new();
                    encode(Kind::HelloAck, number, &[], &mut answer);
                    if to_port.send(answer).await.is_err() || sessions.send(theirs).await.is_err() {
                        return;
                    }
                    let sending = tokio::spawn(send(from_user, to_port.clone(), number));
                    current = Some(Session { number, to_user, sending });
                }
                Event::Data(number, data) => {
                    let session = current.as_mut().filter(|session| session.number == number);
                    if let Some(session) = session
                        && session.to_user.write_all(&data).await.is_err()
                    {
                        // The server has given up this connection. The session's own task would tell the host, but ends
                        // with the session.
                        current = None;
                        let mut close = Vec::new();
                        encode(Kind::Close, number, &[], &mut close);
                        if to_port.send(close).await.is_err() {
                            return;
                        }
                    }
                }
                Event::Closed(number) => {
                    if current.as_ref().is_some_and(|session| session.number == number) {
                        current = None;
                    }
                }
            }
        }
    }
}

async fn send(mut from_user: ReadHalf<DuplexStream>, to_port: mpsc::Sender<Vec<u8>>, number: u64) {
    let mut buffer = vec![0; MAX_PAYLOAD];
    while let Ok(count) = from_user.read(&mut buffer).await {
        let mut bytes = Vec::new();
        let (kind, payload) = if count == 0 { (Kind::Close, &[][..]) } else { (Kind::Data, &buffer[..count]) };
        encode(kind, number, payload, &mut bytes);
        if to_port.send(bytes).await.is_err() || kind == Kind::Close {
            return;
        }
    }
}
