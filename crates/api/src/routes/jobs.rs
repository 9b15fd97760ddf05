//! Long work.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::sse::{Event, Sse},
};
use futures_util::Stream;
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use utoipa::ToSchema;

use super::stream::{self, ServerSent};
use crate::{
    App,
    auth::Reader,
    extract::At,
    jobs::{Job, JobState},
    problem::Problem,
};

/// All jobs.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Jobs)]
pub(super) struct All {
    jobs: Vec<Job>,
}

/// List jobs
///
/// Those that are being done, and the last that have ended.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses(
    (status = 200, description = "All", body = All),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The daemon failed", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(app): State<Arc<App>>, _: Reader) -> Json<All> {
    Json(All { jobs: app.jobs.list() })
}

/// One job
#[utoipa::path(get, path = "/v1/jobs/{job}", tag = "jobs", params(("job" = String, Path, description = "Its id")), responses(
    (status = 200, description = "It", body = Job),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn get(State(app): State<Arc<App>>, _: Reader, At(job): At<String>) -> Result<Json<Job>, Problem> {
    find(&app, &job).map(Json)
}

fn find(app: &App, id: &str) -> Result<Job, Problem> {
    app.jobs.get(id).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "job_not_found", "there is no such job"))
}

/// Follow a job
///
/// Server-sent events, the last of which is `job.done` or `job.failed`; each has the job as its data.
#[utoipa::path(get, path = "/v1/jobs/{job}/events", tag = "jobs", params(("job" = String, Path, description = "Its id")), responses(
    (status = 200, description = "Its progress, until it ends", body = ServerSent, content_type = "text/event-stream"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn events(
    State(app): State<Arc<App>>,
    _: Reader,
    At(job): At<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    // Listened for first, so that nothing happens unseen in between.
    let (_, receiver) = app.hub.listen(None);
    let now = find(&app, &job)?;
    let ending = app.ending.clone();
    let state = (Next::Tell(Box::new(now)), receiver, ending, app, job);
    let events = futures_util::stream::unfold(state, |(next, mut receiver, mut ending, app, id)| async move {
        let now = match next {
            Next::End => return None,
            Next::Tell(now) => *now,
            Next::Wait => loop {
                let event = tokio::select! {
                    event = receiver.recv() => event,
                    _ = ending.wait_for(|ending| *ending) => return None,
                };
                match event {
                    Ok(event) if event.subject != id => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => break app.jobs.get(&id)?,
                    Err(RecvError::Closed) => return None,
                }
            },
        };
        let (kind, next) = match now.state {
            JobState::Running => ("job.progress", Next::Wait),
            JobState::Done => ("job.done", Next::End),
            JobState::Failed => ("job.failed", Next::End),
        };
        let event = Event::default().event(kind).json_data(&now).unwrap_or_default();
        Some((Ok(event), (next, receiver, ending, app, id)))
    });
    Ok(Sse::new(events).keep_alive(stream::keep_alive()))
}

/// What a follower of a job is told next.
enum Next {
    /// This.
    Tell(Box<Job>),
    /// What happens then.
    Wait,
    /// Nothing more.
    End,
}
