//! The daemon itself: whether it is well, what happens, and what it can do.

use std::{
    convert::Infallible,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{Event, Sse},
    },
    routing::get,
};
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;
use utoipa::{IntoParams, ToSchema};

use super::{
    block, openapi,
    stream::{self, ServerSent},
};
use crate::{App, auth::Reader, events::Hub, extract::Asked, problem::Problem};

/// Whether it lives.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, or what is the matter.
    status: &'static str,
}

/// Whether the directories can be used, as it was found not long ago: whoever asks needs no token, and looking costs a look at every fork.
#[derive(Debug, Default)]
pub(crate) struct Readiness(Mutex<Option<(Instant, bool)>>);

impl Readiness {
    /// How long an answer is good for.
    const GOOD_FOR: Duration = Duration::from_secs(1);

    fn ask(&self, now: Instant, look: impl FnOnce() -> bool) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match *known {
            Some((when, is_ready)) if now.duration_since(when) < Self::GOOD_FOR => is_ready,
            _ => known.insert((now, look())).1,
        }
    }
}

/// Liveness
#[utoipa::path(get, path = "/healthz", tag = "daemon", security(()), responses((status = 200, description = "The daemon lives", body = Health)))]
pub(super) async fn live() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Readiness
#[utoipa::path(get, path = "/readyz", tag = "daemon", security(()), responses(
    (status = 200, description = "It takes requests", body = Health),
    (status = 503, description = "It is about to end, or can not use its directories", body = Health),
))]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let health = |status| Json(Health { status });
    if *app.ending.borrow() {
        return (StatusCode::SERVICE_UNAVAILABLE, health("ending")).into_response();
    }
    let looked = Arc::clone(&app);
    match app.readiness.ask(Instant::now(), || looked.forks.list().is_ok()) {
        true => health("ok").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, health("state directory")).into_response(),
    }
}

/// What answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Version {
    /// The daemon's version.
    version: &'static str,
    /// The version of these routes.
    api: &'static str,
}

/// Version
#[utoipa::path(get, path = "/v1/version", tag = "daemon", responses(
    (status = 200, description = "It", body = Version),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn version(_: Reader) -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION"), api: "v1" })
}

/// Figures for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "daemon", responses(
    (status = 200, description = "In the OpenMetrics text format", body = String, content_type = "application/openmetrics-text"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The daemon failed", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn metrics(State(app): State<Arc<App>>, _: Reader) -> Result<Response, Problem> {
    let text = block(move || {
        app.metrics.text(&app.home, &app.forks).map_err(|error| {
            tracing::error!(%error, "the figures could not be gathered");
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the figures could not be gathered")
        })
    })
    .await?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Where to begin.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct From {
    /// Number of the last event that the client has seen; without it, from now on. `Last-Event-ID` says the same and counts more: a client that
    /// connects again by itself asks with the query that it began with.
    #[param(nullable = false)]
    after: Option<u64>,
}

/// Follow what happens
///
/// Server-sent events, whoever caused them: forks made, ended, dead; templates; jobs. An event `missed` says that some are lost, and the
/// lists must be looked at.
#[utoipa::path(get, path = "/v1/events", tag = "daemon", params(From), responses(
    (status = 200, description = "Events, each with an `Event` as its data, until the daemon ends", body = ServerSent, content_type = "text/event-stream"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn events(
    State(app): State<Arc<App>>,
    _: Reader,
    headers: HeaderMap,
    Asked(from): Asked<From>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let (missed, receiver) = app.hub.listen(last.or(from.after));
    let state = (missed.into_iter(), receiver, app.ending.clone());
    let events = futures_util::stream::unfold(state, |(mut missed, mut receiver, mut ending)| async move {
        let event = match missed.next() {
            Some(event) => event,
            None => tokio::select! {
                event = receiver.recv() => match event {
                    Ok(event) => event,
                    Err(RecvError::Lagged(_)) => Arc::new(Hub::missed(0)),
                    Err(RecvError::Closed) => return None,
                },
                _ = ending.wait_for(|ending| *ending) => return None,
            },
        };
        let sent = Event::default().id(event.id.to_string()).event(event.kind).json_data(&*event).unwrap_or_default();
        Some((Ok(sent), (missed, receiver, ending)))
    });
    Sse::new(events).keep_alive(stream::keep_alive())
}

/// Made once: whoever asks for it needs no token.
static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| serde_json::to_vec(&openapi()).unwrap_or_default().into());

/// The description of all routes, for programs and for people. It holds nothing of this host.
pub(super) fn pages() -> Router<Arc<App>> {
    // Nothing from elsewhere, and nothing inline.
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'";
    let file = |kind: &'static str, content: &'static str| {
        get(move || async move {
            let headers: [(HeaderName, &str); 2] =
                [(header::CONTENT_TYPE, kind), (header::CONTENT_SECURITY_POLICY, POLICY)];
            (headers, content)
        })
    };
    Router::new()
        .route("/openapi.json", get(|| async { ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.clone()) }))
        .route("/docs", file("text/html; charset=utf-8", include_str!("../docs/index.html")))
        .route("/docs/page.js", file("text/javascript; charset=utf-8", include_str!("../docs/page.js")))
        .route("/docs/page.css", file("text/css; charset=utf-8", include_str!("../docs/page.css")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_it_is_ready_is_looked_at_once_a_second() {
        let (readiness, begun) = (Readiness::default(), Instant::now());
        assert!(readiness.ask(begun, || true));
        assert!(readiness.ask(begun + Duration::from_millis(999), || panic!("looked again")));
        assert!(!readiness.ask(begun + Duration::from_secs(1), || false));
    }
}
