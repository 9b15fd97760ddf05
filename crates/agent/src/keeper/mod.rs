//! Keeps the promise: freezes the workload before the capture, and in each fork applies the identity before it thaws it.

use std::{sync::Arc, time::Duration};

use identity::{MailboxName, mailbox::Nonce};
use thiserror::Error;

use crate::state::AgentState;

/// The part of the agent that waits for an identity.
#[derive(Debug)]
pub struct Keeper {}

/// Why the template was not quiesced. It goes on as before.
#[derive(Debug, Error)]
pub enum QuiesceError {
    /// Not in a phase from which it can be captured.
    #[error("the sandbox is {0}; only a template or a running fork can be captured")]
    Phase(&'static str),
    /// A service or the runtime can not be captured now.
    #[error("{0}")]
    Service(String),
    /// A step failed.
    #[error("{step} failed: {reason}")]
    Step {
        /// Which step.
        step: &'static str,
        /// Why.
        reason: String,
    },
}

/// A mailbox that waits for a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planted {
    /// Its name.
    pub name: MailboxName,
    /// Its nonce.
    pub nonce: Nonce,
    /// Most bytes of its payload.
    pub capacity: usize,
    /// `agent`, `socket` or `self`.
    pub planted_by: &'static str,
}

/// The answer to a quiesce.
#[derive(Debug, Clone)]
pub struct Quiesced {
    /// Every mailbox, the agent's own first.
    pub mailboxes: Vec<Planted>,
    /// `CLOCK_REALTIME` when the workload was frozen, in nanoseconds.
    pub frozen_wall_ns: u64,
    /// `CLOCK_MONOTONIC` at that moment.
    pub frozen_monotonic_ns: u64,
    /// What was found, for people.
    pub warnings: Vec<String>,
}

/// Freezes the workload and arms the mailboxes. Blocks (at most `timeout`). When it has returned, the caller sends the
/// answer; the keeper's thread waits for the identity from now on, and lets the answer out first.
///
/// # Errors
/// [`QuiesceError`]; the workload then runs on as before.
pub fn quiesce(_state: &Arc<AgentState>, _timeout: Duration) -> Result<Quiesced, QuiesceError> {
    Err(QuiesceError::Phase("being written"))
}
