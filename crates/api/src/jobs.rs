//! Long work: a build, a verification. Its state is on disk, so that after a crash a client learns that it was interrupted.

use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::{
    events::{Hub, now_ms},
    problem::Problem,
};

/// How many jobs that have ended are kept.
const KEPT: usize = 256;
/// A job's file has some kilobytes; a verdict on 1000 forks some hundred.
const MAX_FILE: u64 = 16 << 20;

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum JobState {
    /// It is being done.
    Running,
    /// It is done.
    Done,
    /// It failed; nothing of it is left.
    Failed,
}

/// Long work.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Job {
    /// Its id.
    pub(crate) id: String,
    /// `build` or `verify`.
    kind: String,
    /// The template.
    template: String,
    /// How far it is.
    pub(crate) state: JobState,
    /// What is being done, for people.
    step: String,
    /// How much of that is done, where it is known…
    done: Option<u64>,
    /// …out of how much.
    total: Option<u64>,
    /// When it began, in milliseconds since the epoch.
    begun_ms: u64,
    /// When it ended.
    ended_ms: Option<u64>,
    /// What came of it: for a build the template, for a verification the verdict.
    result: Option<Value>,
    /// Why it failed: a problem document.
    error: Option<Value>,
}

/// All jobs.
#[derive(Debug)]
pub(crate) struct Jobs {
    dir: PathBuf,
    jobs: Mutex<BTreeMap<String, Job>>,
    hub: Arc<Hub>,
}

impl Jobs {
    /// Reads those of the daemon's former life. What was running then is not any more.
    pub(crate) fn open(state: &std::path::Path, hub: Arc<Hub>) -> io::Result<Self> {
        let dir = state.join("api").join("jobs");
        fs::create_dir_all(&dir)?;
        let mut jobs = BTreeMap::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let Some(mut job) = read(&path) else {
                let _ = fs::remove_file(&path);
                continue;
            };
            if job.state == JobState::Running {
                job.state = JobState::Failed;
                job.ended_ms = Some(now_ms());
                job.error = Some(json!(interrupted()));
            }
            jobs.insert(job.id.clone(), job);
        }
        let opened = Self { dir, jobs: Mutex::new(jobs), hub };
        let all: Vec<Job> = opened.list();
        all.iter().try_for_each(|job| opened.write(job))?;
        Ok(opened)
    }

    pub(crate) fn list(&self) -> Vec<Job> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<Job> = jobs.values().cloned().collect();
        list.sort_by(|a, b| (a.begun_ms, &a.id).cmp(&(b.begun_ms, &b.id)));
        list
    }

    pub(crate) fn get(&self, id: &str) -> Option<Job> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Notes a new one.
    pub(crate) fn begin(&self, kind: &str, template: &str) -> io::Result<Job> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
        let job = Job {
            id: random.iter().map(|byte| format!("{byte:02x}")).collect(),
            kind: kind.into(),
            template: template.into(),
            state: JobState::Running,
            step: "beginning".into(),
            done: None,
            total: None,
            begun_ms: now_ms(),
            ended_ms: None,
            result: None,
            error: None,
        };
        self.write(&job)?;
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.insert(job.id.clone(), job.clone());
        let mut ended: Vec<(u64, String)> =
            jobs.values().filter_map(|job| Some((job.ended_ms?, job.id.clone()))).collect();
        ended.sort();
        for (_, id) in ended.iter().take(ended.len().saturating_sub(KEPT)) {
            jobs.remove(id);
            let _ = fs::remove_file(self.path(id));
        }
        Ok(job)
    }

    /// It goes on.
    pub(crate) fn progress(&self, id: &str, progress: &host::progress::Progress) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(job) = jobs.get_mut(id) else { return };
        (job.step, job.done, job.total) = (progress.step.clone(), progress.done, progress.total);
        let data = json!({ "step": job.step, "done": job.done, "total": job.total });
        drop(jobs);
        self.hub.say("job.progress", id, data);
    }

    /// It has ended.
    pub(crate) fn end(&self, id: &str, result: Result<Value, Problem>) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(job) = jobs.get_mut(id) else { return };
        job.ended_ms = Some(now_ms());
        let (kind, data) = match result {
            Ok(value) => {
                job.state = JobState::Done;
                job.result = Some(value);
                ("job.done", json!({ "template": job.template }))
            }
            Err(problem) => {
                job.state = JobState::Failed;
                let error = json!(problem);
                job.error = Some(error.clone());
                ("job.failed", error)
            }
        };
        let job = job.clone();
        drop(jobs);
        if let Err(error) = self.write(&job) {
            tracing::warn!(%error, job = id, "the outcome of a job could not be written");
        }
        self.hub.say(kind, id, data);
    }

    fn write(&self, job: &Job) -> io::Result<()> {
        let temporary = self.dir.join(format!(".{}.tmp", job.id));
        fs::write(&temporary, serde_json::to_vec(job)?)?;
        fs::rename(temporary, self.path(&job.id))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

fn read(path: &std::path::Path) -> Option<Job> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".json")?;
    if fs::metadata(path).ok()?.len() > MAX_FILE {
        return None;
    }
    let job: Job = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (job.id == stem).then_some(job)
}

/// What is said of work that the daemon's end interrupted.
pub(crate) fn interrupted() -> Problem {
    Problem::new(
        axum::http::StatusCode::SERVICE_UNAVAILABLE,
        "interrupted",
        "the daemon ended before this was done; nothing of it is left",
    )
    .with_next("send it again")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn o2_a_job_of_a_daemon_that_died_has_failed_and_one_that_ended_keeps_its_result() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(dir.path(), Arc::new(Hub::new())).unwrap();
        let (one, two) = (jobs.begin("build", "a").unwrap(), jobs.begin("build", "b").unwrap());
        jobs.end(&one.id, Ok(json!({ "tag": "a" })));
        drop(jobs);
        fs::write(dir.path().join("api/jobs/torn.json"), b"{").unwrap();
        let again = Jobs::open(dir.path(), Arc::new(Hub::new())).unwrap();
        assert_eq!(again.get(&one.id).unwrap().result.unwrap()["tag"], "a");
        let two = again.get(&two.id).unwrap();
        assert_eq!((two.state, &two.error.unwrap()["code"]), (JobState::Failed, &"interrupted".into()));
        assert_eq!(again.list().len(), 2);
    }
}
