//! Keeps the promise: freezes the workload before the capture, and in each fork applies the identity before it thaws it.

mod ack_port;
mod apply;
mod identity_dir;
mod kernel;
mod network;
mod pages;
mod prepare;
mod resume;
pub mod root;
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
};
use rustix::{
    fs::{Mode, OFlags},
    time::ClockId,
};
use thiserror::Error;

pub use self::{
    ack_port::AckPort,
    network::{ReconfigureError, reconfigure},
    pages::{Pages, fresh_nonce},
};
use self::{kernel::Kernel, root::Root};
use crate::{
    Freeze,
    boot::mounts,
    cgroup::Cgroup,
    console,
    mailboxes::Mailboxes,
    state::{AgentState, Phase},
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
    /// Whether the keeper's thread has to wait for an identity now.
    armed: Mutex<bool>,
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
    /// What was found, for people.
    pub warnings: Vec<String>,
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
            armed: Mutex::new(false),
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
/// answer; the keeper's thread waits for the identity from now on, and lets the answer out first.
///
/// # Errors
/// [`QuiesceError`]; the workload then runs on as before.
pub fn quiesce(state: &Arc<AgentState>, timeout: Duration) -> Result<Quiesced, QuiesceError> {
    let before = state.phase();
    let Some(parts) = &state.keeper().parts else { return Err(QuiesceError::Phase("not in a guest")) };
    if !matches!(before, Phase::Template | Phase::Running) || !state.change_phase(before, Phase::Quiesced) {
        return Err(QuiesceError::Phase(state.phase().as_str()));
    }
    let result = freeze_and_arm(state, parts, before, Instant::now() + timeout);
    match &result {
        Ok(_) => {
            *lock(&parts.armed) = true;
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
        }
    }
    result
}

fn freeze_and_arm(
    state: &Arc<AgentState>,
    parts: &Parts,
    before: Phase,
    deadline: Instant,
) -> Result<Quiesced, QuiesceError> {
    let step = |step: &'static str| move |error: io::Error| QuiesceError::Step { step, reason: error.to_string() };
    let mut warnings = state.supervisor().prepare_quiesce(deadline).map_err(QuiesceError::Service)?;
    // A process that is being started now would freeze before its exec, and its starter would wait for it.
    state.workload().close();
    if state.freeze() == Freeze::On {
        prepare::no_stragglers().map_err(step("looking for processes outside the workload's cgroup"))?;
        parts.cgroup.freeze(deadline).map_err(step("freezing the workload"))?;
        state.supervisor().mark_frozen();
    }
    let frozen_wall_ns = clock(ClockId::Realtime);
    let frozen_monotonic_ns = clock(ClockId::Monotonic);
    let quieted = parts
        .handoff
        .quiesce(before == Phase::Template)
        .map_err(|error| QuiesceError::Step { step: "taking the network away", reason: error.to_string() })?;
    if quieted.ended > 0 {
        warnings.push(format!("{} connections to the outside were ended", quieted.ended));
    }
    {
        let mut prepared = lock(&parts.prepared);
        prepare::look_ahead(parts, &mut prepared);
        if before == Phase::Template && !prepared.host_keys.is_empty() {
            for path in std::mem::take(&mut prepared.host_keys) {
                parts.root.wipe(&path).map_err(step("removing the SSH host keys"))?;
            }
            warnings.push(
                "the template's SSH host keys were removed; each fork makes its own if ssh-keygen is there".to_owned(),
            );
        }
    }
    rustix::fs::sync();
    prepare::lock_memory();

    let nonce = fresh_nonce().map_err(step("making a nonce"))?;
    let name = MailboxName::identity();
    lock(&parts.own)
        .arm(&name, b"", nonce, MAX_CAPACITY)
        .map_err(|error| QuiesceError::Step { step: "arming the mailbox", reason: error.to_string() })?;
    let mut mailboxes = vec![Planted { name, nonce, capacity: MAX_CAPACITY, planted_by: "agent" }];
    mailboxes.extend(state.keeper().mailboxes.arm().map_err(step("arming the mailboxes of guest software"))?);
    Ok(Quiesced { mailboxes, frozen_wall_ns, frozen_monotonic_ns, warnings })
}

fn clock(clock: ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
