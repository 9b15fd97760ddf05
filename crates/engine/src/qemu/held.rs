//! A fork that runs, taken hold of: stopped, captured, and let go on.
//!
//! `migrate` would write all of its memory, which is a private mapping. `xen-save-devices-state` (QEMU's own code, of use
//! without Xen) writes all devices and no memory, in the form that every machine loads. It takes a path; a descriptor is one
//! as `/dev/fdset/N`. `live` says that the machine may go on: its disk is not given up.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{COMMAND_LIMIT, STATE_LIMIT, qmp::Qmp};
use crate::{
    AckStream, EngineError, HoldSpec, ProcessRef,
    fork_memory::{CAPTURING, ForkMemory, HOLDING, make},
    machine_dir,
    vm::HeldBackend,
};

/// A fork's QEMU. Nothing happens to it with this value.
#[derive(Debug)]
pub(super) struct Held {
    dir: PathBuf,
    qmp: Qmp,
    ack: AckStream,
    memory: ForkMemory,
}

impl Held {
    pub(super) fn take(spec: &HoldSpec<'_>, process: &ProcessRef) -> Result<Self, EngineError> {
        let memory = ForkMemory::open(spec, process)?;
        let (monitor, ack) =
            machine_dir::reconnect(spec.dir).map_err(|source| EngineError::Control { during: HOLDING, source })?;
        let qmp = Qmp::start(monitor, COMMAND_LIMIT)?;
        Ok(Self { dir: spec.dir.to_owned(), qmp, ack, memory })
    }

    fn run(&mut self, during: &'static str, command: &str, arguments: Value) -> Result<Value, EngineError> {
        let done = self.qmp.run(during, command, arguments, COMMAND_LIMIT);
        done.map_err(|error| machine_dir::explain(error, &self.dir, during))
    }
}

impl HeldBackend for Held {
    fn ack_stream(&self) -> &AckStream {
        &self.ack
    }

    fn is_stopped(&mut self) -> Result<bool, EngineError> {
        let status = self.run(HOLDING, "query-status", Value::Null)?;
        Ok(status.get("running") == Some(&Value::Bool(false)))
    }

    fn stop(&mut self) -> Result<(), EngineError> {
        self.run("pausing the fork", "stop", Value::Null).map(drop)
    }

    fn save_devices(&mut self, path: &Path) -> Result<(), EngineError> {
        let file = make(path)?;
        let set = self.qmp.add_fd(CAPTURING, file.as_fd(), COMMAND_LIMIT)?;
        let arguments = json!({ "filename": format!("/dev/fdset/{set}"), "live": true });
        let saved = self.qmp.run(CAPTURING, "xen-save-devices-state", arguments, STATE_LIMIT);
        let removed = self.qmp.run(CAPTURING, "remove-fd", json!({ "fdset-id": set }), COMMAND_LIMIT);
        let saved = saved.and(removed).map(drop);
        saved.map_err(|error| machine_dir::explain(error, &self.dir, CAPTURING))
    }

    fn memory(&self) -> &ForkMemory {
        &self.memory
    }

    fn go_on(&mut self) -> Result<(), EngineError> {
        self.run("letting the fork go on", "cont", Value::Null).map(drop)
    }
}
