//! The ends of steps, where a test makes the work fail or the process die.

use std::io;

/// All steps of making and opening a link, in order. After each, the step can be made to fail.
#[cfg(any(test, feature = "fault-points"))]
pub const STEPS: [&str; 12] = [
    "net.lease",
    "net.record",
    "net.table",
    "net.namespace",
    "net.closed",
    "net.wire",
    "net.tap",
    "net.addresses",
    "net.routes",
    "net.shared",
    "net.rate",
    "net.opened",
];

/// Marks the end of a step.
///
/// # Errors
/// The error a test asked for: in builds with the feature `fault-points`, `OFFSHOOT_FAULT=net.tap:error` makes the step fail and
/// `:kill` kills this process with SIGKILL when it gets there.
#[cfg_attr(not(any(test, feature = "fault-points")), inline)]
#[allow(clippy::unnecessary_wraps, reason = "only in builds for tests does it fail")]
pub(crate) fn point(step: &str) -> io::Result<()> {
    #[cfg(test)]
    tests::point(step)?;
    #[cfg(any(test, feature = "fault-points"))]
    if let Ok(wanted) = std::env::var("OFFSHOOT_FAULT")
        && let Some(action) = wanted.strip_prefix(step).and_then(|rest| rest.strip_prefix(':'))
    {
        match action {
            "error" => return Err(io::Error::other(format!("fault injected after {step}"))),
            "kill" => {
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            }
            _ => {}
        }
    }
    #[cfg(not(any(test, feature = "fault-points")))]
    let _ = step;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{cell::RefCell, io};

    /// A step, and what happens there.
    type Meanwhile = (&'static str, fn());

    thread_local! {
        static FAILING: RefCell<Option<&'static str>> = const { RefCell::new(None) };
        static MEANWHILE: RefCell<Option<Meanwhile>> = const { RefCell::new(None) };
    }

    /// Has something happen when this thread is at the end of `step`, once.
    pub(crate) fn meanwhile(step: &'static str, what: fn()) {
        MEANWHILE.set(Some((step, what)));
    }

    /// Makes `step` fail in this thread from now on, or none.
    pub(crate) fn fail_at(step: Option<&'static str>) {
        FAILING.set(step);
    }

    pub(super) fn point(step: &str) -> io::Result<()> {
        if let Some((_, what)) = MEANWHILE.with_borrow_mut(|meanwhile| meanwhile.take_if(|(at, _)| *at == step)) {
            what();
        }
        match FAILING.with_borrow(|failing| *failing == Some(step)) {
            true => Err(io::Error::other(format!("fault injected after {step}"))),
            false => Ok(()),
        }
    }

    /// Which step fails in this thread, for a thread that works for it.
    pub(crate) fn failing() -> Option<&'static str> {
        FAILING.with_borrow(|failing| *failing)
    }
}
