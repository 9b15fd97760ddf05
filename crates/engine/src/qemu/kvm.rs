//! Whether QEMU can use hardware virtualisation here.
//!
//! A kernel is booted: without a root file system it panics, which ends QEMU by itself; anything else (an internal error,
//! silence) means that KVM can not be used.

use std::path::Path;

use super::QemuEngine;
use crate::{
    Accel, KvmState,
    kvm_state::{BOOT_LIMIT, spec},
};

/// Boots `kernel` in `dir`, an empty directory.
#[must_use]
pub fn probe(kernel: &Path, dir: &Path) -> KvmState {
    match boots(kernel, dir) {
        Ok(()) => KvmState::Works,
        Err(reason) => KvmState::Unusable(format!("/dev/kvm opens, but a kernel does not boot on it: {reason}")),
    }
}

fn boots(kernel: &Path, dir: &Path) -> Result<(), String> {
    let engine = QemuEngine::find(Accel::Kvm).map_err(|error| error.to_string())?;
    let memory_file = dir.join("memory.img");
    let spec = spec(kernel, dir, &memory_file);
    let mut qemu = engine.launch_boot(&spec, None, "").map_err(|error| error.to_string())?;
    qemu.machine.wait_end(BOOT_LIMIT).map_err(|error| error.to_string())
}
