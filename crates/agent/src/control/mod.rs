//! The control server (being written).

use std::{convert::Infallible, process::ExitCode, sync::Arc};

use crate::state::AgentState;

/// Serves the control channels on the calling (main) thread; returns only if it can not go on.
pub fn serve(_state: &Arc<AgentState>) -> Box<dyn std::error::Error> {
    loop {
        std::thread::park();
    }
}

/// Runs a built-in tool in the workload: `offshoot-agent --tool NAME ARG`.
#[must_use]
pub fn tool(_name: &str, _arg: &str) -> ExitCode {
    let _: Option<Infallible> = None;
    ExitCode::FAILURE
}
