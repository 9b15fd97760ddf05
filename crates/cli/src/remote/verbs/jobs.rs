//! Long work of the daemon, followed to its end.

use host::progress::Progress;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    error::Failure,
    output::progress::Reporter,
    remote::{
        client::{Client, ended, part, read},
        events::Events,
        problem::Problem,
    },
};

/// A job, as far as it matters here.
#[derive(Debug, Deserialize)]
pub struct Job {
    id: String,
    step: String,
    done: Option<u64>,
    total: Option<u64>,
    result: Option<Value>,
    error: Option<Problem>,
}

/// Shows its progress until it ends; what came of it.
pub async fn follow(client: &mut Client, job: &Job, reporter: &mut Reporter) -> Result<Value, Failure> {
    let mut events = Events::of(client.download(&format!("/v1/jobs/{}/events", part(&job.id))).await?);
    while let Some(event) = events.next().await? {
        let job: Job = read(&serde_json::from_str(&event.data).unwrap_or_default())?;
        match event.kind.as_str() {
            "job.done" => return job.result.ok_or_else(ended),
            "job.failed" => return Err(job.error.map_or_else(ended, Failure::from)),
            _ => reporter.show(&Progress { step: job.step, done: job.done, total: job.total }),
        }
    }
    Err(ended())
}
