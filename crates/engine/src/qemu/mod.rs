//! The `qemu` engine: QEMU's `microvm` machine from the distribution.
//!
//! A template's memory is a file that its machine maps shared; the capture saves only the device state
//! (`x-ignore-shared`). A fork maps the same file privately, loads the device state, and stays stopped until its mailboxes
//! have been written through `/proc/PID/mem`.

mod command;
mod held;
mod kvm;
mod launch;
mod qmp;
mod tsc;

use std::{
    fmt::Write as _,
    fs::{self, File},
    os::{
        fd::{AsFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use memory::{Delta, ProcessMemory};
use serde_json::{Value, json};

pub use kvm::probe;

use crate::{
    Accel, AckStream, BootSpec, BootedVm, Capabilities, DeliverError, Engine, EngineError, EngineInfo, EngineName,
    HeldVm, HoldSpec, Letter, PausedVm, ProcessRef, RehearseError, RestoreSpec, RunningVm, SpareVm, machine_dir,
    machine_process::Purpose,
    vm::{PausedBackend, SpareBackend},
};
use command::{CommandLine, MemoryUse};
use launch::{Prepared, Qemu};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// Time for a command that moves no data.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// Time to save or load the device state: 2 ms on an idle machine.
const STATE_LIMIT: Duration = Duration::from_secs(60);

const LOADING: &str = "loading the template";

/// The engine.
#[derive(Debug)]
pub struct QemuEngine {
    program: PathBuf,
    info: EngineInfo,
    /// QEMU 8.2 and later can map a file privately that it opened for reading only.
    read_only_template: bool,
}

impl QemuEngine {
    /// Finds QEMU and asks for its version.
    ///
    /// # Errors
    /// [`EngineError::Missing`] if it is not installed, [`EngineError::Refused`] if it is older than 7.2.
    pub fn find(accel: Accel) -> Result<Self, EngineError> {
        let missing = || EngineError::Missing { program: PROGRAM.into(), package: "qemu-system-x86" };
        let program = find_in_path(PROGRAM).ok_or_else(missing)?;
        let output = Command::new(&program)
            .arg("--version")
            .env_clear()
            .output()
            .map_err(|source| EngineError::Spawn { program: PROGRAM.into(), source })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let (version, number) = parse_version(&text).ok_or_else(|| EngineError::Refused {
            during: "asking for its version",
            reason: "its answer has no version number".into(),
        })?;
        if number < (7, 2) {
            return Err(EngineError::Refused {
                during: "a check of its version",
                reason: format!("QEMU {version} is older than 7.2"),
            });
        }
        Ok(Self {
            program,
            info: EngineInfo { name: EngineName::Qemu, version, accel },
            read_only_template: number >= (8, 2),
        })
    }

    /// The engine as `info` describes it, if its program has not been changed since `when` (milliseconds since the epoch).
    #[must_use]
    pub fn unchanged_since(when: u64, info: &EngineInfo) -> Option<Self> {
        let program = find_in_path(PROGRAM)?;
        // The time of the last change of the inode: a package's files keep the modification time they were packed with.
        let changed = fs::metadata(&program).ok()?.ctime();
        let (_, number) = parse_version(&format!("version {}", info.version))?;
        (u64::try_from(changed).ok()?.saturating_add(1).saturating_mul(1000) < when).then(|| Self {
            program,
            info: info.clone(),
            read_only_template: number >= (8, 2),
        })
    }

    fn launch_boot(&self, spec: &BootSpec<'_>, initramfs: Option<&Path>, extra: &str) -> Result<Qemu, EngineError> {
        machine_dir::make_memory_file(spec.memory_file, spec.machine.memory_bytes, spec.confinement.user)?;
        let mut prepared = Prepared::new(self.info.accel, spec.dir, spec.root_image, spec.memory_file)?;
        let kernel = prepared.open(spec.kernel)?;
        let initramfs = initramfs.map(|path| prepared.open(path)).transpose()?;
        let console = prepared.console(spec.dir)?;
        let mut parameters = extra.to_owned();
        if self.info.accel == Accel::Tcg {
            // The agent holds the timer back while it applies an identity.
            parameters.push_str(" iomem=relaxed");
            if let Some(khz) = tsc::khz() {
                let _ = write!(parameters, " tsc_early_khz={khz}");
            }
        }
        let line = CommandLine::machine(
            spec.machine,
            self.info.accel,
            MemoryUse::Shared,
            &file_name(spec.memory_file),
            prepared.fds(),
            None,
        )
        .boot(kernel, initramfs, console, &parameters);
        launch::launch(&self.program, spec.dir, line, prepared, &spec.confinement, Purpose::Template)
    }
}

impl Engine for QemuEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            patch_memory: true,
            copy_on_write: true,
            read_only_template: self.read_only_template,
            rehearse: true,
        }
    }

    fn boot(&self, spec: &BootSpec<'_>) -> Result<Box<dyn BootedVm>, EngineError> {
        Ok(Box::new(Booted(self.launch_boot(spec, Some(spec.initramfs), "")?)))
    }

    fn restore(&self, spec: &RestoreSpec<'_>) -> Result<PausedVm, EngineError> {
        let memory = machine_dir::open(spec.memory_file)?;
        let qemu = self.load(spec, Purpose::Fork)?;
        Ok(PausedVm::new(Box::new(Paused { qemu, memory, size: spec.machine.memory_bytes, opened: None })))
    }

    fn prepare(&self, spec: &RestoreSpec<'_>) -> Result<SpareVm, EngineError> {
        let memory = machine_dir::open(spec.memory_file)?;
        let qemu = self.load(spec, Purpose::Spare)?;
        Ok(SpareVm::new(Box::new(Spare { qemu, memory, size: spec.machine.memory_bytes })))
    }

    fn adopt(&self, spec: &RestoreSpec<'_>, process: &ProcessRef) -> Result<PausedVm, EngineError> {
        let memory = machine_dir::open(spec.memory_file)?;
        let size = spec.machine.memory_bytes;
        // Asked before anything else: a host that lets only a parent write to a process' memory says so here, and the
        // caller starts a machine of its own.
        let opened = ProcessMemory::open(process.pid, &memory, size).map_err(|error| EngineError::Refused {
            during: "taking over a spare machine",
            reason: error.to_string(),
        })?;
        let qemu = Qemu::adopt(spec.dir, process.clone())?;
        Ok(PausedVm::new(Box::new(Paused { qemu, memory, size, opened: Some(opened) })))
    }

    fn hold(&self, spec: &HoldSpec<'_>, process: &ProcessRef) -> Result<HeldVm, EngineError> {
        Ok(HeldVm::new(Box::new(held::Held::take(spec, process)?)))
    }
}

impl QemuEngine {
    fn load(&self, spec: &RestoreSpec<'_>, purpose: Purpose) -> Result<Qemu, EngineError> {
        let mut prepared = Prepared::new(self.info.accel, spec.dir, spec.root_image, spec.memory_file)?;
        let state = prepared.open(spec.state_file)?;
        let network = spec.network_end()?;
        prepared.lend(network);
        let usage = if self.read_only_template { MemoryUse::PrivateReadOnly } else { MemoryUse::Private };
        let name = file_name(spec.memory_file);
        let line = CommandLine::machine(spec.machine, self.info.accel, usage, &name, prepared.fds(), network)
            .restore(spec.delta.is_some());
        let mut qemu = launch::launch(&self.program, spec.dir, line, prepared, &spec.confinement, purpose)?;
        // The devices look into the memory as they load: it has to be there first.
        let loaded = put_delta(&qemu, spec).and_then(|()| load_state(&mut qemu, state));
        match loaded {
            Ok(()) => Ok(qemu),
            Err(error) => Err(qemu.explain(error, LOADING)),
        }
    }
}

/// Puts the pages of a captured fork above its template's memory.
fn put_delta(qemu: &Qemu, spec: &RestoreSpec<'_>) -> Result<(), EngineError> {
    let Some((path, template)) = spec.delta else { return Ok(()) };
    let size = spec.machine.memory_bytes;
    let delta = Delta::open(machine_dir::open(path)?, size, template)?;
    let memory = machine_dir::open(spec.memory_file)?;
    let memory = ProcessMemory::open(qemu.machine.process.pid, &memory, size)
        .map_err(|error| EngineError::Refused { during: LOADING, reason: error.to_string() })?;
    Ok(delta.apply(&memory)?)
}

/// Loads the device state from a descriptor that the process has. The capability can only be set once the monitor is
/// there, so `-incoming` is deferred.
fn load_state(qemu: &mut Qemu, state: RawFd) -> Result<(), EngineError> {
    let during = LOADING;
    let load = ("migrate-incoming", json!({ "uri": format!("fd:{state}") }));
    qemu.qmp.run_all(during, &[ignore_shared_memory(), load], COMMAND_LIMIT)?;
    // `-S` keeps the machine paused after it.
    wait_migration(qemu, during)
}

/// Memory that is a shared file, or a private mapping of one, is not part of the state.
fn ignore_shared_memory() -> (&'static str, Value) {
    ("migrate-set-capabilities", json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] }))
}

fn wait_migration(qemu: &mut Qemu, during: &'static str) -> Result<(), EngineError> {
    let completed = qemu.qmp.wait_event(during, STATE_LIMIT, |event| {
        if event.get("event")?.as_str()? != "MIGRATION" {
            return None;
        }
        match event.get("data")?.get("status")?.as_str()? {
            "completed" => Some(true),
            "failed" | "cancelled" => Some(false),
            _ => None,
        }
    })?;
    if completed {
        Ok(())
    } else {
        Err(EngineError::Refused { during, reason: "the device state was not accepted".into() })
    }
}

#[derive(Debug)]
struct Booted(Qemu);

impl BootedVm for Booted {
    fn process(&self) -> &ProcessRef {
        &self.0.machine.process
    }

    fn ack_stream(&self) -> &AckStream {
        &self.0.machine.ack
    }

    fn pause(&mut self) -> Result<(), EngineError> {
        let during = "pausing the template";
        let paused = self.0.qmp.run(during, "stop", Value::Null, COMMAND_LIMIT);
        paused.map(drop).map_err(|error| self.0.explain(error, during))
    }

    fn capture(mut self: Box<Self>, state_file: &Path) -> Result<(), EngineError> {
        let during = "saving the template";
        let qemu = &mut self.0;
        let state = machine_dir::make_state_file(state_file)?;
        let mut save = || {
            // Unlimited: the default of 128 MiB/s is meant for networks.
            let bandwidth = json!({ "max-bandwidth": u64::MAX >> 1 });
            let parameters = ("migrate-set-parameters", bandwidth);
            qemu.qmp.run_all(during, &[ignore_shared_memory(), parameters], COMMAND_LIMIT)?;
            qemu.qmp.give_fd(during, "state", state.as_fd(), COMMAND_LIMIT)?;
            qemu.qmp.run(during, "migrate", json!({ "uri": "fd:state" }), COMMAND_LIMIT)?;
            wait_migration(qemu, during)?;
            qemu.qmp.run(during, "quit", Value::Null, COMMAND_LIMIT)
        };
        match save() {
            Ok(_) => self.0.machine.wait_end(COMMAND_LIMIT),
            Err(error) => Err(self.0.explain(error, during)),
        }
    }
}

#[derive(Debug)]
struct Paused {
    qemu: Qemu,
    memory: File,
    size: u64,
    /// Open already.
    opened: Option<ProcessMemory>,
}

#[derive(Debug)]
struct Spare {
    qemu: Qemu,
    memory: File,
    size: u64,
}

impl SpareBackend for Spare {
    fn process(&self) -> &ProcessRef {
        &self.qemu.machine.process
    }

    fn release(self: Box<Self>) {
        if let (Some(child), _) = self.qemu.machine.release() {
            crate::process::leave(child);
        }
    }

    fn run_rehearsal(&mut self, letter: &Letter<'_>) -> Result<(), RehearseError> {
        let during = "letting a spare machine rehearse";
        let memory = ProcessMemory::open(self.qemu.machine.process.pid, &self.memory, self.size);
        fill(&memory.map_err(DeliverError::from)?, std::slice::from_ref(letter))?;
        let run = self.qemu.qmp.run(during, "cont", Value::Null, COMMAND_LIMIT);
        Ok(run.map(drop).map_err(|error| self.qemu.explain(error, during))?)
    }

    fn ack_stream(&self) -> Result<&AckStream, EngineError> {
        Ok(&self.qemu.machine.ack)
    }

    fn stop(&mut self) -> Result<(), EngineError> {
        let during = "stopping a spare machine after its rehearsal";
        let stop = self.qemu.qmp.run(during, "stop", Value::Null, COMMAND_LIMIT);
        stop.map(drop).map_err(|error| self.qemu.explain(error, during))
    }
}

fn fill(memory: &ProcessMemory, letters: &[Letter<'_>]) -> Result<(), DeliverError> {
    let letters: Vec<_> =
        letters.iter().map(|letter| (letter.mailbox, letter.payload.expose(), &letter.ack_key)).collect();
    Ok(memory.fill(&letters)?)
}

impl PausedBackend for Paused {
    fn process(&self) -> &ProcessRef {
        &self.qemu.machine.process
    }

    fn patch(&mut self, letters: &[Letter<'_>]) -> Result<(), DeliverError> {
        let memory = match self.opened.take() {
            Some(opened) => opened,
            None => ProcessMemory::open(self.qemu.machine.process.pid, &self.memory, self.size)?,
        };
        fill(&memory, letters)
    }

    fn resume(mut self: Box<Self>) -> Result<RunningVm, EngineError> {
        let during = "letting the fork run";
        match self.qemu.qmp.run(during, "cont", Value::Null, COMMAND_LIMIT) {
            Ok(_) => {
                let ack_stream =
                    self.qemu.machine.ack.try_clone().map_err(|source| EngineError::Control { during, source })?;
                let (child, process) = self.qemu.machine.release();
                Ok(RunningVm { process, ack_stream, child })
            }
            Err(error) => Err(self.qemu.explain(error, during)),
        }
    }
}

/// The name alone: the directory is reached through a descriptor. Names of template files are fixed and plain.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/usr/local/bin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// `QEMU emulator version 7.2.22 (Debian …)` → (`7.2.22`, (7, 2)).
fn parse_version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text.split_whitespace().skip_while(|&word| word != "version").nth(1)?;
    let mut parts = version.split('.');
    Some((version.to_owned(), (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_changed_later_is_asked_again() {
        let info = EngineInfo { name: EngineName::Qemu, version: "7.2.22".into(), accel: Accel::Tcg };
        assert!(QemuEngine::unchanged_since(u64::MAX, &info).is_some_and(|engine| !engine.read_only_template));
        assert!(QemuEngine::unchanged_since(1000, &info).is_none());
        assert!(QemuEngine::unchanged_since(u64::MAX, &EngineInfo { version: "x".into(), ..info }).is_none());
    }

    #[test]
    fn versions_are_parsed_as_numbers() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(parse_version(text), Some(("10.0.2".into(), (10, 0))));
        assert!((10, 0) > (7, 2));
        assert_eq!(parse_version("no number"), None);
    }
}
