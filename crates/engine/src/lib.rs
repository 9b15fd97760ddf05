//! What an engine is, and the engines.
//!
//! An [`Engine`] boots templates, captures them and restores forks. The order of a fork's life is held by types:
//!
//! ```text
//! Engine::restore ─► PausedVm ─deliver(identity, …)─► SealedVm ─resume─► RunningVm
//! ```
//!
//! A fork that runs can be captured, and goes on afterwards:
//!
//! ```text
//! Engine::hold ─► HeldVm ─stop─► StoppedVm (capture) ─deliver(continue)─► SealedSource ─go_on─► HeldVm
//! ```
//!
//! A machine that was [prepared](Engine::prepare) ahead of time, a [`SpareVm`], comes in by [`Engine::adopt`] as a [`PausedVm`].
//!
//! Only a [`SealedVm`] can run, and only delivering an identity makes one; a machine that runs can not be patched. The one exception is
//! [`SpareVm::rehearse`]: a spare may run for a [`Rehearsal`], by which no workload runs, and is stopped again before anybody has it.
//! A [`PausedVm`] or [`SealedVm`] that is dropped takes its process with it.

mod ack_stream;
mod fork_memory;
pub mod kvm;
mod kvm_state;
mod machine_dir;
mod machine_process;
pub mod process;
pub mod qemu;
mod spec;
mod vm;

pub use ack_stream::AckStream;
pub use kvm_state::{KvmState, obstacle};
pub use machine_dir::{CONSOLE, CONTROL_CHANNELS, LOG, MONITOR_SOCKET};
pub use process::ProcessRef;
pub use spec::{
    Accel, BootSpec, Capabilities, Confinement, EngineInfo, EngineName, HoldSpec, Machine, NetworkEnd, RestoreSpec,
};
pub use vm::{
    BootedVm, CaptureFiles, DeliverError, HeldVm, Letter, PausedVm, Rehearsal, RehearseError, RunningVm, SealedSource,
    SealedVm, SpareVm, StoppedVm,
};

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

/// Why an engine could not do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The engine's program is not there.
    #[error("{program} was not found; install it (on Debian: apt-get install {package}) or see `offshoot doctor`")]
    Missing {
        /// The program.
        program: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// The worker's program is not there.
    #[error(
        "offshoot-vmm was not found (looked for {}); build it with: cargo build --release -p offshoot-vmm — and name it in OFFSHOOT_VMM",
        list(places)
    )]
    NoWorker {
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },
    /// The program could not be started.
    #[error("{program} could not be started")]
    Spawn {
        /// The program.
        program: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file the machine needs could not be opened or made.
    #[error("{what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The machine's process ended; its last words are kept.
    #[error("the machine's process ended while {during}; it said: {last_words}")]
    Died {
        /// What was going on.
        during: &'static str,
        /// The end of its log, cleaned for a terminal.
        last_words: String,
    },
    /// The machine's process did not do something in time.
    #[error("the machine's process did not finish {during} within {} ms", limit.as_millis())]
    Timeout {
        /// What was going on.
        during: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The machine's process refused a command.
    #[error("the machine's process refused {during}: {reason}")]
    Refused {
        /// What was going on.
        during: &'static str,
        /// Its reason.
        reason: String,
    },
    /// What a captured fork had for itself can not be put above its template.
    #[error(transparent)]
    Delta(#[from] memory::DeltaError),
    /// Talking to the machine's process failed.
    #[error("the connection to the machine's process failed while {during}")]
    Control {
        /// What was going on.
        during: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Something that runs sandboxes.
pub trait Engine: Send + Sync + std::fmt::Debug {
    /// Which engine, which version, with what acceleration.
    fn info(&self) -> &EngineInfo;

    /// What it can do. Callers ask before they begin; a request that needs more is refused at the door.
    fn capabilities(&self) -> Capabilities;

    /// Boots a template from a kernel and a root image.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is left running.
    fn boot(&self, spec: &BootSpec<'_>) -> Result<Box<dyn BootedVm>, EngineError>;

    /// Loads a captured template as a new machine that does not run.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is left running.
    fn restore(&self, spec: &RestoreSpec<'_>) -> Result<PausedVm, EngineError>;

    /// Does the same ahead of time, for a fork that is not asked for yet.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is left running.
    fn prepare(&self, spec: &RestoreSpec<'_>) -> Result<SpareVm, EngineError>;

    /// Takes over a spare machine that some process [prepared](Self::prepare) and released. `spec` is the one it was
    /// prepared with, but for the directory's name.
    ///
    /// # Errors
    /// [`EngineError`]; the machine may still be there, and must be ended by the caller.
    fn adopt(&self, spec: &RestoreSpec<'_>, process: &ProcessRef) -> Result<PausedVm, EngineError>;

    /// Takes hold of a fork that some process started, to capture it.
    ///
    /// # Errors
    /// [`EngineError`]; the fork goes on as it was.
    fn hold(&self, spec: &HoldSpec<'_>, process: &ProcessRef) -> Result<HeldVm, EngineError>;

    /// The pages that a fork has copied for itself so far, as contents of the file that later forks of the template can be
    /// [given](RestoreSpec::pages_file), so that they have these pages before they run. `None` if the engine has no use for it.
    ///
    /// # Errors
    /// If the process can not be looked at.
    fn pages_to_have_ready(
        &self,
        memory_file: &Path,
        machine: Machine,
        process: &ProcessRef,
    ) -> Result<Option<Vec<u8>>, EngineError> {
        let _ = (memory_file, machine, process);
        Ok(None)
    }
}
