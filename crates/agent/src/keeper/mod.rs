//! Keeps the promise: freezes the workload before the capture, and in each fork applies the identity before it thaws it.

mod ack_port;
mod apply;
pub(crate) mod audit;
mod fork_marks;
mod identity_dir;
mod kernel;
mod network;
mod pages;
mod prepare;
mod rehearsal;
mod resume;
pub mod root;
mod secrets;
mod tick;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use identity::{
    MailboxName,
    mailbox::{MAX_CAPACITY, Nonce},
    seal::SealKey,
};
use rustix::{
    fs::{Mode, OFlags},
    time::ClockId,
};
use thiserror::Error;

pub(crate) use self::audit::Findings;
pub use self::{
    ack_port::AckPort,
    network::{ReconfigureError, reconfigure},
    pages::{Pages, fresh_nonce},
};
use self::{
    audit::{Audit, Kind},
    kernel::Kernel,
    root::Root,
};
use crate::{
    Freeze,
    boot::mounts,
    cgroup::Cgroup,
    console,
    mailboxes::Mailboxes,
    state::{AgentState, Identity, Phase},
    workload::Place,
};

/// The part of the agent that waits for an identity.
#[derive(Debug)]
pub struct Keeper {
    /// `None` only in tests outside a guest.
    parts: Option<Parts>,
    mailboxes: Mailboxes,
}

#[derive(Debug)]
struct Parts {
    cgroup: Cgroup,
    root: Root,
    identity: identity_dir::Directory,
    kernel: Kernel,
    /// The workload's `cgroup.freeze`.
    freezer: OwnedFd,
    ack: AckPort,
    handoff: network::Handoff,
    /// The kernel's timer, where it can be held.
    tick: Option<tick::Tick>,
    /// The agent's own mailbox.
    own: Mutex<Pages>,
    prepared: Mutex<Prepared>,
    /// The answer to the quiesce that holds, once it is complete: whoever asks again gets it again.
    quiesced: Mutex<Option<Quiesced>>,
    /// The keeper's thread has to wait for an identity now, once it has come to this rest.
    armed: Mutex<Option<resume::Rest>>,
    armed_changed: Condvar,
}

/// What was found out before the capture, so that the resume need not.
#[derive(Debug, Default)]
struct Prepared {
    /// `/etc/hosts` without the machine's own name.
    hosts: String,
    /// The files that a new identity fills, open and empty.
    blanks: prepare::Blanks,
    /// Those of the last capture, which the identity has filled.
    filled: prepare::Blanks,
    /// Whether there is a second copy of the machine id.
    dbus_machine_id: bool,
    /// SSH host keys that are there now; a new identity removes them.
    host_keys: Vec<String>,
    /// Whether there have been host keys.
    had_host_keys: bool,
    /// Whether a new identity makes its own: there have been some, and there is the program that makes them.
    wants_host_keys: bool,
    /// Files in the identity directory.
    written: Vec<String>,
    /// Those of them that are sealed until somebody goes on.
    sealed: Option<secrets::SealedSecrets>,
    /// What processes have wiped when they are copied.
    fork_marks: Vec<fork_marks::ForkMarks>,
    /// What a rehearsal puts back; absent where there can be none.
    captured: Option<rehearsal::Captured>,
}

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
    /// What was noticed, for people, that is no finding.
    pub warnings: Vec<String>,
    /// What the audit has found; absent where none was made: only a template is audited.
    pub(crate) audit: Option<Findings>,
    /// How many secrets are sealed.
    pub sealed: usize,
    /// Whether what is captured can rehearse.
    pub can_rehearse: bool,
    /// What took how long, in order.
    pub steps: Vec<(&'static str, Duration)>,
}

/// Times one step after the other.
#[derive(Debug)]
struct Stopwatch {
    last: Instant,
    steps: Vec<(&'static str, Duration)>,
}

impl Stopwatch {
    fn start() -> Self {
        Self { last: Instant::now(), steps: Vec::new() }
    }

    fn step(&mut self, name: &'static str) {
        let now = Instant::now();
        self.steps.push((name, now - self.last));
        self.last = now;
    }
}

impl Keeper {
    /// What keeps `place`, and answers on the (open) ack port.
    ///
    /// # Errors
    /// If something that the resume needs can not be opened.
    pub fn new(ack_port: OwnedFd, place: &Place) -> io::Result<Self> {
        let parts = Parts {
            cgroup: place.cgroup.clone(),
            root: Root::new(place.root.try_clone()?),
            identity: identity_dir::Directory::open(mounts::IDENTITY)?,
            kernel: Kernel::open()?,
            freezer: rustix::fs::open(
                place.cgroup.path().join("cgroup.freeze"),
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )?,
            ack: AckPort::new(ack_port)?,
            handoff: network::Handoff::open()?,
            tick: tick::Tick::open(),
            own: Mutex::new(Pages::new(MAX_CAPACITY)?),
            prepared: Mutex::default(),
            quiesced: Mutex::default(),
            armed: Mutex::default(),
            armed_changed: Condvar::new(),
        };
        Ok(Self { parts: Some(parts), mailboxes: Mailboxes::default() })
    }

    /// A keeper that can not quiesce: for tests outside a guest.
    #[must_use]
    pub fn bare() -> Self {
        Self { parts: None, mailboxes: Mailboxes::default() }
    }

    /// The mailboxes of guest software.
    #[must_use]
    pub fn mailboxes(&self) -> &Mailboxes {
        &self.mailboxes
    }

    /// Writes what an identity's payload adds to the identity directory. Nothing where there is none.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn write_payload(&self, identity: &Identity) -> io::Result<()> {
        if let (Some(parts), Some(payload)) = (&self.parts, &identity.payload) {
            let mut prepared = lock(&parts.prepared);
            let new = parts.identity.complete(identity, payload, &prepared.written)?;
            prepared.written.extend(new);
        }
        Ok(())
    }

    /// Sends a line on the ack port.
    ///
    /// # Errors
    /// If the host does not take it until the deadline.
    pub fn send_ack(&self, line: &str, deadline: Instant) -> io::Result<()> {
        self.parts.as_ref().ok_or(io::ErrorKind::NotConnected)?.ack.send(line, deadline)
    }
}

/// Starts the keeper's thread.
///
/// # Errors
/// If it can not be started.
pub fn start(state: &Arc<AgentState>) -> io::Result<()> {
    let state = Arc::clone(state);
    std::thread::Builder::new().name("keeper".into()).stack_size(1 << 20).spawn(move || {
        if let Some(parts) = &state.keeper().parts {
            resume::run(&state, parts);
        }
    })?;
    Ok(())
}

/// Freezes the workload and arms the mailboxes. Blocks (at most `timeout`). When it has returned, the caller sends the
/// answer; the keeper's thread waits for the identity from now on, and lets the answer out first. One that is quiesced answers as it did:
/// whoever asked may have died before he could use it.
///
/// With a key, the secrets of a fork that runs are sealed for it.
///
/// # Errors
/// [`QuiesceError`]; the workload then runs on as before.
pub fn quiesce(
    state: &Arc<AgentState>,
    seal_key: Option<SealKey>,
    timeout: Duration,
) -> Result<Quiesced, QuiesceError> {
    let before = state.phase();
    let Some(parts) = &state.keeper().parts else { return Err(QuiesceError::Phase("not in a guest")) };
    if before == Phase::Quiesced
        && let Some(quiesced) = lock(&parts.quiesced).clone()
    {
        return Ok(quiesced);
    }
    if !matches!(before, Phase::Template | Phase::Running) || !state.change_phase(before, Phase::Quiesced) {
        return Err(QuiesceError::Phase(state.phase().as_str()));
    }
    *lock(&parts.quiesced) = None;
    let result = freeze_and_arm(state, parts, before, seal_key, Instant::now() + timeout);
    match &result {
        Ok(quiesced) => {
            *lock(&parts.quiesced) = Some(quiesced.clone());
            let rest = if before == Phase::Template { resume::OF_TEMPLATE } else { resume::OF_FORK };
            *lock(&parts.armed) = Some(rest);
            parts.armed_changed.notify_one();
        }
        Err(_) => {
            let blanks = std::mem::take(&mut lock(&parts.prepared).blanks);
            if let Err(error) = blanks.put_back(parts) {
                console::warn(&format!("the host's name could not be written back: {error}"));
            }
            if let Err(error) = parts.handoff.network.restore() {
                console::warn(&format!("the network could not be given back after a failed quiesce: {error}"));
            }
            // Thawing what is not frozen does nothing.
            if let Err(error) = parts.cgroup.thaw() {
                console::warn(&format!("the workload could not be thawed after a failed quiesce: {error}"));
            }
            state.workload().open();
            state.supervisor().abandon_quiesce();
            state.set_phase(before);
            state.announce_change();
        }
    }
    result
}

fn freeze_and_arm(
    state: &Arc<AgentState>,
    parts: &Parts,
    before: Phase,
    seal_key: Option<SealKey>,
    deadline: Instant,
) -> Result<Quiesced, QuiesceError> {
    let step = |step: &'static str| move |error: io::Error| QuiesceError::Step { step, reason: error.to_string() };
    let mut watch = Stopwatch::start();
    let uncovered = state.supervisor().prepare_quiesce(deadline).map_err(QuiesceError::Service)?;
    let mut warnings = Vec::new();
    watch.step("ask");
    // A process that is being started now would freeze before its exec, and its starter would wait for it.
    state.workload().close();
    if state.freeze() == Freeze::On {
        prepare::no_stragglers(parts.cgroup.path())
            .map_err(step("looking for processes outside the workload's cgroup"))?;
        parts.cgroup.freeze(deadline).map_err(step("freezing the workload"))?;
        state.supervisor().mark_frozen();
    }
    watch.step("freeze");
    let frozen_wall_ns = clock(ClockId::Realtime);
    let frozen_monotonic_ns = clock(ClockId::Monotonic);
    let frozen = state.freeze() == Freeze::On;
    let fork_marks = if frozen { fork_marks::find(parts.cgroup.path()) } else { Vec::new() };
    watch.step("fork-marks");
    // Before connections end: it names whose they are. A fork that runs is held up by its capture, so it is not audited.
    let mut audit = match before {
        Phase::Template if frozen => Some(look_for_hazards(state, parts, &fork_marks, &uncovered, deadline)?),
        _ => None,
    };
    watch.step("audit");
    let quieted = parts
        .handoff
        .quiesce(before == Phase::Template)
        .map_err(|error| QuiesceError::Step { step: "taking the network away", reason: error.to_string() })?;
    if quieted.ended > 0 {
        console::note(&format!("{} connections and sockets with the template's addresses were ended", quieted.ended));
    }
    watch.step("network");
    let can_rehearse = {
        let mut prepared = lock(&parts.prepared);
        prepare::look_ahead(parts, &mut prepared);
        prepared.fork_marks = fork_marks;
        prepared.captured = rehearsal::Captured::look(state.freeze(), before == Phase::Template, &prepared.blanks)
            .map_err(step("looking at what a rehearsal would change"))?;
        if before == Phase::Template && !prepared.host_keys.is_empty() {
            for path in std::mem::take(&mut prepared.host_keys) {
                parts.root.wipe(&path).map_err(step("removing the SSH host keys"))?;
            }
            if prepared.wants_host_keys {
                warnings.push("the template's SSH host keys were removed; each fork makes its own".to_owned());
            } else if let Some(audit) = &mut audit {
                audit.about_no_process(
                    Kind::SshHostKeys,
                    "the template's SSH host keys were removed, and it has no ssh-keygen: forks have no host keys",
                    "install ssh-keygen (Debian: openssh-client), or make keys in a service with on_fork = \"wait\"",
                );
            }
        }
        prepared.captured.is_some()
    };
    watch.step("look-ahead");
    rustix::fs::sync();
    watch.step("sync");
    prepare::lock_memory();
    watch.step("lock");

    let nonce = fresh_nonce().map_err(step("making a nonce"))?;
    let name = MailboxName::identity();
    lock(&parts.own)
        .arm(&name, b"", nonce, MAX_CAPACITY)
        .map_err(|error| QuiesceError::Step { step: "arming the mailbox", reason: error.to_string() })?;
    let mut mailboxes = vec![Planted { name, nonce, capacity: MAX_CAPACITY, planted_by: "agent" }];
    mailboxes.extend(state.keeper().mailboxes.arm().map_err(step("arming the mailboxes of guest software"))?);
    watch.step("arm");
    // Last: what fails after it would have to open them, and the key for that is not here.
    let sealed = match seal_key {
        Some(key) if before == Phase::Running => {
            let mut prepared = lock(&parts.prepared);
            prepared.sealed =
                secrets::seal(&parts.identity, &prepared.written, &key).map_err(step("sealing the secrets"))?;
            prepared.sealed.as_ref().map_or(0, secrets::SealedSecrets::count)
        }
        _ => 0,
    };
    watch.step("seal");
    let steps = watch.steps;
    Ok(Quiesced { mailboxes, frozen_wall_ns, frozen_monotonic_ns, warnings, audit, can_rehearse, sealed, steps })
}

/// The audit of a frozen template (docs/audit.md). It may take half of the time that is left, and no more.
fn look_for_hazards(
    state: &Arc<AgentState>,
    parts: &Parts,
    fork_marks: &[fork_marks::ForkMarks],
    uncovered: &[String],
    deadline: Instant,
) -> Result<Findings, QuiesceError> {
    let step = |reason: String| QuiesceError::Step { step: "auditing the template", reason };
    let audit = Audit {
        group: parts.cgroup.path().to_owned(),
        on_fork: state.supervisor().on_fork(),
        notice_copies: fork_marks.iter().map(fork_marks::ForkMarks::pid).collect(),
        staying: parts.handoff.network.staying_addresses().map_err(|error| step(error.to_string()))?,
    };
    let now = Instant::now();
    let mut findings =
        audit.run(now + deadline.saturating_duration_since(now) / 2).map_err(|error| step(error.to_string()))?;
    let runtime = state.supervisor().first_in_line().and_then(|process| u32::try_from(process.pid()).ok());
    for what in uncovered {
        findings.of_runtime(runtime.unwrap_or_default(), what);
    }
    Ok(findings)
}

fn clock(clock: ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
