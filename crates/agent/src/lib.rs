//! The program in the guest: init, quiesce, apply, services, exec, eval bridge.
//!
//! It is pid 1 of the guest. [`boot`] mounts the root file system and prepares the guest; [`control`] answers the host;
//! [`service`] keeps the recipe's services and the warmed runtime; [`workload`] starts every process that is not the
//! agent; [`keeper`] freezes the workload before the capture and, in each fork, applies the identity before it thaws
//! it; [`network`] gives the guest its address and takes it away; [`mailboxes`] lets guest software plant mailboxes of its own.
//!
//! Who calls whom:
//!
//! ```text
//! run ─ boot ─┬─ keeper thread ◀── keeper::quiesce ◀── control (Quiesce)
//!             │       └─ apply ─ thaw ─ service::Supervisor::after_thaw ─ ack
//!             ├─ mailboxes (local socket)
//!             └─ control::serve (main thread, never returns) ─▶ Supervisor, Workload
//! ```

pub mod boot;
pub mod cgroup;
pub mod console;
pub mod control;
pub mod endpoint;
pub mod keeper;
pub mod mailboxes;
pub mod network;
pub mod payload;
pub mod reaper;
pub mod service;
pub mod state;
mod user;
pub mod workload;

use std::process::ExitCode;

/// Whether the workload is frozen before the capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    /// As it must be.
    On,
    /// Only for the test that shows what the freeze is for.
    Off,
}

/// Runs the agent: as pid 1 the whole guest, or with `--tool NAME ARG` one built-in tool.
///
/// As pid 1 it returns only if the guest can not start; what follows is the kernel's panic and the guest's end.
#[must_use]
pub fn run(freeze: Freeze) -> ExitCode {
    let mut args = std::env::args().skip(1);
    if let Some("--tool") = args.next().as_deref() {
        let name = args.next().unwrap_or_default();
        let arg = args.next().unwrap_or_default();
        return control::tool(&name, &arg);
    }
    match boot::boot(freeze) {
        Ok(state) => {
            let error = control::serve(&state);
            console::fatal(&format!("the control server ended: {error}"))
        }
        Err(error) => console::fatal(&format!("the guest can not start: {error}")),
    }
}
