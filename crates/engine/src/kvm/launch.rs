//! Starting a worker, which jails itself before it reads anything of a guest.

use std::{
    fs::File,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
    process::Command,
    time::Duration,
};

use vmm::{
    config::MachineConfig,
    worker::{
        launch::{Launch, Network, Own, Purpose as WorkerPurpose, Start},
        protocol::Request,
    },
};

use super::{control::Control, never_ran, open_kvm};
use crate::{
    Confinement, EngineError, Machine, NetworkEnd, ProcessRef,
    machine_dir::{self, KERNEL_COMMAND_LINE, MachineDir},
    machine_process::{Jail, MachineProcess, Purpose, spawn},
};

/// Time for a worker to start and load: some milliseconds on an idle machine, but it may have to be read from a slow disk.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time for a spare worker to answer whoever takes it over; past that, starting another is the better way.
const ADOPT_LIMIT: Duration = Duration::from_secs(2);

/// What a worker's guest begins from.
#[derive(Debug)]
pub(super) enum Source {
    Boot {
        memory: File,
        kernel: File,
        initramfs: Option<File>,
        console: File,
    },
    Restore {
        memory: File,
        state: File,
        pages: Option<File>,
        /// What a captured fork had for itself, and the id of its template.
        own: Option<(File, String)>,
    },
}

/// What a worker's machine has, wherever its guest begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) dir: &'a Path,
    pub(super) machine: Machine,
    pub(super) root_image: &'a Path,
    pub(super) network: Option<NetworkEnd<'a>>,
    pub(super) confinement: &'a Confinement<'a>,
}

/// A worker with a loaded machine. Its process ends with this value unless it is released.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) machine: MachineProcess,
    pub(super) control: Control,
    /// The memory file, if a fork's memory is a copy of it; not if a captured fork's own pages are above it.
    pub(super) template: Option<File>,
    pub(super) memory_bytes: u64,
}

impl Worker {
    /// Starts one and waits until its machine is loaded.
    pub(super) fn launch(
        program: &Path,
        parts: Parts<'_>,
        source: Source,
        purpose: Purpose,
    ) -> Result<Self, EngineError> {
        let Parts { dir, machine, root_image, network, confinement } = parts;
        let during = "loading the machine";
        let control = |source| EngineError::Control { during, source };
        let own = MachineDir::new(dir)?;
        let kvm = open_kvm()?;
        let root_image = machine_dir::open(root_image)?;
        let is_copy = !matches!(source, Source::Restore { own: Some(_), .. });
        let (memory, others, start) = source.start();
        let vcpus = u8::try_from(machine.vcpus)
            .map_err(|_| EngineError::Refused { during, reason: format!("{} vCPUs are too many", machine.vcpus) })?;
        let launch = Launch {
            purpose: match purpose {
                Purpose::Template => WorkerPurpose::Template,
                Purpose::Fork => WorkerPurpose::Fork,
                Purpose::Spare => WorkerPurpose::Spare,
            },
            user: confinement.user,
            namespaces: confinement.namespaces,
            machine: MachineConfig { memory_bytes: machine.memory_bytes, vcpus },
            kvm: kvm.as_raw_fd(),
            control: own.monitor.as_raw_fd(),
            memory: memory.as_raw_fd(),
            root_image: root_image.as_raw_fd(),
            ack: own.ack_write.as_raw_fd(),
            channels: own.channels.iter().map(AsRawFd::as_raw_fd).collect(),
            network: machine.network.then(|| match network {
                None => Network::Unconnected,
                Some(NetworkEnd::Tap(fd)) => Network::Tap(fd.as_raw_fd()),
                Some(NetworkEnd::Stream(fd)) => Network::Stream(fd.as_raw_fd()),
            }),
            held: vec![own.ack_hold.as_raw_fd()],
            start,
        };
        let document =
            serde_json::to_string(&launch).map_err(|error| EngineError::Control { during, source: error.into() })?;
        let mut command = Command::new(program);
        command.arg(document);
        // Connected before it starts: it answers as soon as it can, and notices if we go.
        let stream = own.connect().map_err(control)?;
        let spawned = spawn(command, dir, launch.descriptors(), confinement, purpose, Jail::Itself)?;
        drop((kvm, root_image, others));
        let machine_process = spawned.with(own.into_ack().map_err(control)?, dir);
        let worker = Self {
            machine: machine_process,
            control: Control::new(stream),
            template: is_copy.then_some(memory),
            memory_bytes: machine.memory_bytes,
        };
        match worker.check(machine, START_LIMIT, during) {
            Ok(()) => Ok(worker),
            Err(error) => {
                // Ended first, so that all it has to say is in the log.
                drop(worker);
                Err(machine_dir::explain(error, dir, during))
            }
        }
    }

    /// Takes over a worker that another process started in `dir` and released.
    pub(super) fn adopt(
        dir: &Path,
        machine: Machine,
        template: File,
        process: ProcessRef,
    ) -> Result<Self, EngineError> {
        let during = "taking over a spare machine";
        let (stream, ack) = machine_dir::reconnect(dir).map_err(|source| EngineError::Control { during, source })?;
        let control = Control::new(stream);
        let worker = Self {
            machine: MachineProcess::adopt(process, ack, dir),
            control,
            template: Some(template),
            memory_bytes: machine.memory_bytes,
        };
        worker.check(machine, ADOPT_LIMIT, during)?;
        Ok(worker)
    }

    /// Whether the machine is loaded, has never run, and is the one we mean.
    fn check(&self, machine: Machine, limit: Duration, during: &'static str) -> Result<(), EngineError> {
        let (phase, memory_bytes) = self.control.status(limit).map_err(|error| error.during(during))?;
        let refused = |reason: &str| Err(EngineError::Refused { during, reason: reason.into() });
        if memory_bytes != machine.memory_bytes {
            return refused("it has another size of memory");
        }
        if never_ran(phase) { Ok(()) } else { refused("it has run") }
    }

    /// Asks for something that is just done.
    pub(super) fn run(
        &self,
        request: &Request<'_>,
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
        during: &'static str,
    ) -> Result<(), EngineError> {
        let done = self.control.run(request, descriptor, limit);
        done.map_err(|error| self.machine.explain(error.during(during), during))
    }
}

impl Source {
    /// The memory file, files to keep until the worker has them, and what to tell it of them.
    fn start(self) -> (File, Vec<File>, Start) {
        match self {
            Self::Restore { memory, state, pages, own } => {
                let (own, named) = own
                    .map(|(file, template)| {
                        let number = file.as_raw_fd();
                        (file, Own { file: number, template })
                    })
                    .unzip();
                let start = Start::Restore {
                    state: state.as_raw_fd(),
                    pages: pages.as_ref().map(AsRawFd::as_raw_fd),
                    own: named,
                };
                (memory, [state].into_iter().chain(pages).chain(own).collect(), start)
            }
            Self::Boot { memory, kernel, initramfs, console } => {
                let start = Start::Boot {
                    kernel: kernel.as_raw_fd(),
                    initramfs: initramfs.as_ref().map(AsRawFd::as_raw_fd),
                    command_line: KERNEL_COMMAND_LINE.into(),
                    console: console.as_raw_fd(),
                };
                (memory, [kernel, console].into_iter().chain(initramfs).collect(), start)
            }
        }
    }
}
