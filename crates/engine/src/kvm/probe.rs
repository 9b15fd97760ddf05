//! Whether guests really run on this host's KVM, with our own machine.

use std::path::Path;

use super::KvmEngine;
use crate::{
    EngineError, KvmState,
    kvm_state::{BOOT_LIMIT, spec},
};

/// Boots `kernel` in `dir`, an empty directory: without a root file system it panics, which ends the machine by itself;
/// anything else means that this engine can not be used here.
#[must_use]
pub fn probe(kernel: &Path, dir: &Path) -> KvmState {
    match boots(kernel, dir) {
        Ok(()) => KvmState::Works,
        Err(error) => KvmState::Unusable(format!("a kernel does not boot with it: {error}")),
    }
}

fn boots(kernel: &Path, dir: &Path) -> Result<(), EngineError> {
    let memory_file = dir.join("memory.img");
    let spec = spec(kernel, dir, &memory_file);
    KvmEngine::find()?.launch_boot(&spec, None)?.machine.wait_end(BOOT_LIMIT)
}
