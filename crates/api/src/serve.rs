//! The daemon's life: one for each state directory, listening, ending without ending forks.

use std::{
    fs::{self, File, OpenOptions},
    io,
    net::SocketAddr,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::{Duration, Instant},
};

use axum::{Extension, Router};
use engine::ProcessRef;
use host::{Home, codes::Coded, guest::Channels};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use store::Store;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore, watch as flag},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::{
    App, Scope, Tokens, audit::Audit, auth::Peer, auth::Rates, events::Hub, jobs::Jobs, keys::Keys, metrics::Metrics,
    recovery, routes, traces::Traces, watch, wire::STALL_LIMIT, wire::Wire, work::Work,
};

/// Time for a client to send a request's head, and to finish a TLS handshake.
const HEAD_LIMIT: Duration = Duration::from_secs(15);
/// Most connections at once by each door; more wait. Who fills one of them leaves the other open.
const MOST_CONNECTIONS: u32 = 1024;
/// How often old keys are removed.
const SWEEP: Duration = Duration::from_secs(3600);
/// Open files: connections of both doors, and a few for each of some thousand forks.
const MOST_FILES: u64 = 65_536;
/// A connection that could not be taken: mostly too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Certificate and key, PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate and those between it and the root.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A TCP address to listen on.
#[derive(Debug, Clone)]
pub struct Listen {
    /// Where.
    pub address: SocketAddr,
    /// With what; without it only on loopback.
    pub tls: Option<TlsFiles>,
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directories.
    pub home: Home,
    /// The unix socket.
    pub socket: PathBuf,
    /// Its permission bits.
    pub socket_mode: u32,
    /// What local users other than the daemon's own, and root, may do.
    pub socket_scope: Scope,
    /// TCP besides.
    pub listen: Option<Listen>,
    /// Requests per second of one token, or of one local user other than its own and root; twice as many may come at once.
    pub rate: u32,
    /// A folder of recipes, each in a folder of its own name.
    pub recipes: Option<PathBuf>,
    /// This program: it waits for networks, in processes of its own.
    pub program: PathBuf,
    /// How long requests may go on once the daemon is asked to end.
    pub grace: Duration,
}

/// Why the daemon does not serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// There is one already.
    #[error("another daemon serves this state directory (process {0}); end it first, or set OFFSHOOT_STATE_DIR")]
    AlreadyServed(String),
    /// A file or directory.
    #[error("{what} {path} failed")]
    File {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket's place is taken by something else.
    #[error("{0} is there and is no socket; choose another place with --socket")]
    NoSocket(PathBuf),
    /// The address.
    #[error("{address} can not be listened on")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// TCP without TLS.
    #[error(
        "{0} can be reached from elsewhere, so it needs TLS: give --tls-cert and --tls-key, or listen on 127.0.0.1"
    )]
    NoTls(SocketAddr),
    /// The certificate or key.
    #[error("the certificate {certificate} and the key {key} can not be used: {reason}")]
    Tls {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why.
        reason: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] store::StoreError),
    /// The tokens.
    #[error(transparent)]
    Tokens(#[from] crate::TokenError),
    /// What the daemon needs of the system.
    #[error("{what} failed")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Coded for ServeError {
    fn code(&self) -> &'static str {
        match self {
            Self::AlreadyServed(_) => "already_served",
            Self::File { .. } => "directory_unusable",
            Self::NoSocket(_) => "socket_path_taken",
            Self::Listen { .. } => "listen_failed",
            Self::NoTls(_) => "tls_needed",
            Self::Tls { .. } => "tls_unusable",
            Self::Store(error) => error.code(),
            Self::Tokens(error) => error.code(),
            Self::System { .. } => "serve_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::NoTls(_) | Self::NoSocket(_))
    }
}

/// Where the daemon of this home listens if nobody says otherwise.
#[must_use]
pub fn socket_path(home: &Home) -> PathBuf {
    home.state.join("api").join("offshoot.sock")
}

/// Serves until `end` is there, and then until the requests that are being worked on are answered, or `grace` is over. Forks live on. `ready` is
/// called once, with what was found at the start, when requests are taken.
///
/// # Errors
/// [`ServeError`]; nothing is left listening.
pub async fn serve(config: Config, end: impl Future<Output = ()>, ready: impl FnOnce(&str)) -> Result<(), ServeError> {
    serve_many(config, MOST_CONNECTIONS, end, ready).await
}

/// The same, with so many connections at once by each door.
async fn serve_many(
    config: Config,
    most: u32,
    end: impl Future<Output = ()>,
    ready: impl FnOnce(&str),
) -> Result<(), ServeError> {
    let home = config.home.clone();
    let dir = home.state.join("api");
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|source| ServeError::File { what: "making the directory", path: dir.clone(), source })?;
    let lock = only_one(&dir)?;
    // With fewer it serves fewer, and says so when they are used up.
    if let Err(error) = allow_files() {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    let store = Store::open(&home.data)?;

    let hub = Arc::new(Hub::new());
    let system = |what| move |source| ServeError::System { what, source };
    let recovered = recovery::recover(&home, &store, &hub).map_err(system("looking for what a crash left behind"))?;
    let forks = Arc::new(watch::Forks::new(&home));
    let waker = watch::Waker::new().map_err(system("starting the watch"))?;
    watch::start(&home, store.clone(), Arc::clone(&forks), Arc::clone(&hub), waker.clone())
        .map_err(system("starting the watch"))?;
    let (ending, is_ending) = flag::channel(false);
    let app = Arc::new(app(&config, store, hub, forks, waker, is_ending.clone())?);
    let service = routes::service(&app);

    let tcp = match &config.listen {
        None => None,
        Some(listen) => Some((bind(listen).await?, tls(listen)?)),
    };
    let unix = bind_unix(&config.socket, config.socket_mode)?;
    let seats = [(); 2].map(|()| Arc::new(Semaphore::new(most as usize)));
    let [unix_seats, tcp_seats] = &seats;
    tokio::spawn(sweep(Arc::clone(&app)));
    ready(&format!(
        "listening on {}{}; {} running, {} removed that a crash left behind{}{}",
        config.socket.display(),
        // Not what was asked for: port 0 is any that is free.
        tcp.as_ref()
            .and_then(|(listener, _)| listener.local_addr().ok())
            .map_or_else(String::new, |address| format!(" and {address}")),
        recovered.adopted,
        recovered.reaped,
        if recovered.left > 0 { format!(", {} could not be removed", recovered.left) } else { String::new() },
        match recovered.unclear {
            0 => String::new(),
            count => format!(", {count} left alone whose records can not be read: see `offshoot cleanup`"),
        },
    ));
    notify("READY=1");

    tokio::pin!(end);
    loop {
        let accepted = tokio::select! {
            () = &mut end => break,
            accepted = take_unix(&unix, unix_seats) => accepted,
            accepted = take_tcp(tcp.as_ref(), tcp_seats) => accepted,
        };
        match accepted {
            Ok(accepted) => accepted.serve(&service, &is_ending),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    notify("STOPPING=1");
    // Streams end by themselves now; nothing new is taken.
    let _ = ending.send(true);
    drop(unix);
    drop(tcp);
    // The socket's file goes while the lock is held: it is still ours.
    let _ = fs::remove_file(&config.socket);
    if tokio::time::timeout(config.grace, all_done(&seats, most)).await.is_err() {
        tracing::warn!("requests are still being worked on; what they have not finished is undone");
    }
    app.traces.end();
    drop(lock);
    Ok(())
}

/// What all requests share.
pub(crate) fn app(
    config: &Config,
    store: Store,
    hub: Arc<Hub>,
    forks: Arc<watch::Forks>,
    waker: watch::Waker,
    ending: flag::Receiver<bool>,
) -> Result<App, ServeError> {
    let home = config.home.clone();
    let system = |what| move |source| ServeError::System { what, source };
    Ok(App {
        tokens: Tokens::open(&home.data)?,
        rates: Rates::new(config.rate),
        audit: Audit::open(&home.data).map_err(system("opening the audit"))?,
        jobs: Jobs::open(&home.state, Arc::clone(&hub)).map_err(system("reading the jobs"))?,
        keys: Keys::open(&home.state).map_err(system("reading the keys"))?,
        metrics: Metrics::new(),
        traces: Traces::from_env(),
        program: config.program.clone(),
        recipes: config.recipes.clone(),
        socket_scope: config.socket_scope,
        requests: AtomicU64::new(0),
        ending,
        home,
        store,
        hub,
        forks,
        waker,
        channels: Channels::default(),
        work: Work::new(),
        readiness: routes::Readiness::default(),
    })
}

/// How long the lock of a daemon that is dead is waited for: a process that it had just forked has the file as well, until it executes its program.
const ORPHAN_LIMIT: Duration = Duration::from_secs(10);

/// Held as long as the daemon lives.
fn only_one(dir: &Path) -> Result<File, ServeError> {
    let path = dir.join("lock");
    let failed = |source| ServeError::File { what: "locking", path: path.clone(), source };
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    let deadline = Instant::now() + ORPHAN_LIMIT;
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        io::Seek::rewind(&mut lock).map_err(failed)?;
        let _ = io::Read::read_to_string(&mut io::Read::take(&mut lock, 32), &mut holder);
        let holder: String = holder.trim().chars().filter(char::is_ascii_digit).collect();
        let lives = holder.parse().is_ok_and(|pid| ProcessRef::of(pid).is_ok_and(|process| process.is_alive()));
        if lives || Instant::now() >= deadline {
            return Err(ServeError::AlreadyServed(holder));
        }
        // There is no waiting for it with a deadline.
        thread::sleep(Duration::from_millis(5));
    }
    io::Seek::rewind(&mut lock).map_err(failed)?;
    lock.set_len(0).map_err(failed)?;
    io::Write::write_all(&mut lock, std::process::id().to_string().as_bytes()).map_err(failed)?;
    Ok(lock)
}

fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener, ServeError> {
    let failed = |what| move |source| ServeError::File { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        // Nobody listens on it: there is one daemon, and this is it.
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).map_err(failed("removing the old socket"))?
        }
        Ok(_) => return Err(ServeError::NoSocket(path.to_owned())),
        Err(_) => {}
    }
    // Bound under another name and renamed, so that nobody reaches it before it has its permissions. Through a descriptor: a socket's path has at
    // most 107 bytes.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let opened = File::open(dir).map_err(failed("opening the directory of"))?;
    let name = format!(".{}.new", std::process::id());
    let short = PathBuf::from(format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&opened.as_fd())));
    let _ = fs::remove_file(&short);
    let listener = UnixListener::bind(&short).map_err(failed("binding"))?;
    fs::set_permissions(&short, fs::Permissions::from_mode(mode)).map_err(failed("setting the permissions of"))?;
    fs::rename(dir.join(name), path).map_err(failed("making"))?;
    Ok(listener)
}

async fn bind(listen: &Listen) -> Result<TcpListener, ServeError> {
    if listen.tls.is_none() && !listen.address.ip().is_loopback() {
        return Err(ServeError::NoTls(listen.address));
    }
    TcpListener::bind(listen.address).await.map_err(|source| ServeError::Listen { address: listen.address, source })
}

fn tls(listen: &Listen) -> Result<Option<TlsAcceptor>, ServeError> {
    let Some(files) = &listen.tls else { return Ok(None) };
    let unusable =
        |reason: String| ServeError::Tls { certificate: files.certificate.clone(), key: files.key.clone(), reason };
    let chain = CertificateDer::pem_file_iter(&files.certificate).map_err(|error| unusable(error.to_string()))?;
    let chain: Vec<_> = chain.collect::<Result<_, _>>().map_err(|error| unusable(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| unusable(error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| unusable(error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// A connection that was taken.
struct Accepted {
    stream: Stream,
    peer: Peer,
    seat: OwnedSemaphorePermit,
}

enum Stream {
    Unix(tokio::net::UnixStream),
    Tcp(tokio::net::TcpStream),
    Tls(tokio::net::TcpStream, TlsAcceptor),
}

async fn take_unix(listener: &UnixListener, seats: &Arc<Semaphore>) -> io::Result<Accepted> {
    let seat = Arc::clone(seats).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    let uid = stream.peer_cred()?.uid();
    Ok(Accepted { stream: Stream::Unix(stream), peer: Peer::Unix { uid }, seat })
}

async fn take_tcp(
    listener: Option<&(TcpListener, Option<TlsAcceptor>)>,
    seats: &Arc<Semaphore>,
) -> io::Result<Accepted> {
    let Some((listener, tls)) = listener else { return std::future::pending().await };
    let seat = Arc::clone(seats).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    stream.set_nodelay(true)?;
    let stream = match tls {
        None => Stream::Tcp(stream),
        Some(tls) => Stream::Tls(stream, tls.clone()),
    };
    Ok(Accepted { stream, peer: Peer::Tcp(address), seat })
}

impl Accepted {
    /// In a task of its own.
    fn serve(self, service: &Router, ending: &flag::Receiver<bool>) {
        let Self { stream, peer, seat } = self;
        let service = service.clone().layer(Extension(peer));
        let ending = ending.clone();
        tokio::spawn(async move {
            match stream {
                Stream::Unix(stream) => talk(Wire::new(stream, seat, STALL_LIMIT), service, ending).await,
                Stream::Tcp(stream) => talk(Wire::new(stream, seat, STALL_LIMIT), service, ending).await,
                Stream::Tls(stream, tls) => {
                    if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_LIMIT, tls.accept(stream)).await {
                        talk(Wire::new(stream, seat, STALL_LIMIT), service, ending).await;
                    }
                }
            }
        });
    }
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    wire: Wire<S>,
    service: Router,
    mut ending: flag::Receiver<bool>,
) {
    let patience = wire.patience();
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(wire), TowerToHyperService::new(service))
        .with_upgrades();
    tokio::pin!(connection);
    // A client that goes away, or talks nonsense, is no news.
    let ended = tokio::select! {
        _ = &mut connection => true,
        _ = ending.wait_for(|ending| *ending) => false,
    };
    if !ended {
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
    // If it is there still, it has become a WebSocket.
    patience.begin();
}

/// Every seat is free: no connection is left.
async fn all_done(seats: &[Arc<Semaphore>], most: u32) {
    for door in seats {
        let _ = door.acquire_many(most).await;
    }
}

/// Removes old keys now and then, as long as the daemon lives.
async fn sweep(app: Arc<App>) {
    let mut ending = app.ending.clone();
    loop {
        tokio::select! {
            () = tokio::time::sleep(SWEEP) => {}
            _ = ending.wait_for(|ending| *ending) => return,
        }
        let swept = Arc::clone(&app);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || swept.keys.sweep()).await {
            tracing::warn!(%error, "old keys could not be removed");
        }
    }
}

/// Lets this process have as many files open as it may need, as far as the system lets it.
fn allow_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(MOST_FILES, |most| most.min(MOST_FILES));
    if limit.current.is_some_and(|current| current < wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum })?;
    }
    Ok(())
}

/// Tells systemd, if it started this (sd_notify).
fn notify(what: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || -> io::Result<()> {
        let socket = std::os::unix::net::UnixDatagram::unbound()?;
        let text = path.to_string_lossy();
        match text.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(what.as_bytes(), &address)?;
            }
            None => {
                socket.send_to(what.as_bytes(), Path::new(&path))?;
            }
        }
        Ok(())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "systemd could not be told");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use axum::{extract::ws::WebSocketUpgrade, routing::get};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpStream, UnixStream},
        sync::oneshot,
    };

    use super::*;
    use crate::tests::config;

    async fn asked(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> String {
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[test]
    fn o2_the_lock_of_a_dead_daemon_is_waited_for_and_that_of_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let held = only_one(dir.path()).unwrap();
        let begun = Instant::now();
        let refused = only_one(dir.path()).unwrap_err();
        assert!(matches!(refused, ServeError::AlreadyServed(pid) if pid == std::process::id().to_string()));
        assert!(begun.elapsed() < ORPHAN_LIMIT);
        // A process of its own has the file for a moment longer.
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        let _ = dead.wait().unwrap();
        fs::write(dir.path().join("lock"), dead.id().to_string()).unwrap();
        let (tried, waits) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let next = scope.spawn(|| {
                tried.send(()).unwrap();
                only_one(dir.path())
            });
            waits.recv().unwrap();
            // Long enough for it to be tried, and refused if it were not waited for.
            thread::sleep(Duration::from_millis(200));
            drop(held);
            assert!(next.join().unwrap().is_ok());
        });
        assert_eq!(fs::read_to_string(dir.path().join("lock")).unwrap(), std::process::id().to_string());
    }

    #[tokio::test]
    async fn o1_who_takes_all_seats_of_one_door_leaves_the_other_open() {
        let dir = tempfile::tempdir().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = Config { listen: Some(Listen { address, tls: None }), ..config(dir.path()) };
        let socket = config.socket.clone();
        let (end, ended) = oneshot::channel::<()>();
        let (ready, is_ready) = oneshot::channel::<String>();
        let serving = tokio::spawn(serve_many(config, 2, async { drop(ended.await) }, move |text| {
            drop(ready.send(text.to_owned()))
        }));
        let said = is_ready.await.unwrap();
        let place = said.split_once(" and ").unwrap().1.split_once(';').unwrap().0.to_owned();
        let holders = [TcpStream::connect(&place).await.unwrap(), TcpStream::connect(&place).await.unwrap()];
        let waiting = tokio::spawn(asked(TcpStream::connect(&place).await.unwrap()));
        for _ in 0..3 {
            assert!(asked(UnixStream::connect(&socket).await.unwrap()).await.starts_with("HTTP/1.0 200"));
        }
        assert!(!waiting.is_finished());
        drop(holders);
        assert!(waiting.await.unwrap().starts_with("HTTP/1.0 200"));
        end.send(()).unwrap();
        serving.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn o1_a_websocket_keeps_its_seat_until_it_is_closed() {
        let upgrade = |upgrade: WebSocketUpgrade| async {
            upgrade.on_upgrade(|mut socket| async move { while socket.recv().await.is_some() {} })
        };
        let service = Router::new().route("/", get(upgrade));
        let seats = Arc::new(Semaphore::new(1));
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (_end, ending) = flag::channel(false);
        let wire = Wire::new(ours, Arc::clone(&seats).try_acquire_owned().unwrap(), STALL_LIMIT);
        let talking = tokio::spawn(talk(wire, service, ending));
        let head = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
            Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
        theirs.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        let _ = theirs.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 101");
        talking.await.unwrap();
        assert_eq!(seats.available_permits(), 0);
        drop(theirs);
        let _free = seats.acquire().await.unwrap();
    }
}
