//! Forks for tests that need no guest: their machines are processes of an engine's name that do nothing.
#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command},
};

use engine::ProcessRef;
use identity::{ForkId, ForkName};
use serde_json::json;
use tempfile::TempDir;

use crate::{home::Home, record::ForkRecord};

pub(crate) fn id(digit: char) -> ForkId {
    ForkId::parse(&digit.to_string().repeat(20)).unwrap()
}

/// A fork that runs, named by the first digits of its id.
pub(crate) fn record(id: &ForkId, process: &ProcessRef) -> ForkRecord {
    named(id, &ForkName::parse(&id.as_str()[..8]).unwrap(), process)
}

pub(crate) fn named(id: &ForkId, fork: &ForkName, process: &ProcessRef) -> ForkRecord {
    serde_json::from_value(json!({
        "format": ForkRecord::FORMAT, "id": id, "name": fork, "hostname": fork, "template": "t", "template_id": "0",
        "engine": {"name": "qemu", "version": "7.2", "accel": "tcg"}, "process": process, "created_ms": 0, "machine_id": "", "boot_id": "",
        "labels": {}, "env": [], "secrets": [], "files": [], "mailboxes": [], "limits": {}, "cgroups": [], "acked_micros": 0,
        "host_steps": [], "guest_steps": [],
    }))
    .unwrap()
}

/// The same in standby.
pub(crate) fn in_standby(mut record: ForkRecord) -> ForkRecord {
    let report = json!({"since_ms": 0, "dirty_bytes": 0, "disk_bytes": 0, "captured_micros": 0});
    record.standby = Some(serde_json::from_value(report).unwrap());
    record
}

/// A process with an engine's name that works in a directory; it ends with this value.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) process: ProcessRef,
    child: Child,
    _program: TempDir,
}

impl Machine {
    /// In a fork's directory, which is made if need be.
    pub(crate) fn of_fork(home: &Home, id: &ForkId) -> Self {
        let dir = home.forks().join(id.as_str());
        fs::create_dir_all(&dir).unwrap();
        Self::in_dir(&dir)
    }

    pub(crate) fn in_dir(dir: &Path) -> Self {
        let paths = env::var_os("PATH").unwrap();
        let sleep = env::split_paths(&paths).map(|path| path.join("sleep")).find(|path| path.exists()).unwrap();
        let place = tempfile::tempdir().unwrap();
        // A process' name is that of the path it was started by, and a program of several kinds goes by its first argument.
        let program: PathBuf = place.path().join("qemu-system-test");
        symlink(sleep, &program).unwrap();
        let child = Command::new(program).arg0("sleep").arg("1000").current_dir(dir).spawn().unwrap();
        Self { process: ProcessRef::of(child.id()).unwrap(), child, _program: place }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
