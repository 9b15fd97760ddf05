//! A machine's life, held by types.

use std::{fmt, path::Path, time::Duration};

use identity::{AckKey, Action, Document, Secret, mailbox::Page};
use memory::{DeltaSize, Mailbox};
use thiserror::Error;

use crate::{AckStream, EngineError, ProcessRef, fork_memory::ForkMemory};

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

    /// Writes the one letter that a machine may run for without becoming a fork, and lets it run. Only for engines that
    /// [can](crate::Capabilities::rehearse).
    fn run_rehearsal(&mut self, letter: &Letter<'_>) -> Result<(), RehearseError> {
        let _ = letter;
        Err(cannot_rehearse().into())
    }

    /// The host's end of the ack port.
    fn ack_stream(&self) -> Result<&AckStream, EngineError> {
        Err(cannot_rehearse())
    }

    /// Stops it again.
    fn stop(&mut self) -> Result<(), EngineError> {
        Err(cannot_rehearse())
    }
}

fn cannot_rehearse() -> EngineError {
    EngineError::Refused {
        during: "a rehearsal",
        reason: "a worker's machine is written to before its first run only".into(),
    }
}

/// The letter of a rehearsal: what it holds lets nobody of the workload run.
///
/// It can not be made of anything else, so a spare runs for nothing else:
///
/// ```compile_fail
/// fn pass_off<'a>(letter: offshoot_engine::Letter<'a>) -> offshoot_engine::Rehearsal<'a> {
///     offshoot_engine::Rehearsal(letter)
/// }
/// ```
#[derive(Debug)]
pub struct Rehearsal<'a>(Letter<'a>);

impl<'a> Rehearsal<'a> {
    /// `None` if the document is not a good one, or says anything else than to rehearse.
    #[must_use]
    pub fn of(mailbox: &'a Mailbox, document: &Document) -> Option<Self> {
        (document.action == Action::Rehearse && document.check().is_ok()).then(|| {
            Self(Letter { mailbox, payload: document.to_bytes(), ack_key: document.ack_key.for_mailbox(&mailbox.name) })
        })
    }
}

/// Why a spare machine did not rehearse. It is gone.
#[derive(Debug, Error)]
pub enum RehearseError {
    /// The letter could not be delivered.
    #[error(transparent)]
    Deliver(#[from] DeliverError),
    /// It could not be run or stopped.
    #[error(transparent)]
    Engine(#[from] EngineError),
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

    /// Lets the guest rehearse an identity. It runs until `waits_again`, which is given what it says on its ack port, finds that it has
    /// put everything back; then it is stopped and a spare as before.
    ///
    /// # Errors
    /// [`RehearseError`], or that of `waits_again`; the machine is destroyed.
    pub fn rehearse<E: From<RehearseError>>(
        mut self,
        rehearsal: &Rehearsal<'_>,
        waits_again: impl FnOnce(&AckStream) -> Result<(), E>,
    ) -> Result<Self, E> {
        self.0.run_rehearsal(&rehearsal.0)?;
        waits_again(self.0.ack_stream().map_err(RehearseError::from)?)?;
        self.0.stop().map_err(RehearseError::from)?;
        Ok(self)
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

/// What a capture of a fork writes. Neither file is there before.
#[derive(Debug, Clone, Copy)]
pub struct CaptureFiles<'a> {
    /// The pages that the fork has for itself: see [`memory::delta`].
    pub delta: &'a Path,
    /// The state of its devices.
    pub state: &'a Path,
    /// The id of its template, which the delta names.
    pub template_id: &'a str,
}

/// What an engine does for a fork that it captures.
pub(crate) trait HeldBackend: Send + fmt::Debug {
    fn ack_stream(&self) -> &AckStream;
    fn is_stopped(&mut self) -> Result<bool, EngineError>;
    fn stop(&mut self) -> Result<(), EngineError>;
    fn save_devices(&mut self, path: &Path) -> Result<(), EngineError>;
    fn memory(&self) -> &ForkMemory;
    fn go_on(&mut self) -> Result<(), EngineError>;
}

/// A fork that somebody took [hold](crate::Engine::hold) of. Whatever becomes of this value, the machine goes on as it was.
#[derive(Debug)]
pub struct HeldVm(Box<dyn HeldBackend>);

impl HeldVm {
    pub(crate) fn new(backend: Box<dyn HeldBackend>) -> Self {
        Self(backend)
    }

    /// The host's end of the ack port.
    #[must_use]
    pub fn ack_stream(&self) -> &AckStream {
        self.0.ack_stream()
    }

    /// Whether its virtual CPUs stand still.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn is_stopped(&mut self) -> Result<bool, EngineError> {
        self.0.is_stopped()
    }

    /// Stops its virtual CPUs, if they run.
    ///
    /// # Errors
    /// [`EngineError`]; it may stand still, and whoever takes hold of it next finds out.
    pub fn stop(mut self) -> Result<StoppedVm, EngineError> {
        self.0.stop()?;
        Ok(StoppedVm(self.0))
    }
}

/// A fork whose virtual CPUs stand still, and do so until it [goes on](SealedSource::go_on), whatever becomes of this value.
#[derive(Debug)]
pub struct StoppedVm(Box<dyn HeldBackend>);

impl StoppedVm {
    /// Writes the pages that it has for itself, and its devices. `seen` is shown every one of these pages with its offset.
    ///
    /// # Errors
    /// [`EngineError`]; the files may be there in part.
    pub fn capture(
        &mut self,
        files: CaptureFiles<'_>,
        mut seen: impl FnMut(u64, &Page),
    ) -> Result<DeltaSize, EngineError> {
        // The devices first: a machine may change its memory as it comes to rest, never the other way round.
        self.0.save_devices(files.state)?;
        self.0.memory().write_own(files, &mut seen)
    }

    /// Shows the pages that it has for itself, and writes nothing.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn scan(&mut self, mut seen: impl FnMut(u64, &Page)) -> Result<(), EngineError> {
        self.0.memory().scan_own(&mut seen)
    }

    /// Whether its own mailbox has been filled, and not been taken yet: by whoever held it before.
    ///
    /// # Errors
    /// [`DeliverError`].
    pub fn is_filled(&self, mailbox: &Mailbox) -> Result<bool, DeliverError> {
        Ok(memory::is_filled(self.0.memory().process_memory(), mailbox)?)
    }

    /// Tells it to go on as who it is.
    ///
    /// # Errors
    /// [`DeliverError`]; nothing was written, but by a write that failed in the middle.
    pub fn deliver(self, letter: &Letter<'_>) -> Result<SealedSource, DeliverError> {
        self.0.memory().process_memory().fill(&[(letter.mailbox, letter.payload.expose(), &letter.ack_key)])?;
        Ok(SealedSource(self.0))
    }

    /// It [was told already](Self::is_filled).
    #[must_use]
    pub fn was_told(self) -> SealedSource {
        SealedSource(self.0)
    }
}

/// A fork that stands still and has been told to go on as who it is.
#[derive(Debug)]
pub struct SealedSource(Box<dyn HeldBackend>);

impl SealedSource {
    /// Lets it run.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn go_on(mut self) -> Result<HeldVm, EngineError> {
        self.0.go_on()?;
        Ok(HeldVm(self.0))
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

impl Drop for RunningVm {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            crate::process::leave(child);
        }
    }
}

impl RunningVm {
    /// Kills the machine and waits for its end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn destroy(mut self) -> std::io::Result<()> {
        self.process.kill(Duration::from_secs(10))?;
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }
}
