//! One request: whose it is, whether that fork runs as itself, and the way there and back.

use std::{
    fmt,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use host::{guest::GuestError, standing::Standing};
use http_body_util::{Either, Full};
use hyper::{
    Method, Request, Response, StatusCode, Version,
    body::{Body, Bytes, Frame, Incoming, SizeHint},
    header::{HOST, HeaderValue, TRANSFER_ENCODING},
    http::uri::PathAndQuery,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional_with_sizes},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    backend::{Outgoing, Place, not_connected},
    headers,
    listen::{Access, Seat, Shared},
    name::{HostError, Target},
    refusal::Refusal,
};

/// Bytes on their way in each direction of a WebSocket.
const PIECE: usize = 32 << 10;
/// How soon a fork that could not be asked, though it seemed to run, is looked at again: its machine may have ended a moment ago.
const SOON: Duration = Duration::from_millis(50);
/// How often.
const TRIES: usize = 3;

/// An answer's body: the fork's, or ours.
pub(crate) type Answer = Response<Either<Download, Full<Bytes>>>;

/// Answers a request of `client`.
pub(crate) async fn answer(
    router: &Arc<Shared>,
    seat: &Arc<Seat>,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Answer {
    let begun = std::time::Instant::now();
    let mut access = Access::of(client, &request);
    let answered =
        if seat.is_extra() { Err(Refusal::Full) } else { forward(router, seat, client, request, &mut access).await };
    let answer = answered.unwrap_or_else(|refusal| {
        access.code = Some(refusal.code());
        refusal.to_response().map(Either::Right)
    });
    access.status = answer.status().as_u16();
    access.micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    router.log(&access);
    answer
}

async fn forward(
    router: &Arc<Shared>,
    seat: &Arc<Seat>,
    client: SocketAddr,
    mut request: Request<Incoming>,
    access: &mut Access,
) -> Result<Answer, Refusal> {
    if *request.method() == Method::CONNECT {
        return Err(Refusal::Connect);
    }
    let host = host_of(router, &request)?;
    let Target { fork, port: named } = Target::parse(host.to_str().unwrap_or_default(), &router.config.suffix)?;
    let port = named.unwrap_or(router.config.port);
    access.fork = Some(fork.clone());
    access.port = Some(port);

    let websocket = *request.method() == Method::GET
        && request.body().is_end_stream()
        && request.version() == Version::HTTP_11
        && headers::is_websocket(request.headers());
    let from_client = websocket.then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let upload = Upload::new(body);
    let mut headers = parts.headers;
    headers::strip(&mut headers);
    headers::set_forwarded(&mut headers, client.ip(), &host);
    if websocket {
        headers::set_websocket(&mut headers);
    } else if upload.size_hint().exact().is_none() {
        // Else hyper would take it that there is no body with some methods.
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let outgoing = Outgoing { method: parts.method, path, headers, upload };

    let until = Instant::now() + router.config.hold;
    let mut tries = 0;
    let (mut response, place) = loop {
        let standing = tokio::select! {
            standing = router.hold.wait(&fork, until) => standing?,
            () = router.is_ending() => return Err(Refusal::Ending),
        };
        let record = match standing {
            Standing::Runs(record) => record,
            Standing::Absent => return Err(Refusal::NoFork { fork, port: named }),
            Standing::Dead => return Err(Refusal::Dead(fork)),
            Standing::NotYet(what) => return Err(Refusal::NotYet { fork, what }),
        };
        let backend = router.backends.of(&record);
        let Some(place) = backend.place() else { return Err(Refusal::ForkFull(fork)) };
        let limit = router.config.answer_timeout;
        let sent = backend.send(port, &outgoing, websocket);
        let error = match in_time(limit, || outgoing.upload.moved(), sent).await {
            Ok(Ok(response)) => break (response, place),
            Ok(Err(error)) => error,
            Err(Late(limit)) => return Err(Refusal::Late { fork, port, limit }),
        };
        tries += 1;
        // Nothing was sent. It is being captured, or its machine has just ended: then it is something else by now.
        let again = match not_connected(&error) {
            Some(GuestError::Held(_)) => Instant::now() < until,
            Some(GuestError::NotRunning | GuestError::Transport(_)) => tries < TRIES,
            _ => false,
        };
        if !again {
            return Err(Refusal::NoAnswer { fork, port, source: error });
        }
        sleep(SOON).await;
    };

    let from_fork = hyper::upgrade::on(&mut response);
    let (mut parts, body) = response.into_parts();
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        let Some(from_client) = from_client.filter(|_| headers::is_websocket(&parts.headers)) else {
            return Err(Refusal::Unasked { fork, port });
        };
        headers::strip(&mut parts.headers);
        headers::set_websocket(&mut parts.headers);
        tokio::spawn(tunnel(Arc::clone(router), Arc::clone(seat), place, from_client, from_fork));
        return Ok(Response::from_parts(parts, Either::Right(Full::default())));
    }
    headers::strip(&mut parts.headers);
    Ok(Response::from_parts(parts, Either::Left(Download { body, seat: Arc::clone(seat), _place: place })))
}

/// It took longer than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Late(Duration);

/// An answer, unless it takes longer than `limit` since something moved last: a body that is long, or comes slowly, is no fault of who waits for it.
async fn in_time<T>(
    limit: Option<Duration>,
    moved: impl Fn() -> Option<Instant>,
    answer: impl Future<Output = T>,
) -> Result<T, Late> {
    let Some(limit) = limit else { return Ok(answer.await) };
    tokio::pin!(answer);
    let mut since = Instant::now();
    loop {
        if let Ok(answer) = timeout_at(since + limit, &mut answer).await {
            return Ok(answer);
        }
        match moved().filter(|moved| *moved > since) {
            Some(moved) => since = moved,
            None => return Err(Late(limit)),
        }
    }
}

/// The one host that a request names: in its target, or in its header.
fn host_of(router: &Shared, request: &Request<Incoming>) -> Result<HeaderValue, Refusal> {
    let malformed = || Refusal::Host(HostError::Malformed { suffix: router.config.suffix.clone() });
    let mut given = request.headers().get_all(HOST).iter();
    let header = given.next();
    if given.next().is_some() {
        return Err(malformed());
    }
    match (request.uri().authority(), header) {
        (None, Some(header)) => Ok(header.clone()),
        // The target counts (RFC 9112, section 3.2.2), and nobody may take the header for it.
        (Some(target), header)
            if header.is_none_or(|header| header.as_bytes().eq_ignore_ascii_case(target.as_str().as_bytes())) =>
        {
            HeaderValue::from_str(target.as_str()).map_err(|_| malformed())
        }
        _ => Err(malformed()),
    }
}

/// Moves the bytes of a WebSocket until both sides have ended, one has broken off, or the router ends.
async fn tunnel(router: Arc<Shared>, seat: Arc<Seat>, _place: Place, from_client: OnUpgrade, from_fork: OnUpgrade) {
    let (Ok(client), Ok(fork)) = tokio::join!(from_client, from_fork) else { return };
    let (mut client, mut fork) = (TokioIo::new(client), TokioIo::new(fork));
    let whole = tokio::select! {
        moved = copy_bidirectional_with_sizes(&mut client, &mut fork, PIECE, PIECE) => moved.is_ok(),
        () = router.is_ending() => {
            let _ = tokio::join!(client.shutdown(), fork.shutdown());
            true
        }
    };
    if !whole {
        seat.break_off();
    }
}

/// A request's body. It can be given to one connection after another, until one has read of it.
#[derive(Clone)]
pub(crate) struct Upload {
    source: Arc<Mutex<Source>>,
    size: SizeHint,
    empty: bool,
}

struct Source {
    body: Incoming,
    /// When a piece of it was taken last.
    moved: Option<Instant>,
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upload").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Upload {
    fn new(body: Incoming) -> Self {
        let (size, empty) = (body.size_hint(), body.is_end_stream());
        Self { source: Arc::new(Mutex::new(Source { body, moved: None })), size, empty }
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a piece of it was sent last; none if it has none yet.
    fn moved(&self) -> Option<Instant> {
        self.source().moved
    }

    /// Whether the request has none.
    pub(crate) fn is_empty(&self) -> bool {
        self.empty
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut source = self.source();
        let frame = ready!(Pin::new(&mut source.body).poll_frame(context));
        source.moved = Some(Instant::now());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.empty || self.source().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.source().body.size_hint()
    }
}

/// A body from a fork. One that breaks off breaks the client's connection off: it must not be taken for whole.
#[derive(Debug)]
pub(crate) struct Download {
    body: Incoming,
    seat: Arc<Seat>,
    _place: Place,
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if matches!(frame, Some(Err(_))) {
            self.seat.break_off();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(300);

    #[tokio::test(start_paused = true)]
    async fn n4_who_does_not_begin_to_answer_is_late_but_not_while_the_request_still_moves() {
        let begun = Instant::now();
        assert_eq!(in_time(Some(LIMIT), || None, pending::<()>()).await, Err(Late(LIMIT)));
        assert_eq!(begun.elapsed(), LIMIT);
        // An upload that takes four times as long, and an answer to it.
        let moved = Cell::new(None);
        let upload = async {
            for _ in 0..8 {
                sleep(LIMIT / 2).await;
                moved.set(Some(Instant::now()));
            }
            sleep(LIMIT / 2).await;
        };
        assert_eq!(in_time(Some(LIMIT), || moved.get(), upload).await, Ok(()));
        // One that stands still after that.
        let begun = Instant::now();
        let upload = async {
            sleep(LIMIT / 2).await;
            moved.set(Some(Instant::now()));
            pending().await
        };
        assert_eq!(in_time::<()>(Some(LIMIT), || moved.get(), upload).await, Err(Late(LIMIT)));
        assert_eq!(begun.elapsed(), LIMIT + LIMIT / 2);
        assert_eq!(in_time(None, || None, sleep(LIMIT * 100)).await, Ok(()), "without a limit it has all the time");
    }
}
