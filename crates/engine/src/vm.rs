//! A machine's life, held by types.

use std::{fmt, path::Path, time::Duration};

use identity::{AckKey, Secret};
use memory::Mailbox;
use thiserror::Error;

use crate::{AckStream, EngineError, ProcessRef};

/// A template's machine while it is being built: it runs, and has no identity.
pub trait BootedVm: Send + fmt::Debug {
    /// Its process.
    fn process(&self) -> &ProcessRef;

    /// The guest's end of the ack port: the agent says here when it is armed.
    fn ack_stream(&self) -> &AckStream;

    /// Stops the virtual CPUs.
    ///
    /// # Errors
    /// [`EngineError`].
    fn pause(&mut self) -> Result<(), EngineError>;

    /// Writes the device state (to `state_file`) and ends the machine; its memory file is complete then.
    ///
    /// # Errors
    /// [`EngineError`]; the machine is ended all the same.
    fn capture(self: Box<Self>, state_file: &Path) -> Result<(), EngineError>;
}

/// A machine that has loaded a template and waits, stopped and without identity, for whoever
/// [adopts](crate::Engine::adopt) it. Its process ends with this value unless it is [released](SpareVm::release).
#[derive(Debug)]
pub struct SpareVm(Box<dyn SpareBackend>);

/// What an engine does for a spare machine.
pub(crate) trait SpareBackend: Send + fmt::Debug {
    fn process(&self) -> &ProcessRef;
    fn release(self: Box<Self>);
}

impl SpareVm {
    pub(crate) fn new(backend: Box<dyn SpareBackend>) -> Self {
        Self(backend)
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &ProcessRef {
        self.0.process()
    }

    /// Lets it live on without this value.
    pub fn release(self) {
        self.0.release();
    }
}

/// What goes into one mailbox of a fork.
#[derive(Debug)]
pub struct Letter<'a> {
    /// Where, as the capture found it.
    pub mailbox: &'a Mailbox,
    /// What.
    pub payload: Secret,
    /// This mailbox's ack key.
    pub ack_key: AckKey,
}

/// Why letters could not be delivered. The machine never ran, and is gone.
#[derive(Debug, Error)]
pub enum DeliverError {
    /// The fork's memory refused.
    #[error("the identity could not be written into the fork's memory")]
    Memory(#[from] memory::PatchError),
}

/// What an engine does for a machine that does not run yet. Not public: the states below are the only way to it.
pub(crate) trait PausedBackend: Send + fmt::Debug {
    fn process(&self) -> &ProcessRef;
    /// Checks every marker, then writes every letter: all or nothing.
    fn patch(&mut self, letters: &[Letter<'_>]) -> Result<(), DeliverError>;
    fn resume(self: Box<Self>) -> Result<RunningVm, EngineError>;
}

/// A restored machine that does not run and has no identity yet.
///
/// It can not run: there is no `resume` on it.
///
/// ```compile_fail
/// fn run(vm: offshoot_engine::PausedVm) {
///     vm.resume();
/// }
/// ```
#[derive(Debug)]
pub struct PausedVm(Box<dyn PausedBackend>);

impl PausedVm {
    pub(crate) fn new(backend: Box<dyn PausedBackend>) -> Self {
        Self(backend)
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &ProcessRef {
        self.0.process()
    }

    /// Writes the identity, and what callers sent to their mailboxes, into the machine's private memory. Every marker is
    /// checked before the first byte is written.
    ///
    /// # Errors
    /// [`DeliverError`]; the machine is destroyed.
    pub fn deliver(self, identity: Letter<'_>, others: Vec<Letter<'_>>) -> Result<SealedVm, DeliverError> {
        let mut backend = self.0;
        let letters: Vec<Letter<'_>> = std::iter::once(identity).chain(others).collect();
        backend.patch(&letters)?;
        Ok(SealedVm(backend))
    }
}

/// A machine that has its identity in memory and does not run yet.
///
/// It can not be patched again:
///
/// ```compile_fail
/// fn patch(vm: offshoot_engine::SealedVm, letter: offshoot_engine::Letter<'_>) {
///     vm.deliver(letter, Vec::new());
/// }
/// ```
#[derive(Debug)]
pub struct SealedVm(Box<dyn PausedBackend>);

impl SealedVm {
    /// Its process.
    #[must_use]
    pub fn process(&self) -> &ProcessRef {
        self.0.process()
    }

    /// Lets it run.
    ///
    /// # Errors
    /// [`EngineError`]; the machine is destroyed.
    pub fn resume(self) -> Result<RunningVm, EngineError> {
        self.0.resume()
    }
}

/// A machine that runs. It outlives this value: dropping it leaves the machine alone.
#[derive(Debug)]
pub struct RunningVm {
    /// Its process.
    pub process: ProcessRef,
    /// The host's end of the ack port.
    pub ack_stream: AckStream,
    /// None if another process started it as a spare.
    pub(crate) child: Option<std::process::Child>,
}

impl RunningVm {
    /// Kills the machine and waits for its end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn destroy(self) -> std::io::Result<()> {
        self.process.kill(Duration::from_secs(10))?;
        if let Some(mut child) = self.child {
            child.wait()?;
        }
        Ok(())
    }
}
