//! How much long work is done at once. What is above that is refused at once, with a code: were it to wait, it would hold threads that short
//! requests need.

use std::sync::Arc;

use axum::http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::problem::Problem;

/// Most requests at once that make or move machines: each may be for many, has a thread while it is worked on, and there are 512 of those.
const MOST_MOVES: usize = 128;
/// Most builds and verifications at once: each boots guests of its own.
const MOST_JOBS: usize = 16;

/// The long work of the daemon.
#[derive(Debug)]
pub(crate) struct Work {
    moves: Arc<Semaphore>,
    jobs: Arc<Semaphore>,
}

/// Some of it: as long as this is there.
#[derive(Debug)]
pub(crate) struct Share {
    _permit: OwnedSemaphorePermit,
}

impl Work {
    pub(crate) fn new() -> Self {
        Self { moves: Arc::new(Semaphore::new(MOST_MOVES)), jobs: Arc::new(Semaphore::new(MOST_JOBS)) }
    }

    /// For making, resuming or putting away machines.
    pub(crate) fn moving(&self) -> Result<Share, Problem> {
        share(&self.moves)
    }

    /// For a job.
    pub(crate) fn job(&self) -> Result<Share, Problem> {
        share(&self.jobs)
    }
}

fn share(of: &Arc<Semaphore>) -> Result<Share, Problem> {
    let permit = Arc::clone(of).try_acquire_owned().map_err(|_| {
        let detail = "as much of this is being done as the daemon does at once; nothing was begun";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "daemon_busy", detail).with_next("send it again later")
    })?;
    Ok(Share { _permit: permit })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn o1_what_is_too_much_at_once_is_refused_and_of_another_kind_is_not() {
        let work = Work::new();
        let mut jobs: Vec<Share> = (0..MOST_JOBS).map(|_| work.job().unwrap()).collect();
        let refused = work.job().unwrap_err();
        assert_eq!((refused.status().as_u16(), refused.code()), (503, "daemon_busy"));
        assert!(work.moving().is_ok());
        jobs.pop();
        assert!(work.job().is_ok());
    }
}
