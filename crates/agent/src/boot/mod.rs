//! From the kernel's hand-over to an agent that can answer.

pub mod power;

use std::sync::Arc;

use thiserror::Error;

use crate::{Freeze, state::AgentState};

/// Why the guest did not start.
#[derive(Debug, Error)]
pub enum BootError {
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// Which step.
        step: String,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// Boots the guest.
///
/// # Errors
/// [`BootError`].
pub fn boot(_freeze: Freeze) -> Result<Arc<AgentState>, BootError> {
    Err(BootError::Step { step: "boot".into(), source: std::io::ErrorKind::Unsupported.into() })
}
