//! The local identity endpoint: over HTTP, on a socket of the identity directory and, if the recipe asks for it, on a port of the loopback.
//!
//! | request | answer |
//! |---|---|
//! | `GET /internal/fork-identity/config` | 200 with the identity; 202 while it is to come; 404 if none has to be waited for |
//! | the same with `?wait=SECONDS` | as soon as that is 200, at most so many seconds later |
//! | `POST /internal/fork-identity` | 204 once the payload is applied; only the host's channel may |
//!
//! What a request is answered is true when it is answered: one that comes while the sandbox is captured, or takes on an identity, is answered after it.
#![forbid(unsafe_code)]

mod answer;
mod listen;
#[cfg(test)]
mod tests;

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HOST, ORIGIN},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use identity::ForkId;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep_until, timeout},
};

use self::answer::{applied, empty, problem};
pub use self::listen::start;
use crate::{
    payload::{Delivery, MAX_PAYLOAD},
    service::CompleteError,
    state::{AgentState, Told},
};

/// Where the identity is read.
pub const CONFIG: &str = "/internal/fork-identity/config";
/// Where a payload is posted.
pub const PAYLOAD: &str = "/internal/fork-identity";

/// How long a payload may take until it is applied.
pub const POST_LIMIT: Duration = Duration::from_secs(30);
/// Longest that `?wait=` waits.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// How long a capture, or an identity that is being applied, is waited for.
const CHANGING_LIMIT: Duration = Duration::from_secs(60);
/// Time for a request's head, and for its body.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const MAX_HEAD: usize = 16 << 10;

type Answer = Response<Full<Bytes>>;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Some program of the workload.
    Workload,
    /// The host, over its channel.
    Host,
}

/// Serves one connection until its end.
pub async fn serve(state: Arc<AgentState>, caller: Caller, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(respond(&state, caller, request, POST_LIMIT).await) }
    });
    // A connection that breaks off is its caller's business.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_LIMIT)
        .max_buf_size(MAX_HEAD)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn respond(state: &Arc<AgentState>, caller: Caller, request: Request<Incoming>, limit: Duration) -> Answer {
    // A page of a browser, in the fork or on the host, must not reach it by a name that leads to the loopback…
    let host = request.headers().get(HOST).map_or("localhost", |host| host.to_str().unwrap_or("?"));
    if !is_local(host) {
        return problem(StatusCode::MISDIRECTED_REQUEST, "ask for it as localhost or 127.0.0.1");
    }
    // …and must not post, which it can without reading the answer.
    if request.method() == Method::POST && request.headers().contains_key(ORIGIN) {
        return problem(StatusCode::FORBIDDEN, "a page of a browser may not post a payload");
    }
    match (request.uri().path(), request.method()) {
        (CONFIG, &Method::GET | &Method::HEAD) => match waits(request.uri().query()) {
            Some(wait) => config(state, wait).await,
            None => problem(StatusCode::BAD_REQUEST, "the query is wait=SECONDS, with 0 to 300"),
        },
        (PAYLOAD, &Method::POST) if caller == Caller::Host => post(state, request, limit).await,
        (PAYLOAD, &Method::POST) => {
            problem(StatusCode::FORBIDDEN, "only the host may post a payload, over its control channel")
        }
        (CONFIG | PAYLOAD, _) => {
            let allowed = if request.uri().path() == CONFIG { "GET, HEAD" } else { "POST" };
            let mut answer = problem(StatusCode::METHOD_NOT_ALLOWED, "see the header Allow");
            answer.headers_mut().insert(hyper::header::ALLOW, hyper::header::HeaderValue::from_static(allowed));
            answer
        }
        _ => problem(StatusCode::NOT_FOUND, "there is /internal/fork-identity/config, and /internal/fork-identity"),
    }
}

/// Whether a request's host is this one, with or without a port.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "localhost" | "127.0.0.1" | "[::1]" | "")
}

/// How long a request wants to wait; `None` if its query says something else.
fn waits(query: Option<&str>) -> Option<Duration> {
    let Some(query) = query.filter(|query| !query.is_empty()) else { return Some(Duration::ZERO) };
    let seconds = query.strip_prefix("wait=")?.parse().ok()?;
    Some(Duration::from_secs(seconds)).filter(|wait| *wait <= LONGEST_WAIT)
}

/// Who this is, once that is known, or as far as it is known when the wait is over.
async fn config(state: &Arc<AgentState>, wait: Duration) -> Answer {
    let asked = tokio::time::Instant::now();
    let mut changes = state.changes();
    loop {
        let until = match state.told() {
            Told::Applied(identity) => return applied(&identity),
            Told::NotComing => return problem(StatusCode::NOT_FOUND, "no identity has to be waited for here"),
            Told::Waiting => asked + wait,
            Told::Changing => asked + wait.max(CHANGING_LIMIT),
        };
        tokio::select! {
            _ = changes.changed() => {}
            () = sleep_until(until) => return answer::waiting(),
        }
    }
}

async fn post(state: &Arc<AgentState>, request: Request<Incoming>, limit: Duration) -> Answer {
    let deadline = tokio::time::Instant::now() + limit;
    let Some(expected) = state.expected().filter(|expected| expected.delivery != Delivery::Off) else {
        return problem(StatusCode::CONFLICT, "the recipe says that no payload is waited for");
    };
    let body = match timeout(READ_LIMIT, Limited::new(request.into_body(), MAX_PAYLOAD).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return problem(StatusCode::PAYLOAD_TOO_LARGE, "a payload has at most 65536 bytes");
        }
        Ok(Err(_)) => return problem(StatusCode::BAD_REQUEST, "the payload broke off"),
        Err(_) => return problem(StatusCode::REQUEST_TIMEOUT, "the payload did not come in time"),
    };
    let payload = match expected.read(&body) {
        Ok(payload) => payload,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let fork = match fork(state, deadline).await {
        Ok(fork) => fork,
        Err((status, why)) => return problem(status, why),
    };
    let supervisor = Arc::clone(state.supervisor());
    let until = Instant::now() + deadline.saturating_duration_since(tokio::time::Instant::now());
    // What has begun is brought to its end, whether somebody still waits for the answer or not.
    let work = tokio::task::spawn_blocking(move || supervisor.complete(&fork, payload, until));
    match tokio::time::timeout_at(deadline, work).await {
        Err(_) => problem(StatusCode::GATEWAY_TIMEOUT, "the payload was not applied in time; it still may be"),
        Ok(Err(_)) => problem(StatusCode::INTERNAL_SERVER_ERROR, "the payload could not be applied"),
        Ok(Ok(Ok(_))) => empty(StatusCode::NO_CONTENT),
        Ok(Ok(Err(error))) => {
            let status = match &error {
                CompleteError::OtherFork | CompleteError::OtherPayload => StatusCode::CONFLICT,
                CompleteError::Late => StatusCode::GATEWAY_TIMEOUT,
                CompleteError::Write(_) | CompleteError::Service(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            problem(status, &error.to_string())
        }
    }
}

/// The fork that a payload is for: this one, or the one that it is about to be.
async fn fork(state: &Arc<AgentState>, deadline: tokio::time::Instant) -> Result<ForkId, (StatusCode, &'static str)> {
    let mut changes = state.changes();
    loop {
        match (state.told(), state.identity()) {
            (Told::Applied(identity), _) | (Told::Waiting, Some(identity)) => return Ok(identity.fork.id.clone()),
            (Told::Waiting, None) => {
                return Err((StatusCode::CONFLICT, "this is a template: what it is given, all its forks would have"));
            }
            (Told::NotComing, _) => return Err((StatusCode::CONFLICT, "no payload is waited for here")),
            (Told::Changing, _) => {}
        }
        tokio::select! {
            _ = changes.changed() => {}
            () = sleep_until(deadline) => {
                return Err((StatusCode::GATEWAY_TIMEOUT, "the fork took too long to take on its identity"));
            }
        }
    }
}

/// A response's media type.
const JSON: (hyper::header::HeaderName, hyper::header::HeaderValue) =
    (CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
