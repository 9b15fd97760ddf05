//! The `kvm` engine: our own virtual machine monitor on KVM, one jailed worker process (`offshoot-vmm`) per machine.
//!
//! A template's memory is a file that its worker maps shared; a fork's worker maps the same file copy-on-write, loads the
//! captured state, and writes the identity into its own mapping before its guest has run.

mod control;
mod find;
mod held;
mod launch;
mod probe;

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use memory::{fill_mailboxes, touched_pages};
use vmm::{
    prefetch::PageList,
    worker::protocol::{Phase, Request},
};

pub use find::{PROGRAM, program};
pub use probe::probe;

use crate::{
    Accel, AckStream, BootSpec, BootedVm, Capabilities, DeliverError, Engine, EngineError, EngineInfo, EngineName,
    HeldVm, HoldSpec, Letter, Machine, PausedVm, ProcessRef, RestoreSpec, RunningVm, SpareVm, machine_dir,
    machine_process::Purpose,
    vm::{PausedBackend, SpareBackend},
};
use control::WorkerMemory;
use launch::{Parts, Source, Worker};

/// Time for an answer that moves no data.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// Time to take and write the state: some milliseconds on an idle machine.
const STATE_LIMIT: Duration = Duration::from_secs(60);

/// The engine.
#[derive(Debug)]
pub struct KvmEngine {
    program: PathBuf,
    info: EngineInfo,
}

impl KvmEngine {
    /// Finds the worker's program and opens `/dev/kvm`. That it opens is no proof that guests run on it: see [`probe`].
    ///
    /// # Errors
    /// [`EngineError::Missing`] without the program, [`EngineError::File`] without the device.
    pub fn find() -> Result<Self, EngineError> {
        Self::with_worker(program()?)
    }

    /// The same, with the worker's program given.
    ///
    /// # Errors
    /// [`EngineError::File`] without the device.
    pub fn with_worker(program: PathBuf) -> Result<Self, EngineError> {
        open_kvm()?;
        let version = format!("{}+state.{}", vmm::worker::BUILD, vmm::snapshot::VERSION);
        Ok(Self { program, info: EngineInfo { name: EngineName::Kvm, version, accel: Accel::Kvm } })
    }

    fn load(&self, spec: &RestoreSpec<'_>, purpose: Purpose) -> Result<Worker, EngineError> {
        let source = Source::Restore {
            memory: machine_dir::open(spec.memory_file)?,
            state: machine_dir::open(spec.state_file)?,
            // It may not be there yet.
            pages: spec.pages_file.and_then(|path| File::open(path).ok()),
            own: match spec.delta {
                Some((path, template)) => Some((machine_dir::open(path)?, template.to_owned())),
                None => None,
            },
        };
        let parts = Parts {
            dir: spec.dir,
            machine: spec.machine,
            root_image: spec.root_image,
            network: spec.network_end()?,
            confinement: &spec.confinement,
        };
        Worker::launch(&self.program, parts, source, purpose)
    }

    fn launch_boot(&self, spec: &BootSpec<'_>, initramfs: Option<&Path>) -> Result<Worker, EngineError> {
        let memory = machine_dir::make_memory_file(spec.memory_file, spec.machine.memory_bytes, spec.confinement.user)?;
        let source = Source::Boot {
            memory,
            kernel: machine_dir::open(spec.kernel)?,
            initramfs: initramfs.map(machine_dir::open).transpose()?,
            console: machine_dir::make_console(spec.dir)?,
        };
        let parts = Parts {
            dir: spec.dir,
            machine: spec.machine,
            root_image: spec.root_image,
            network: None,
            confinement: &spec.confinement,
        };
        let worker = Worker::launch(&self.program, parts, source, Purpose::Template)?;
        worker.run(&Request::Resume, None, COMMAND_LIMIT, "starting")?;
        Ok(worker)
    }
}

fn open_kvm() -> Result<OwnedFd, EngineError> {
    let path = Path::new("/dev/kvm");
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map(Into::into).map_err(|source| EngineError::File { what: "opening", path: path.into(), source })
}

impl Engine for KvmEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            patch_memory: true,
            copy_on_write: true,
            read_only_template: true,
            // A worker writes to its machine before the first run only.
            rehearse: false,
        }
    }

    fn boot(&self, spec: &BootSpec<'_>) -> Result<Box<dyn BootedVm>, EngineError> {
        Ok(Box::new(Booted(self.launch_boot(spec, Some(spec.initramfs))?)))
    }

    fn restore(&self, spec: &RestoreSpec<'_>) -> Result<PausedVm, EngineError> {
        Ok(PausedVm::new(Box::new(Paused(self.load(spec, Purpose::Fork)?))))
    }

    fn prepare(&self, spec: &RestoreSpec<'_>) -> Result<SpareVm, EngineError> {
        Ok(SpareVm::new(Box::new(Spare(self.load(spec, Purpose::Spare)?))))
    }

    fn adopt(&self, spec: &RestoreSpec<'_>, process: &ProcessRef) -> Result<PausedVm, EngineError> {
        let template = machine_dir::open(spec.memory_file)?;
        Ok(PausedVm::new(Box::new(Paused(Worker::adopt(spec.dir, spec.machine, template, process.clone())?))))
    }

    fn hold(&self, spec: &HoldSpec<'_>, process: &ProcessRef) -> Result<HeldVm, EngineError> {
        Ok(HeldVm::new(Box::new(held::Held::take(spec, process)?)))
    }

    fn pages_to_have_ready(
        &self,
        memory_file: &Path,
        machine: Machine,
        process: &ProcessRef,
    ) -> Result<Option<Vec<u8>>, EngineError> {
        let file = machine_dir::open(memory_file)?;
        let touched = touched_pages(process.pid, &file, machine.memory_bytes).map_err(|error| {
            let source = io::Error::other(error);
            EngineError::Control { during: "looking at the pages of a fork", source }
        })?;
        Ok(Some(PageList::new(touched.copied, touched.read).encode()))
    }
}

#[derive(Debug)]
struct Booted(Worker);

impl BootedVm for Booted {
    fn process(&self) -> &ProcessRef {
        &self.0.machine.process
    }

    fn ack_stream(&self) -> &AckStream {
        &self.0.machine.ack
    }

    fn pause(&mut self) -> Result<(), EngineError> {
        self.0.run(&Request::Pause, None, COMMAND_LIMIT, "pausing the template")
    }

    fn capture(mut self: Box<Self>, state_file: &Path) -> Result<(), EngineError> {
        let during = "saving the template";
        let state = machine_dir::make_state_file(state_file)?;
        self.0.run(&Request::Capture, Some(state.as_fd()), STATE_LIMIT, during)?;
        self.0.run(&Request::Quit, None, COMMAND_LIMIT, during)?;
        self.0.machine.wait_end(COMMAND_LIMIT)
    }
}

#[derive(Debug)]
struct Spare(Worker);

impl SpareBackend for Spare {
    fn process(&self) -> &ProcessRef {
        &self.0.machine.process
    }

    fn release(self: Box<Self>) {
        if let (Some(child), _) = self.0.machine.release() {
            crate::process::leave(child);
        }
    }
}

#[derive(Debug)]
struct Paused(Worker);

impl PausedBackend for Paused {
    fn process(&self) -> &ProcessRef {
        &self.0.machine.process
    }

    fn patch(&mut self, letters: &[Letter<'_>]) -> Result<(), DeliverError> {
        let memory = WorkerMemory::new(&self.0.control, self.0.template.as_ref(), self.0.memory_bytes, COMMAND_LIMIT);
        let letters: Vec<_> =
            letters.iter().map(|letter| (letter.mailbox, letter.payload.expose(), &letter.ack_key)).collect();
        fill_mailboxes(&memory, &letters)?;
        Ok(())
    }

    fn resume(self: Box<Self>) -> Result<RunningVm, EngineError> {
        let during = "letting the fork run";
        self.0.run(&Request::Resume, None, COMMAND_LIMIT, during)?;
        let ack_stream = self.0.machine.ack.try_clone().map_err(|source| EngineError::Control { during, source })?;
        let (child, process) = self.0.machine.release();
        Ok(RunningVm { process, ack_stream, child })
    }
}

/// Whether a machine can still be given an identity.
fn never_ran(phase: Phase) -> bool {
    phase == Phase::Loaded
}
