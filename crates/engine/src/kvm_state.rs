//! Whether hardware virtualisation can be used here, as far as looking tells.
//!
//! `/dev/kvm` that opens is no proof: some hosts emulate kernel code instruction by instruction behind it and can not boot
//! a stock kernel. So each engine that uses it boots a kernel once, where nothing speaks against it already.

use std::{fs, path::Path, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{BootSpec, Confinement, Machine};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum KvmState {
    /// A kernel was booted.
    Works,
    /// It can not be used, and why.
    Unusable(String),
}

/// What speaks against KVM without a try.
#[must_use]
pub fn obstacle() -> Option<String> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm can not be opened: {error}"));
    }
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        flags
            .lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split(' ').any(|word| word == flag))
    };
    (!has("vmx") && !has("svm"))
        .then(|| "/dev/kvm opens, but the CPU shows neither vmx nor svm: it can not boot a stock kernel".into())
}

/// A kernel reaches its panic in less than two seconds on real KVM; inside an emulated machine that is busy it took 19.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// The machine to try a kernel with, in an empty directory.
pub(crate) fn spec<'a>(kernel: &'a Path, dir: &'a Path, memory_file: &'a Path) -> BootSpec<'a> {
    BootSpec {
        dir,
        machine: Machine { memory_bytes: 256 << 20, vcpus: 1, network: false },
        kernel,
        initramfs: Path::new(""),
        // Read as a disk, never mounted: any file does.
        root_image: kernel,
        memory_file,
        confinement: Confinement::default(),
    }
}
