//! A fork that runs, taken hold of: stopped, captured, and let go on.
//!
//! What its worker gives is the state; the pages are read from its mapping, as those of any engine.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use vmm::worker::protocol::{Phase, Request};

use super::{COMMAND_LIMIT, STATE_LIMIT, control::Control};
use crate::{
    AckStream, EngineError, HoldSpec, ProcessRef,
    fork_memory::{CAPTURING, ForkMemory, HOLDING, make},
    machine_dir,
    vm::HeldBackend,
};

/// A fork's worker. Nothing happens to it with this value.
#[derive(Debug)]
pub(super) struct Held {
    dir: PathBuf,
    control: Control,
    ack: AckStream,
    memory: ForkMemory,
}

impl Held {
    pub(super) fn take(spec: &HoldSpec<'_>, process: &ProcessRef) -> Result<Self, EngineError> {
        let memory = ForkMemory::open(spec, process)?;
        let (control, ack) =
            machine_dir::reconnect(spec.dir).map_err(|source| EngineError::Control { during: HOLDING, source })?;
        Ok(Self { dir: spec.dir.to_owned(), control: Control::new(control), ack, memory })
    }

    fn phase(&self) -> Result<Phase, EngineError> {
        let status = self.control.status(COMMAND_LIMIT).map_err(|error| error.during(HOLDING));
        Ok(status.map_err(|error| machine_dir::explain(error, &self.dir, HOLDING))?.0)
    }

    fn run(
        &self,
        during: &'static str,
        request: &Request<'_>,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), EngineError> {
        let limit = if descriptor.is_some() { STATE_LIMIT } else { COMMAND_LIMIT };
        let done = self.control.run(request, descriptor, limit).map_err(|error| error.during(during));
        done.map_err(|error| machine_dir::explain(error, &self.dir, during))
    }
}

impl HeldBackend for Held {
    fn ack_stream(&self) -> &AckStream {
        &self.ack
    }

    fn is_stopped(&mut self) -> Result<bool, EngineError> {
        Ok(self.phase()? == Phase::Paused)
    }

    fn stop(&mut self) -> Result<(), EngineError> {
        // Whoever held it before may have stopped it.
        if self.is_stopped()? { Ok(()) } else { self.run("pausing the fork", &Request::Pause, None) }
    }

    fn save_devices(&mut self, path: &Path) -> Result<(), EngineError> {
        self.run(CAPTURING, &Request::Capture, Some(make(path)?.as_fd()))
    }

    fn memory(&self) -> &ForkMemory {
        &self.memory
    }

    fn go_on(&mut self) -> Result<(), EngineError> {
        self.run("letting the fork go on", &Request::Resume, None)
    }
}
