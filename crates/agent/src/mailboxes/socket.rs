//! The local socket `/run/offshoot/agent.sock`. One thread a connection, blocked in its read: nothing polls.

use std::{
    fs::Permissions,
    io::{self, BufRead, BufReader, Read},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::SendFlags;

use super::{
    Owner,
    protocol::{self, MAX_LINE, Refusal, Request},
};
use crate::{boot::mounts, state::AgentState};

/// Most connections at a time; more than there can be mailboxes, because not every one has one.
const MAX_CONNECTIONS: usize = 32;

/// How long the host may take to read a line.
const ACK_DEADLINE: Duration = Duration::from_secs(30);

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
static NEXT_OWNER: AtomicU64 = AtomicU64::new(1);

/// What is written to a program: whole lines, by its own thread and by the keeper's.
#[derive(Debug)]
pub(crate) struct Writer(Mutex<UnixStream>);

impl Writer {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(Mutex::new(stream))
    }

    /// Sends a line without waiting for the program: one that does not read must hold up nobody, least of all the
    /// keeper. The socket's buffer has room for several of the longest lines. On an error the connection is ended.
    pub(crate) fn send(&self, line: &[u8]) -> io::Result<()> {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = rustix::net::send(&*stream, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        if sent == Ok(line.len()) {
            return Ok(());
        }
        let _ = stream.shutdown(std::net::Shutdown::Both);
        Err(sent.err().map_or_else(|| io::ErrorKind::WriteZero.into(), io::Error::from))
    }
}

/// Starts listening.
///
/// # Errors
/// If the socket can not be made.
pub fn start(state: &Arc<AgentState>) -> io::Result<()> {
    let path = format!("{}/agent.sock", mounts::IDENTITY);
    let listener = UnixListener::bind(&path)?;
    // Every program of the workload may plant a mailbox.
    std::fs::set_permissions(&path, Permissions::from_mode(0o666))?;
    let state = Arc::clone(state);
    thread::Builder::new().name("mailboxes".into()).stack_size(128 * 1024).spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            if CONNECTIONS.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let state = Arc::clone(&state);
            let name = "mailbox".to_owned();
            let serve = move || {
                serve(&state, stream);
                CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
            };
            if thread::Builder::new().name(name).stack_size(256 * 1024).spawn(serve).is_err() {
                CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })?;
    Ok(())
}

fn serve(state: &Arc<AgentState>, stream: UnixStream) {
    let owner = NEXT_OWNER.fetch_add(1, Ordering::Relaxed);
    let Ok(copy) = stream.try_clone() else { return };
    let writer = Arc::new(Writer::new(copy));
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX) + 1;
        match reader.by_ref().take(limit).read_until(b'\n', &mut line) {
            Ok(read) if read > 0 => {}
            _ => break,
        }
        let complete = line.ends_with(b"\n");
        let result = match complete {
            true => protocol::parse(&line).and_then(|request| obey(state, owner, request, &writer)),
            false if line.len() > MAX_LINE => Err(Refusal::TooLong),
            // The end, in the middle of a line.
            false => break,
        };
        if writer.send(protocol::reply(&result).as_bytes()).is_err() || !complete {
            break;
        }
    }
    state.keeper().mailboxes().remove(state, owner);
}

fn obey(state: &Arc<AgentState>, owner: Owner, request: Request, writer: &Arc<Writer>) -> Result<(), Refusal> {
    let mailboxes = state.keeper().mailboxes();
    match request {
        Request::Plant { name, capacity, token } => mailboxes.plant(owner, name, capacity, token, Arc::clone(writer)),
        Request::Announce { name, capacity, nonce } => mailboxes.announce(owner, name, capacity, nonce),
        Request::Answer { name, failure } => mailboxes.answer(state, owner, name.as_ref(), failure),
        Request::Relay(line) => {
            state.keeper().send_ack(&line, Instant::now() + ACK_DEADLINE).map_err(|_| Refusal::HostAway)
        }
    }
}
