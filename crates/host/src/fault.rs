//! Places where a test makes an operation fail or die.
//!
//! Only in builds with the feature `fault-points`: `OFFSHOOT_FAULT=fork.started:kill` kills this process with SIGKILL when it
//! gets there; `:error` makes the step fail; `:kill-engine` kills the machine's process (where there is one). Without the
//! feature the function is empty.

use std::io;

/// Marks the end of a step. `engine` is the machine's process, if there is one by now.
///
/// # Errors
/// The error a test asked for.
#[cfg(feature = "fault-points")]
pub fn point(step: &str, engine: Option<&engine::ProcessRef>) -> io::Result<()> {
    let Ok(wanted) = std::env::var("OFFSHOOT_FAULT") else { return Ok(()) };
    let Some(action) = wanted.strip_prefix(step).and_then(|rest| rest.strip_prefix(':')) else { return Ok(()) };
    match action {
        "error" => return Err(io::Error::other(format!("fault injected after {step}"))),
        "kill" => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
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

/// Does nothing in this build.
///
/// # Errors
/// Never.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn point(_step: &str, _engine: Option<&engine::ProcessRef>) -> io::Result<()> {
    Ok(())
}
