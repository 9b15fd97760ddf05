//! The memory of a fork that runs, as its host sees it: a private mapping of its template's, whatever the engine.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::Path};

use identity::mailbox::Page;
use memory::{DeltaSize, ProcessMemory, Touched, delta::for_each_page, touched_pages, write_delta};

use crate::{CaptureFiles, EngineError, HoldSpec, ProcessRef, machine_dir};

/// What is going on while a fork is taken hold of.
pub(crate) const HOLDING: &str = "taking hold of the fork";
/// What is going on while it is captured.
pub(crate) const CAPTURING: &str = "capturing the fork";

/// A fork's memory, and that of its template.
#[derive(Debug)]
pub(crate) struct ForkMemory {
    process: ProcessRef,
    base: File,
    memory: ProcessMemory,
    size: u64,
}

impl ForkMemory {
    /// That of a fork's process. A host that lets only a parent look at a process' memory says so here.
    pub(crate) fn open(spec: &HoldSpec<'_>, process: &ProcessRef) -> Result<Self, EngineError> {
        let base = machine_dir::open(spec.memory_file)?;
        let size = spec.machine.memory_bytes;
        let memory = ProcessMemory::open(process.pid, &base, size)
            .map_err(|error| EngineError::Refused { during: HOLDING, reason: error.to_string() })?;
        Ok(Self { process: process.clone(), base, memory, size })
    }

    /// To write to.
    pub(crate) fn process_memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Writes the pages that the fork, which stands still, has for itself, and shows each to `seen` with its offset.
    pub(crate) fn write_own(
        &self,
        files: CaptureFiles<'_>,
        seen: &mut dyn FnMut(u64, &Page),
    ) -> Result<DeltaSize, EngineError> {
        let failed = |source| EngineError::File { what: "writing", path: files.delta.into(), source };
        let touched = self.touched().map_err(failed)?;
        let out = make(files.delta)?;
        write_delta(&self.memory, self.size, &touched.copied, &self.base, files.template_id, &out, seen).map_err(failed)
    }

    /// Shows the pages that the fork has for itself.
    pub(crate) fn scan_own(&self, seen: &mut dyn FnMut(u64, &Page)) -> Result<(), EngineError> {
        let failed = |source| EngineError::Control { during: HOLDING, source };
        for_each_page(&self.memory, &self.touched().map_err(failed)?.copied, seen).map_err(failed)
    }

    fn touched(&self) -> io::Result<Touched> {
        touched_pages(self.process.pid, &self.base, self.size).map_err(io::Error::other)
    }
}

/// Makes a file of a capture. For writing only: QEMU takes from a set the descriptor whose access mode is the one it wants.
pub(crate) fn make(path: &Path) -> Result<File, EngineError> {
    let made = File::options().write(true).create_new(true).mode(0o600).open(path);
    made.map_err(|source| EngineError::File { what: "making", path: path.into(), source })
}
