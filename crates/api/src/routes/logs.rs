//! What services and the runtime of a fork wrote.

use std::{convert::Infallible, sync::Arc};

use axum::{
    extract::State,
    response::sse::{Event, Sse},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::Stream;
use serde::Deserialize;
use serde_json::json;
use utoipa::IntoParams;

use super::{
    connect,
    stream::{self, ServerSent},
};
use crate::{
    App,
    auth::Reader,
    extract::{Asked, At},
    problem::Problem,
};

/// How to read.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct How {
    /// Whether to go on with what comes.
    #[serde(default)]
    follow: bool,
}

/// What the services of a fork wrote
///
/// Server-sent events `log` with `{"source", "data_base64"}`; at the end `end`, or `error` with a problem document.
#[utoipa::path(get, path = "/v1/forks/{fork}/logs", tag = "forks", params(("fork" = String, Path, description = "Name or id"), How), responses(
    (status = 200, description = "What was written, and with `follow` what comes", body = ServerSent, content_type = "text/event-stream"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "It did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn logs(
    State(app): State<Arc<App>>,
    _: Reader,
    At(fork): At<String>,
    Asked(how): Asked<How>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let (_, mut channel) = connect(&app, fork).await?;
    let logs = channel.logs(how.follow).await?;
    // The channel goes with the stream.
    let state = Some((logs, channel, app.ending.clone()));
    let events = futures_util::stream::unfold(state, |state| async move {
        let (mut logs, channel, mut ending) = state?;
        let next = tokio::select! {
            next = logs.next() => next,
            _ = ending.wait_for(|ending| *ending) => return None,
        };
        match next {
            Ok(Some(chunk)) => {
                let source: String = chunk.source.chars().take(64).collect();
                let data = json!({ "source": source, "data_base64": STANDARD.encode(&chunk.data) });
                let event = Event::default().event("log").json_data(data).unwrap_or_default();
                Some((Ok(event), Some((logs, channel, ending))))
            }
            Ok(None) => Some((Ok(Event::default().event("end").data("{}")), None)),
            Err(error) => {
                let event = Event::default().event("error").json_data(Problem::from(error)).unwrap_or_default();
                Some((Ok(event), None))
            }
        }
    });
    Ok(Sse::new(events).keep_alive(stream::keep_alive()))
}
