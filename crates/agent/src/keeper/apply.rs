//! Applying an identity, step by step, until the thaw. The first step that fails is the last: nothing is thawed then.

use std::{
    borrow::Cow,
    fmt::Display,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use identity::{AckKey, Action, ClockNanos, Document, Step};

use super::{Parts, Prepared, fork_marks::ForkMarks, identity_dir, network};
use crate::state::{AgentState, Identity, Phase};

/// What was done, in order.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) steps: Vec<Step>,
}

/// A step that failed; the text names it.
#[derive(Debug)]
pub(super) struct Failed(pub(super) String);

impl Log {
    /// With room for all steps that are usual, so that it need not grow.
    pub(super) fn new() -> Self {
        Self { steps: Vec::with_capacity(32) }
    }

    /// Runs one step and keeps what it did and how long it took.
    pub(super) fn step<E: Display>(
        &mut self,
        name: &str,
        run: impl FnOnce() -> Result<Cow<'static, str>, E>,
    ) -> Result<(), Failed> {
        let started = Instant::now();
        let result = run();
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let outcome = match &result {
            Ok(outcome) => outcome.clone().into_owned(),
            Err(_) => "failed".to_owned(),
        };
        self.steps.push(Step { name: name.to_owned(), outcome, micros });
        result.map(|_| ()).map_err(|error| Failed(format!("{name}: {error}")))
    }
}

/// A fork that seems to have been busy for longer has a clock that did not stand still while nothing ran.
const BUSY_AT_MOST: Duration = Duration::from_secs(30);

/// Everything before the thaw, and the thaw, which a rehearsal does not come to. The guest was captured at `captured` on its own clock, which stood still
/// until it ran again.
pub(super) fn until_thaw(
    state: &Arc<AgentState>,
    parts: &Parts,
    prepared: &mut Prepared,
    document: &mut Document,
    key: &AckKey,
    captured: Instant,
    log: &mut Log,
) -> Result<(), Failed> {
    log.step("clock", || {
        // The host wrote down the time just before it let this guest run, which has been busy since.
        let since = Some(captured.elapsed()).filter(|since| *since < BUSY_AT_MOST).unwrap_or_default();
        let since = u64::try_from(since.as_nanos()).unwrap_or(0);
        parts.kernel.set_clock(ClockNanos(document.wall_clock.0.saturating_add(since)))
    })?;
    log.step("entropy", || parts.kernel.add_entropy(document.entropy.expose()))?;
    document.entropy.wipe();
    match document.action {
        Action::Rehearse if prepared.captured.is_none() => {
            return Err(Failed("this guest can not put back what a rehearsal changes".to_owned()));
        }
        Action::Become | Action::Rehearse => {
            if let Some(expected) = state.expected() {
                expected.complete(document);
            }
            take_on(state, parts, prepared, document, key, log)?;
        }
        Action::Continue => {
            log.step("files", || std::mem::take(&mut prepared.blanks).put_back(parts).map(|()| "kept".into()))?;
            parts.handoff.restore(log)?;
            if let Some(sealed) = prepared.sealed.take() {
                let count = sealed.count();
                log.step("secrets", || {
                    sealed.open(&parts.identity, document.unseal()).map(|()| counted(count, "-opened"))
                })?;
            }
        }
    }
    // A rehearsal draws nothing.
    if !prepared.fork_marks.is_empty() && document.action != Action::Rehearse {
        let marks = std::mem::take(&mut prepared.fork_marks);
        log.step("fork-marks", || {
            marks.iter().try_for_each(ForkMarks::wipe).map(|()| counted(marks.len(), "-processes-wiped"))
        })?;
    }
    if document.action == Action::Become {
        log.steps.extend(state.supervisor().hooks_before_thaw().map_err(Failed)?);
    }
    let started = Instant::now();
    if let Some(outcome) = state.supervisor().before_thaw() {
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        log.steps.push(Step { name: "runtime-memory".into(), outcome: outcome.into(), micros });
    }
    if document.action == Action::Rehearse {
        return Ok(());
    }
    log.step("thaw", || {
        // From here on processes may be started again: they are started as the new identity.
        state.set_phase(Phase::Running);
        // Through the descriptor, with the call that wrote the files: both are translated by now.
        rustix::io::pwrite(&parts.freezer, b"0", 0)?;
        state.workload().open();
        Ok::<_, io::Error>(if state.freeze() == crate::Freeze::On { "thawed" } else { "was-not-frozen" }.into())
    })
}

fn take_on(
    state: &Arc<AgentState>,
    parts: &Parts,
    prepared: &mut Prepared,
    document: &Document,
    key: &AckKey,
    log: &mut Log,
) -> Result<(), Failed> {
    let fork = &document.fork;
    let blanks = std::mem::take(&mut prepared.blanks);
    log.step("hostname", || -> io::Result<_> {
        rustix::system::sethostname(fork.hostname.as_str().as_bytes())?;
        blanks.hostname(&parts.root, &[fork.hostname.as_str(), "\n"].concat())?;
        blanks.hosts(&parts.root, &[prepared.hosts.as_str(), "127.0.1.1\t", fork.hostname.as_str(), "\n"].concat())?;
        Ok("set".into())
    })?;
    log.step("machine-id", || -> io::Result<_> {
        let line = [fork.machine_id.as_str(), "\n"].concat();
        blanks.machine_id(&parts.root, &line)?;
        // It is replaced, not filled: no rehearsal could put it back.
        if prepared.dbus_machine_id && document.action == Action::Become {
            parts.root.write(DBUS_MACHINE_ID, 0o444, line.as_bytes())?;
        }
        Ok("set".into())
    })?;
    log.step("boot-id", || parts.kernel.set_boot_id(&fork.boot_id))?;
    network::take_on(state, parts, blanks.resolv_conf(), document, key, log)?;
    let before = state.identity().map(|identity| identity.limits).unwrap_or_default();
    log.step("limits", || parts.cgroup.set_limits(before, document.limits))?;
    log.step("identity-dir", || -> io::Result<_> {
        let payload = state.expected().and_then(|expected| expected.payload_of(&document.labels)).unwrap_or_default();
        let entries = identity_dir::plan(document, &payload);
        prepared.written = parts.identity.write(&prepared.written, &entries, blanks.identity())?;
        prepared.sealed = None;
        Ok(counted(entries.len(), "-files"))
    })?;
    if !document.files.is_empty() {
        log.step("files", || -> io::Result<_> {
            for file in &document.files {
                parts
                    .root
                    .write(&file.path, file.mode, file.content.expose())
                    .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.path)))?;
            }
            Ok(counted(document.files.len(), "-files"))
        })?;
    }
    if !prepared.host_keys.is_empty() {
        log.step("ssh-host-keys", || -> io::Result<_> {
            for path in &prepared.host_keys {
                parts.root.wipe(path)?;
            }
            Ok("removed".into())
        })?;
    }
    // Closing takes its time, and nobody waits for it: at the next capture, or never.
    prepared.filled = blanks;
    log.step("environment", || -> Result<_, io::Error> {
        state.set_identity(Arc::new(Identity::of(document, state.expected().map(Arc::as_ref))));
        Ok(counted(document.env.len(), "-variables"))
    })
}

/// An outcome with a number. (Text is put together, not formatted, on a fork's way to its ack: the formatting's code
/// would be translated for it.)
fn counted(count: usize, what: &str) -> Cow<'static, str> {
    [count.to_string().as_str(), what].concat().into()
}

pub(super) const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";

/// The lines of `/etc/hosts` that do not give the machine's own name.
pub(super) fn hosts_without_own_name(hosts: &str) -> String {
    let mut kept = String::with_capacity(hosts.len());
    for line in hosts.lines().filter(|line| line.split_whitespace().next() != Some("127.0.1.1")) {
        kept.push_str(line);
        kept.push('\n');
    }
    if !kept.lines().any(|line| line.split_whitespace().next() == Some("127.0.0.1")) {
        kept.insert_str(0, "127.0.0.1\tlocalhost\n");
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_keep_all_but_the_machines_own_name() {
        let given = "127.0.0.1 localhost\n127.0.1.1 old\n127.0.1.10 other\n::1 localhost";
        assert_eq!(hosts_without_own_name(given), "127.0.0.1 localhost\n127.0.1.10 other\n::1 localhost\n");
        assert_eq!(hosts_without_own_name(""), "127.0.0.1\tlocalhost\n");
    }

    #[test]
    fn a_failed_step_is_in_the_log_and_named() {
        let mut log = Log::new();
        assert!(log.step("clock", || Ok::<_, io::Error>("set".into())).is_ok());
        let failed = log.step("entropy", || Err(io::Error::from(io::ErrorKind::PermissionDenied)));
        assert_eq!(failed.err().map(|f| f.0), Some("entropy: permission denied".to_owned()));
        let outcomes: Vec<_> = log.steps.iter().map(|step| (step.name.as_str(), step.outcome.as_str())).collect();
        assert_eq!(outcomes, [("clock", "set"), ("entropy", "failed")]);
    }
}
