//! Starting QEMU's process with as little as it needs.

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    process::Command,
    time::Duration,
};

use rustix::thread::Gid;
use serde_json::Value;

use super::{command::CommandLine, qmp::Qmp};
use crate::{
    Accel, Confinement, EngineError, NetworkEnd, ProcessRef,
    machine_dir::{self, MachineDir},
    machine_process::{Jail, MachineProcess, Purpose, spawn},
};

/// Time for QEMU to start; it takes 25 ms on an idle machine, but may have to be read from a slow disk.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time for a started QEMU to answer whoever takes it over; past that, starting another is the better way.
const ADOPT_LIMIT: Duration = Duration::from_secs(2);

/// A started QEMU whose process dies with this value unless it is released.
#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) machine: MachineProcess,
    pub(super) qmp: Qmp,
}

/// Descriptors and sockets made before the command line can be written.
#[derive(Debug)]
pub(super) struct Prepared {
    own: MachineDir,
    root_image: File,
    memory_dir: OwnedFd,
    /// Kept open for the process, besides the ones above.
    others: Vec<File>,
    /// What the network card is connected to; the caller's.
    network: Option<RawFd>,
    /// The only group that the process has as another user.
    device_group: Option<Gid>,
}

impl Prepared {
    pub(super) fn new(accel: Accel, dir: &Path, root_image: &Path, memory_file: &Path) -> Result<Self, EngineError> {
        let memory_parent = memory_file.parent().unwrap_or(Path::new("."));
        Ok(Self {
            own: MachineDir::new(dir)?,
            root_image: machine_dir::open(root_image)?,
            memory_dir: machine_dir::open_dir(memory_parent).map_err(|source| EngineError::File {
                what: "opening the template's directory",
                path: memory_parent.into(),
                source,
            })?,
            others: Vec::new(),
            network: None,
            device_group: (accel == Accel::Kvm).then(device_group).flatten(),
        })
    }

    /// Makes the console's file for the process and gives its number.
    pub(super) fn console(&mut self, dir: &Path) -> Result<RawFd, EngineError> {
        Ok(self.keep(machine_dir::make_console(dir)?))
    }

    /// Opens one more file for the process and gives its number.
    pub(super) fn open(&mut self, path: &Path) -> Result<RawFd, EngineError> {
        Ok(self.keep(machine_dir::open(path)?))
    }

    /// Has the process inherit what its network card is connected to, which stays open until it is started.
    pub(super) fn lend(&mut self, network: Option<NetworkEnd<'_>>) {
        self.network = network.as_ref().map(AsRawFd::as_raw_fd);
    }

    fn keep(&mut self, file: File) -> RawFd {
        let number = file.as_raw_fd();
        self.others.push(file);
        number
    }

    pub(super) fn fds(&self) -> super::command::Fds {
        super::command::Fds {
            monitor: self.own.monitor.as_raw_fd(),
            ack: self.own.ack_write.as_raw_fd(),
            root_image: self.root_image.as_raw_fd(),
            memory_dir: self.memory_dir.as_raw_fd(),
            channels: self.own.channels.each_ref().map(AsRawFd::as_raw_fd),
        }
    }

    fn inherited(&self) -> Vec<RawFd> {
        let mut all = self.own.inherited();
        all.extend([self.root_image.as_raw_fd(), self.memory_dir.as_raw_fd()]);
        all.extend(self.others.iter().map(AsRawFd::as_raw_fd));
        all.extend(self.network);
        all
    }
}

/// The group that may use `/dev/kvm`, which QEMU opens itself, as the user it runs as. `None` if everybody may or no group.
fn device_group() -> Option<Gid> {
    let device = fs::metadata("/dev/kvm").ok()?;
    (device.mode() & 0o066 == 0o060).then(|| Gid::from_raw(device.gid()))
}

/// Starts QEMU in `dir` and waits until it takes commands.
pub(super) fn launch(
    program: &Path,
    dir: &Path,
    line: CommandLine,
    prepared: Prepared,
    confinement: &Confinement<'_>,
    purpose: Purpose,
) -> Result<Qemu, EngineError> {
    let during = "starting";
    let control = |source| EngineError::Control { during, source };
    let monitor = prepared.own.connect().map_err(control)?;
    let mut command = Command::new(program);
    command.args(line.into_args());
    let spawned = spawn(command, dir, prepared.inherited(), confinement, purpose, Jail::Before(prepared.device_group))?;
    let machine = spawned.with(prepared.own.into_ack().map_err(control)?, dir);
    match Qmp::start(monitor, START_LIMIT) {
        Ok(qmp) => Ok(Qemu { machine, qmp }),
        Err(error) => {
            // Ended first, so that all it has to say is in the log.
            drop(machine);
            Err(machine_dir::explain(error, dir, during))
        }
    }
}

impl Qemu {
    /// Takes over a process that another one started in `dir` and released.
    pub(super) fn adopt(dir: &Path, process: ProcessRef) -> Result<Self, EngineError> {
        let during = "taking over a spare machine";
        let (monitor, ack) = machine_dir::reconnect(dir).map_err(|source| EngineError::Control { during, source })?;
        let mut qmp = Qmp::start(monitor, ADOPT_LIMIT)?;
        let status = qmp.run(during, "query-status", Value::Null, ADOPT_LIMIT)?;
        // A spare has loaded its template, and does not run; if it has rehearsed, it does not run any more.
        if status.get("running") != Some(&Value::Bool(false)) {
            return Err(EngineError::Refused { during, reason: "it is not paused".into() });
        }
        Ok(Self { machine: MachineProcess::adopt(process, ack, dir), qmp })
    }

    /// Adds the process' last words where an error only says that the connection broke.
    pub(super) fn explain(&self, error: EngineError, during: &'static str) -> EngineError {
        self.machine.explain(error, during)
    }
}
