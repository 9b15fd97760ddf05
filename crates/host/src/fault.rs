//! The ends of steps: where an operation that was asked to [stop](crate::stop) does, and where a test makes it fail or die.
//!
//! The latter only in builds with the feature `fault-points`: `OFFSHOOT_FAULT=fork.started:kill` kills this process with
//! SIGKILL when it gets there; `:stop` stops it there until somebody continues it; `:error` makes the step fail; `:kill-engine` kills the machine's
//! process (where there is one).

use std::io;

use crate::stop;

/// Marks the end of a step. `engine` is the machine's process, if there is one by now.
///
/// # Errors
/// `Interrupted` if somebody asked this process to stop, but not after the step that publishes: what is published stays.
/// The error a test asked for.
pub fn point(step: &str, engine: Option<&engine::ProcessRef>) -> io::Result<()> {
    injected(step, engine)?;
    if step.ends_with(".committed") { Ok(()) } else { stop::check() }
}

#[cfg(feature = "fault-points")]
fn injected(step: &str, engine: Option<&engine::ProcessRef>) -> io::Result<()> {
    let Ok(wanted) = std::env::var("OFFSHOOT_FAULT") else { return Ok(()) };
    let Some(action) = wanted.strip_prefix(step).and_then(|rest| rest.strip_prefix(':')) else { return Ok(()) };
    match action {
        "error" => return Err(io::Error::other(format!("fault injected after {step}"))),
        "kill" => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        "stop" => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        }
        "kill-engine" => {
            if let Some(engine) = engine {
                engine.kill(std::time::Duration::from_secs(5))?;
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(not(feature = "fault-points"))]
#[inline]
fn injected(_step: &str, _engine: Option<&engine::ProcessRef>) -> io::Result<()> {
    Ok(())
}
