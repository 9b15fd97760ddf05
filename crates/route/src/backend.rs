//! The fork's side: one client for each machine of a fork, over its control channel. A connection that is kept can be used for no other fork, because it
//! is its own fork's client that keeps it.

use std::{
    collections::HashMap,
    error::Error as _,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use host::{
    ForkRecord, Home,
    guest::{Channels, GuestError, MAX_STREAMS, PortIo},
};
use hyper::{HeaderMap, Method, Request, Response, Uri, body::Incoming, http::uri::PathAndQuery};
use hyper_util::{
    client::legacy::{Client, Error},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use identity::ForkId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::Service;

use crate::proxy::Upload;

/// Time for a fork's agent to answer: it may have to be read in from disk on a busy machine.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// How long a connection is kept that nobody uses: less than the 5 s after which common servers end it.
const KEEP: Duration = Duration::from_secs(4);
/// Most connections that are kept to one port.
const MOST_KEPT: usize = 64;
/// Most bytes of an answer's head.
const MAX_HEAD: usize = 128 << 10;
/// How often clients of machines that have ended are given up.
pub(crate) const SWEEP: Duration = Duration::from_secs(10);

/// A machine of a fork: one that came back from standby is another.
type Machine = (ForkId, u32, u64);

/// A request as it goes to a fork, as often as it takes.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) upload: Upload,
}

/// Clients by machine.
#[derive(Debug)]
pub(crate) struct Backends {
    home: Arc<Home>,
    channels: Channels,
    clients: Mutex<HashMap<Machine, Arc<Backend>>>,
    /// Most requests that one has at once.
    places: usize,
}

/// One machine's.
#[derive(Debug)]
pub(crate) struct Backend {
    record: Arc<ForkRecord>,
    /// Connections that it is done with are kept for a while.
    kept: Client<Dial, Upload>,
    /// Each request has one of its own.
    fresh: Client<Dial, Upload>,
    places: Arc<Semaphore>,
}

/// A place among the requests that a fork has at once. It is given back once the answer is over.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Backends {
    /// A fork has at most so many requests at once, and no more than its channel has room for beside connections that are kept.
    pub(crate) fn new(home: &Home, most: usize) -> Self {
        let room = usize::try_from(MAX_STREAMS).unwrap_or(usize::MAX).saturating_sub(MOST_KEPT);
        let places = most.min(room);
        Self { home: Arc::new(home.clone()), channels: Channels::default(), clients: Mutex::default(), places }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<Machine, Arc<Backend>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client of a fork that runs.
    pub(crate) fn of(&self, record: &Arc<ForkRecord>) -> Arc<Backend> {
        let machine = (record.id.clone(), record.process.pid, record.process.start_time);
        let mut clients = self.clients();
        Arc::clone(clients.entry(machine).or_insert_with(|| {
            let dial =
                Dial { home: Arc::clone(&self.home), channels: self.channels.clone(), record: Arc::clone(record) };
            let builder = || {
                let mut builder = Client::builder(TokioExecutor::new());
                builder
                    .pool_timer(TokioTimer::new())
                    .pool_idle_timeout(KEEP)
                    .set_host(false)
                    .http1_max_buf_size(MAX_HEAD);
                builder
            };
            Arc::new(Backend {
                record: Arc::clone(record),
                kept: builder().pool_max_idle_per_host(MOST_KEPT).build(dial.clone()),
                fresh: builder().pool_max_idle_per_host(0).build(dial),
                places: Arc::new(Semaphore::new(self.places)),
            })
        }))
    }

    /// Gives up those whose machines have ended.
    pub(crate) fn sweep(&self) {
        self.clients().retain(|_, backend| backend.record.process.is_alive());
    }
}

impl Backend {
    /// A place for one more request, if there is one.
    pub(crate) fn place(&self) -> Option<Place> {
        Arc::clone(&self.places).try_acquire_owned().ok().map(|permit| Place { _permit: permit })
    }

    /// Sends a request. On a kept connection only what may be sent twice: the program may end it at the same moment.
    pub(crate) async fn send(&self, port: u16, outgoing: &Outgoing, fresh: bool) -> Result<Response<Incoming>, Error> {
        if outgoing.method.is_safe() && outgoing.upload.is_empty() && !fresh {
            match ask(&self.kept, port, outgoing).await {
                Err(error) if went_away(&error) => {}
                answer => return answer,
            }
        }
        ask(&self.fresh, port, outgoing).await
    }
}

async fn ask(client: &Client<Dial, Upload>, port: u16, outgoing: &Outgoing) -> Result<Response<Incoming>, Error> {
    let mut request = Request::new(outgoing.upload.clone());
    *request.method_mut() = outgoing.method.clone();
    *request.headers_mut() = outgoing.headers.clone();
    // Of the authority only the port is used: the client is one fork's.
    let uri = Uri::builder().scheme("http").authority(format!("fork:{port}")).path_and_query(outgoing.path.clone());
    *request.uri_mut() = uri.build().unwrap_or_default();
    client.request(request).await
}

/// Why there was no connection, if that is why: nothing was sent then.
pub(crate) fn not_connected(error: &Error) -> Option<&GuestError> {
    error.source().filter(|_| error.is_connect())?.downcast_ref()
}

/// Whether the connection ended without an answer.
fn went_away(error: &Error) -> bool {
    let mut causes = std::iter::successors(error.source(), |&error| error.source());
    causes.any(|cause| {
        cause.is::<io::Error>()
            || cause
                .downcast_ref::<hyper::Error>()
                .is_some_and(|error| error.is_incomplete_message() || error.is_closed() || error.is_canceled())
    })
}

/// Connects to ports of one fork.
#[derive(Debug, Clone)]
struct Dial {
    home: Arc<Home>,
    channels: Channels,
    record: Arc<ForkRecord>,
}

impl Service<Uri> for Dial {
    type Response = TokioIo<PortIo>;
    type Error = GuestError;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<PortIo>, GuestError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), GuestError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dial = self.clone();
        Box::pin(async move {
            let channel = dial.channels.get(&dial.home, &dial.record, CONNECT_LIMIT).await?;
            let stream = channel.forward(uri.port_u16().unwrap_or(80)).await?;
            Ok(TokioIo::new(stream.into_io()))
        })
    }
}
