//! Services and the warmed runtime (being written).

use std::{sync::Arc, time::Instant};

use identity::Step;

use crate::state::{AgentState, Identity};

/// Keeps the recipe's services and the runtime.
#[derive(Debug)]
pub struct Supervisor;

/// What [`Supervisor::after_thaw`] did.
#[derive(Debug, Default)]
pub struct AfterThaw {
    /// Each thing done, for the ack.
    pub steps: Vec<Step>,
    /// Set if the fork must not be used: the reason.
    pub failure: Option<String>,
}

impl Supervisor {
    /// A supervisor with nothing to keep yet. It is made once, at boot; `AgentState::supervisor` gives it to everyone.
    #[must_use]
    pub fn new(_state: &Arc<AgentState>) -> Self {
        Self
    }

    /// Called by `keeper::quiesce` before the freeze (any thread, blocking): gets services and runtime ready for the
    /// capture and answers with warnings for people.
    ///
    /// # Errors
    /// The reason why the template can not be captured.
    pub fn prepare_quiesce(&self, _deadline: Instant) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }

    /// Called on the keeper's thread right after the thaw (blocking; the fork's ack waits for it): in-process events,
    /// signals, hooks, restarts, start of the services that start in forks. `identity` is also in
    /// `AgentState::identity`; `AgentState::environment` is the fork's already.
    pub fn after_thaw(&self, _identity: &Identity) -> AfterThaw {
        AfterThaw::default()
    }

    /// Called instead of [`Self::after_thaw`] when a branch's source goes on with the identity it has.
    pub fn after_continue(&self) -> AfterThaw {
        AfterThaw::default()
    }
}
