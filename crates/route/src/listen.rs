//! The router's life: it listens, gives each connection a seat, and ends without breaking off what it has begun.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use host::{Home, codes::Coded};
use hyper::{Request, body::Incoming, header::HOST, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use identity::ForkName;
use rustix::{
    net::sockopt::{set_socket_keepalive, set_socket_linger, set_tcp_keepidle, set_tcp_keepintvl},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use serde::Serialize;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{interval, sleep, timeout},
};

use crate::{
    backend::{self, Backends},
    hold::Hold,
    name::Suffix,
    proxy,
};

/// Time for a client to send a request's head; so also how long a connection may be idle.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of a request's head.
const MAX_HEAD: usize = 64 << 10;
/// Connections over the limit that are told so at once; others are closed.
const EXTRA: usize = 64;
/// Time for one of these to ask.
const EXTRA_LIMIT: Duration = Duration::from_secs(5);
/// A connection that could not be taken: mostly too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client that is silent is asked for a sign of life after this time, and then this often.
const ALIVE_AFTER: Duration = Duration::from_secs(60);
const ALIVE_EVERY: Duration = Duration::from_secs(15);
/// Files that the router needs besides its connections.
const OTHER_FILES: u64 = 256;

/// How to route.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directories.
    pub home: Home,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Whether that may be reached from elsewhere.
    pub allow_remote: bool,
    /// The domain below which names are forks'.
    pub suffix: Suffix,
    /// The port of a fork where the name says none.
    pub port: u16,
    /// How long a request waits for a fork that does not run as itself yet.
    pub hold: Duration,
    /// How long the head of an answer may take since the fork was sent the last piece of its request; as long as it likes without.
    pub answer_timeout: Option<Duration>,
    /// Most connections at once. A fork has at most half as many requests at once.
    pub max_connections: usize,
    /// How long requests may go on once the router is asked to end.
    pub grace: Duration,
}

/// Why there is no router.
#[derive(Debug, Error)]
pub enum RouteError {
    /// From elsewhere, and not asked for.
    #[error(
        "{0} can be reached from elsewhere, and who reaches it reaches every port of every fork: listen on 127.0.0.1, or say --allow-remote"
    )]
    NotLoopback(SocketAddr),
    /// The address.
    #[error("{address} can not be listened on")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state directory.
    #[error("the forks can not be watched")]
    Watch(#[source] io::Error),
}

impl Coded for RouteError {
    fn code(&self) -> &'static str {
        match self {
            Self::NotLoopback(_) => "listen_not_loopback",
            Self::Listen { .. } => "listen_failed",
            Self::Watch(_) => "state_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::NotLoopback(_))
    }

    fn next(&self) -> Option<String> {
        matches!(self, Self::Watch(_)).then(|| "offshoot doctor".into())
    }
}

/// What became of a request.
#[derive(Debug, Clone, Serialize)]
pub struct Access {
    /// When it came, in milliseconds since the epoch.
    pub at_ms: u64,
    /// Who asked.
    pub client: SocketAddr,
    /// The method.
    pub method: String,
    /// The host as it was given.
    pub host: String,
    /// The path, without the query.
    pub path: String,
    /// The fork that was asked for.
    pub fork: Option<ForkName>,
    /// The port of it.
    pub port: Option<u16>,
    /// The status of the answer.
    pub status: u16,
    /// Why it was refused, if the router did.
    pub code: Option<&'static str>,
    /// From the request's head to the answer's, in microseconds.
    pub micros: u64,
}

impl Access {
    pub(crate) fn of(client: SocketAddr, request: &Request<Incoming>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let host = request.headers().get(HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        Self {
            at_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            client,
            method: request.method().to_string(),
            host: host.unwrap_or_default(),
            path: request.uri().path().to_owned(),
            fork: None,
            port: None,
            status: 0,
            code: None,
            micros: 0,
        }
    }
}

/// Who is told of each request.
pub type Log = Box<dyn Fn(&Access) + Send + Sync>;

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) hold: Hold,
    pub(crate) backends: Backends,
    log: Option<Log>,
    ending: watch::Receiver<bool>,
}

impl Shared {
    /// Returns once the router is to end.
    pub(crate) async fn is_ending(&self) {
        let mut ending = self.ending.clone();
        // Nobody can ask for it any more: then it has ended.
        let _ = ending.wait_for(|ending| *ending).await;
    }

    pub(crate) fn log(&self, access: &Access) {
        if let Some(log) = &self.log {
            log(access);
        }
    }
}

/// A place among the connections. It is given back once nothing of the connection is left.
#[derive(Debug)]
pub(crate) struct Seat {
    _permit: OwnedSemaphorePermit,
    extra: bool,
    broken: AtomicBool,
}

impl Seat {
    /// Whether it is one too many.
    pub(crate) fn is_extra(&self) -> bool {
        self.extra
    }

    /// The client will see that its connection broke, and not take it for the end of what was sent.
    pub(crate) fn break_off(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }
}

/// A router that listens.
pub struct Router {
    shared: Arc<Shared>,
    listener: TcpListener,
    end: watch::Sender<bool>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

impl Router {
    /// Listens. Nothing is answered before [`Router::serve`]. `log` is told of each request. Needs a runtime.
    ///
    /// # Errors
    /// [`RouteError`].
    pub async fn bind(config: Config, log: Option<Log>) -> Result<Self, RouteError> {
        let address = config.listen;
        if !config.allow_remote && !address.ip().is_loopback() {
            return Err(RouteError::NotLoopback(address));
        }
        let hold = Hold::begin(&config.home, share_of(config.max_connections)).map_err(RouteError::Watch)?;
        let listener = TcpListener::bind(address).await.map_err(|source| RouteError::Listen { address, source })?;
        let (end, ending) = watch::channel(false);
        let backends = Backends::new(&config.home, share_of(config.max_connections));
        let shared = Arc::new(Shared { hold, backends, config, log, ending });
        Ok(Self { shared, listener, end })
    }

    /// Where it listens: not what was asked for, if that was any port.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `end` is there, and then until the requests that are being worked on are answered, or the grace is over. WebSockets
    /// and requests that wait end at once.
    pub async fn serve(self, end: impl Future<Output = ()>) {
        let Self { shared, listener, end: ending } = self;
        let most = shared.config.max_connections;
        let _ = allow_files(most);
        let (seats, extras) = (Arc::new(Semaphore::new(most)), Arc::new(Semaphore::new(EXTRA)));
        let accepting = async {
            let mut sweep = interval(backend::SWEEP);
            loop {
                let taken = tokio::select! {
                    taken = listener.accept() => taken,
                    _ = sweep.tick() => {
                        shared.backends.sweep();
                        continue;
                    }
                };
                let Ok((stream, client)) = taken else {
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                let (permit, extra) = match Arc::clone(&seats).try_acquire_owned() {
                    Ok(permit) => (permit, false),
                    Err(_) => match Arc::clone(&extras).try_acquire_owned() {
                        Ok(permit) => (permit, true),
                        // It is closed without a word.
                        Err(_) => continue,
                    },
                };
                let seat = Arc::new(Seat { _permit: permit, extra, broken: AtomicBool::new(false) });
                tokio::spawn(talk(Arc::clone(&shared), seat, stream, client));
            }
        };
        tokio::select! {
            () = accepting => {}
            () = end => {}
        }
        drop(listener);
        let _ = ending.send(true);
        let all = u32::try_from(most).unwrap_or(u32::MAX);
        // What is not done by then is broken off.
        let _ = timeout(shared.config.grace, seats.acquire_many(all)).await;
    }
}

/// What one fork may have of the router's connections: the others have the rest.
fn share_of(connections: usize) -> usize {
    connections.div_ceil(2)
}

/// One connection of a client.
async fn talk(shared: Arc<Shared>, seat: Arc<Seat>, stream: TcpStream, client: SocketAddr) {
    // A connection is as good without these.
    let _ = stream.set_nodelay(true);
    let _ = set_socket_keepalive(&stream, true);
    let _ = set_tcp_keepidle(&stream, ALIVE_AFTER).and_then(|()| set_tcp_keepintvl(&stream, ALIVE_EVERY));
    let wire = Wire { stream, seat: Arc::clone(&seat) };
    let extra = seat.is_extra();
    let router = Arc::clone(&shared);
    let service = service_fn(move |request| {
        let (router, seat) = (Arc::clone(&router), Arc::clone(&seat));
        async move { Ok::<_, std::convert::Infallible>(proxy::answer(&router, &seat, client, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(if extra { EXTRA_LIMIT } else { HEAD_LIMIT })
        .keep_alive(!extra)
        .max_buf_size(MAX_HEAD)
        // A client that has said all it has to say still gets its answer.
        .half_close(true)
        .serve_connection(TokioIo::new(wire), service)
        .with_upgrades();
    tokio::pin!(connection);
    // A client that goes away, or talks nonsense, is no news.
    tokio::select! {
        _ = &mut connection => return,
        () = shared.is_ending() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// Lets this process have as many files open as the connections need, as far as the system lets it.
fn allow_files(connections: usize) -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = u64::try_from(connections).unwrap_or(u64::MAX).saturating_add(OTHER_FILES);
    let wanted = limit.maximum.map_or(wanted, |most| most.min(wanted));
    if limit.current.is_some_and(|current| current < wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum })?;
    }
    Ok(())
}

/// A client's connection, which is closed as it deserves.
#[derive(Debug)]
struct Wire {
    stream: TcpStream,
    seat: Arc<Seat>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.seat.broken.load(Ordering::Relaxed) {
            // Else it is closed in the ordinary way.
            let _ = set_socket_linger(&self.stream, Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
