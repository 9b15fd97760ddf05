//! Whether guests really run on this host's KVM, with our own machine.

use std::{path::Path, time::Duration};

use super::KvmEngine;
use crate::{BootSpec, Confinement, EngineError, KvmState, Machine};

/// A kernel reaches its panic in less than two seconds on real KVM, but in ten on an emulated one.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

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
    let spec = BootSpec {
        dir,
        machine: Machine { memory_bytes: 256 << 20, vcpus: 1 },
        kernel,
        initramfs: Path::new(""),
        // Read as a disk, never mounted: any file does.
        root_image: kernel,
        memory_file: &dir.join("memory.img"),
        confinement: Confinement::default(),
    };
    KvmEngine::find()?.launch_boot(&spec, None)?.machine.wait_end(BOOT_LIMIT)
}
