//! Whether hardware virtualisation really works here.
//!
//! `/dev/kvm` that opens is no proof: some hosts emulate kernel code instruction by instruction behind it and can not boot
//! a stock kernel. So a kernel is booted: without a root file system it panics, which ends QEMU by itself; anything
//! else (an internal error, silence) means that KVM can not be used.

use std::{fs, path::Path, time::Duration};

use serde::{Deserialize, Serialize};

use super::QemuEngine;
use crate::{Accel, BootSpec, Confinement, Machine};

/// A kernel reaches its panic in less than two seconds on real KVM; inside an emulated machine that is busy it took 20.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum KvmState {
    /// A kernel was booted.
    Works,
    /// It can not be used, and why.
    Unusable(String),
}

/// Looks, and where looking is not enough, boots `kernel`. `dir` is an empty directory for the attempt.
#[must_use]
pub fn kvm_state(kernel: Option<&Path>, dir: &Path) -> KvmState {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return KvmState::Unusable(format!("/dev/kvm can not be opened: {error}"));
    }
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        flags
            .lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split(' ').any(|word| word == flag))
    };
    if !has("vmx") && !has("svm") {
        return KvmState::Unusable(
            "/dev/kvm opens, but the CPU shows neither vmx nor svm: it can not boot a stock kernel".into(),
        );
    }
    let Some(kernel) = kernel else { return KvmState::Unusable("no kernel to try it with yet".into()) };
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
