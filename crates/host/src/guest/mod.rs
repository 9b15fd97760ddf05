//! Talking to the agent in a guest. Everything that comes from there is hostile: bounded, and never a path.

mod copy;
pub mod exec;
mod forward;
mod shared;

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use engine::CONTROL_CHANNELS;
use guest_api::{
    flow::TO_HOST,
    proto::{
        EvalReply, EvalRequest, LogChunk, LogsRequest, PingReply, PingRequest, QuiesceReply, QuiesceRequest,
        ReconfigureNetworkReply, ReconfigureNetworkRequest, WarmRequest, agent_client::AgentClient,
    },
    session::{self, Session},
};
use hyper_util::rt::TokioIo;
use identity::{ForkId, seal::SealKey};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    time::timeout,
};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

pub use copy::{CopyError, pack, unpack};
pub use exec::{Control, ExecOptions, ExecResult};
pub use forward::{NotATarget, PortIo, PortReceiver, PortSender, PortStream, Target};
pub use guest_api::flow::MAX_STREAMS;
pub use shared::Channels;

/// Most bytes of one message from the guest.
const MAX_MESSAGE: usize = 8 << 20;
/// How often a taken channel is tried again while the deadline lasts. Locks of other processes can not be waited for with
/// a deadline in any other way.
const RETRY: Duration = Duration::from_millis(20);
/// How long a stream that is not open-ended may stand still. A busy host and a large file take their time, but move.
pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(30);
/// Longest text of the guest that goes into an error.
const MAX_REASON: usize = 4000;

/// Why the agent could not be asked, or did not do what it was asked.
#[derive(Debug, Error)]
pub enum GuestError {
    /// Other processes use every channel.
    #[error(
        "all {CONTROL_CHANNELS} control channels of the sandbox are in use; end one of the commands that use them, or try again"
    )]
    Busy,
    /// The machine is not there.
    #[error("the sandbox does not run")]
    NotRunning,
    /// No answer in time.
    #[error("the sandbox did not answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// It answered at first, and then no byte moved for this long.
    #[error(
        "nothing came from or went to the sandbox for {} s; see whether it still answers with `offshoot ping FORK`",
        .0.as_secs()
    )]
    Stalled(Duration),
    /// The agent refused, or said that it failed; its reason is cleaned for a terminal.
    #[error("the sandbox refused: {0}")]
    Refused(String),
    /// Its workload does not run at the moment: it is being captured.
    #[error("the workload of the sandbox stands still at the moment ({0}); try again")]
    Held(String),
    /// What was to be connected to.
    #[error("{}", no_listener(*.0))]
    NoListener(Target),
    /// What was to be connected to is there, and takes nothing.
    #[error(
        "{0} of the sandbox does not take the connection: its queue is full; see what it says with `offshoot logs FORK`"
    )]
    NotTaken(Target),
    /// The connection failed.
    #[error("the connection to the sandbox failed: {0}")]
    Transport(String),
    /// This side's input or output failed.
    #[error("reading or writing on this side failed")]
    Local(#[from] io::Error),
}

fn no_listener(to: Target) -> String {
    match to {
        Target::Port(port) => format!("nothing listens on port {port} of the sandbox; see what it says with `offshoot logs FORK`"),
        Target::Identity => {
            "the template's recipe has no [identity], so its forks have no identity endpoint; docs/services.md says what it is".to_owned()
        }
    }
}

impl From<Status> for GuestError {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::Unavailable | Code::Cancelled | Code::DataLoss | Code::Unknown => {
                Self::Transport(clean(status.message()))
            }
            _ => Self::Refused(clean(status.message())),
        }
    }
}

/// A guest's text without what could disturb a terminal, and not too long.
pub(crate) fn clean(text: &str) -> String {
    text.chars().filter(|character| !character.is_control() || *character == '\n').take(MAX_REASON).collect()
}

/// A connection to a guest's agent. It holds one of the guest's channels until it is dropped. A clone uses the same one.
#[derive(Debug, Clone)]
pub struct GuestChannel {
    client: AgentClient<Channel>,
    lock: Arc<File>,
    /// Whether the connection is no more.
    gone: Arc<AtomicBool>,
}

/// A stream that says when it is given up.
#[derive(Debug)]
struct Watched {
    stream: Session,
    gone: Arc<AtomicBool>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Release);
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl GuestChannel {
    /// Connects through the sockets in the machine's directory `dir`: takes the first channel that nobody uses.
    ///
    /// # Errors
    /// [`GuestError::Busy`] if all are in use until `limit`, [`GuestError::NotRunning`], [`GuestError::Timeout`] if the agent does
    /// not answer.
    pub async fn connect(dir: &Path, limit: Duration) -> Result<Self, GuestError> {
        let deadline = Instant::now() + limit;
        let (number, lock) = loop {
            if let Some(taken) = free_channel(dir)? {
                break taken;
            }
            if Instant::now() + RETRY >= deadline {
                return Err(GuestError::Busy);
            }
            tokio::time::sleep(RETRY).await;
        };
        let stream = open_socket(dir, number).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        let stream = session::connect(stream, fresh_session()?, left).await.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => GuestError::Timeout(limit),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                GuestError::NotRunning
            }
            _ => GuestError::Transport(error.to_string()),
        })?;
        let gone = Arc::new(AtomicBool::new(false));
        let stream = Watched { stream, gone: Arc::clone(&gone) };
        let client = AgentClient::new(http2(stream, deadline, limit).await?).max_decoding_message_size(MAX_MESSAGE);
        Ok(Self { client, lock: Arc::new(lock), gone })
    }

    /// Who answers, and how it is.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn ping(&mut self) -> Result<PingReply, GuestError> {
        within(Duration::from_secs(30), self.client.ping(PingRequest {})).await
    }

    /// Starts what the recipe says, and waits until everything is ready. `progress` gets lines for people.
    ///
    /// # Errors
    /// [`GuestError`]; the reason has the last output of what failed.
    pub async fn warm(&mut self, request: WarmRequest, mut progress: impl FnMut(&str)) -> Result<(), GuestError> {
        // The agent keeps to the recipe's deadlines; this one is for an agent that does not.
        let limit = Duration::from_millis(u64::from(request.timeout_ms)) + Duration::from_secs(60);
        let warming = async {
            let mut events = self.client.warm(request).await?.into_inner();
            while let Some(event) = events.message().await? {
                if event.done {
                    return Ok(());
                }
                progress(&clean(&event.message));
            }
            Err(GuestError::Transport("the agent stopped in the middle of the warm-up".into()))
        };
        timeout(limit, warming).await.map_err(|_| GuestError::Timeout(limit))?
    }

    /// Freezes the workload and arms the mailboxes. With a key, secrets are sealed for it.
    ///
    /// # Errors
    /// [`GuestError`]; the workload runs on then.
    pub async fn quiesce(&mut self, seal_key: Option<SealKey>, limit: Duration) -> Result<QuiesceReply, GuestError> {
        let timeout_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let seal_key = seal_key.map(Vec::from).unwrap_or_default();
        within(limit + Duration::from_secs(10), self.client.quiesce(QuiesceRequest { timeout_ms, seal_key })).await
    }

    /// Configures the network of fork `id` (again) from the bytes of a network section.
    ///
    /// # Errors
    /// [`GuestError`]; it may be tried again.
    pub async fn reconfigure_network(
        &mut self,
        id: &ForkId,
        section: Vec<u8>,
        limit: Duration,
    ) -> Result<ReconfigureNetworkReply, GuestError> {
        let request = ReconfigureNetworkRequest { fork_id: id.to_string(), section };
        within(limit, self.client.reconfigure_network(request)).await
    }

    /// Runs a command as root without input, and throws its output away.
    ///
    /// # Errors
    /// [`GuestError`]. That the command failed is no error.
    pub async fn run_command(&mut self, argv: Vec<String>, limit: Duration) -> Result<ExecResult, GuestError> {
        let options = ExecOptions { argv, timeout: Some(limit), ..ExecOptions::default() };
        let (_, no_controls) = tokio::sync::mpsc::channel(1);
        self.exec(options, None::<tokio::io::Empty>, tokio::io::sink(), tokio::io::sink(), no_controls).await
    }

    /// Evaluates code in the warmed runtime. What went wrong in the code is in the reply.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn eval(&mut self, code: &str, limit: Duration) -> Result<EvalReply, GuestError> {
        let timeout_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let request = EvalRequest { code: code.to_owned(), timeout_ms };
        within(limit + Duration::from_secs(10), self.client.eval(request)).await
    }

    /// What services and the runtime wrote; with `follow` the stream goes on until it is dropped.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::Stalled`] if it does not begin.
    pub async fn logs(&mut self, follow: bool) -> Result<Logs, GuestError> {
        let begun = timeout(STALL_LIMIT, self.client.logs(LogsRequest { follow }));
        let chunks = begun.await.map_err(|_| GuestError::Stalled(STALL_LIMIT))??.into_inner();
        Ok(Logs { chunks, follow, _channel: self.clone() })
    }

    /// What a workload in the guest sees of itself, as JSON.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn facts(&mut self) -> Result<Vec<u8>, GuestError> {
        exec::collect(&mut self.client, guest_api::proto::exec_start::What::Facts(true), 64 * 1024).await
    }

    /// Whether the connection is no more: every request fails.
    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether somebody has a clone.
    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.lock) > 1
    }

    pub(crate) fn client(&mut self) -> &mut AgentClient<Channel> {
        &mut self.client
    }
}

/// What services and the runtime write, piece by piece.
#[derive(Debug)]
pub struct Logs {
    chunks: Streaming<LogChunk>,
    follow: bool,
    /// In use until here: nobody else may take it.
    _channel: GuestChannel,
}

impl Logs {
    /// The next piece; none at the end. One that is followed may be silent for ever.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::Stalled`] if one that is not followed does not go on.
    pub async fn next(&mut self) -> Result<Option<LogChunk>, GuestError> {
        if self.follow {
            return Ok(self.chunks.message().await?);
        }
        let next = timeout(STALL_LIMIT, self.chunks.message()).await;
        Ok(next.map_err(|_| GuestError::Stalled(STALL_LIMIT))??)
    }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, GuestError> {
    let reply = timeout(limit, call).await.map_err(|_| GuestError::Timeout(limit))?;
    Ok(reply?.into_inner())
}

/// How often the guest is asked for a sign of life while a channel is open, and how long it may take: a host that is
/// overloaded answers late.
const PING_EVERY: Duration = Duration::from_secs(15);
const PING_LIMIT: Duration = Duration::from_secs(45);

/// The first channel that no other process holds, with its lock.
pub(crate) fn free_channel(dir: &Path) -> Result<Option<(usize, File)>, GuestError> {
    for number in 0..CONTROL_CHANNELS {
        let path = dir.join(format!("ctl.{number}.lock"));
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
        let lock = match lock {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(GuestError::NotRunning),
            Err(error) => return Err(error.into()),
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some((number, lock))),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(GuestError::Local(error.into())),
        }
    }
    Ok(None)
}

async fn open_socket(dir: &Path, number: usize) -> Result<UnixStream, GuestError> {
    // Through a descriptor, because a socket's path has at most 107 bytes.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty()).map_err(io::Error::from)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/ctl.{number}.sock", dir.as_raw_fd()));
    UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => GuestError::NotRunning,
        _ => GuestError::Local(error),
    })
}

/// HTTP/2 over the session's one stream. No keep-alive: an idle guest must cost nothing.
async fn http2(stream: Watched, deadline: Instant, limit: Duration) -> Result<Channel, GuestError> {
    // A connector is asked for a stream each time a connection is wanted; there is one.
    let stream = Arc::new(Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_| {
        let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { taken.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    // Requests may take as long as they like; a guest that does not even answer a ping is not there any more.
    let endpoint = Endpoint::from_static("http://guest")
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_LIMIT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(TO_HOST.stream)
        .initial_connection_window_size(TO_HOST.channel);
    let left = deadline.saturating_duration_since(Instant::now());
    timeout(left, endpoint.connect_with_connector(connector))
        .await
        .map_err(|_| GuestError::Timeout(limit))?
        .map_err(|error| GuestError::Transport(with_causes(&error)))
}

/// An error with its causes; alone it says no more than that something failed.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn fresh_session() -> Result<u64, GuestError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| GuestError::Local(io::Error::other(error.to_string())))?;
    Ok(u64::from_le_bytes(bytes))
}
