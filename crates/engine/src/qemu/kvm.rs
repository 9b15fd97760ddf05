//! Whether QEMU can use hardware virtualisation here.
//!
//! A kernel is booted: without a root file system it panics, which ends QEMU by itself; anything else (an internal error,
//! silence) means that KVM can not be used.

use std::{path::Path, time::Duration};

use super::QemuEngine;
use crate::{Accel, BootSpec, Confinement, KvmState, Machine};

/// A kernel reaches its panic in less than two seconds on real KVM; inside an emulated machine that is busy it took 19.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

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
    let mut qemu = engine.launch_boot(&spec, None, "").map_err(|error| error.to_string())?;
    qemu.machine.wait_end(BOOT_LIMIT).map_err(|error| error.to_string())
}
