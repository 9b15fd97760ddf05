//! Whether hardware virtualisation can be used here, as far as looking tells.
//!
//! `/dev/kvm` that opens is no proof: some hosts emulate kernel code instruction by instruction behind it and can not boot
//! a stock kernel. So each engine that uses it boots a kernel once, where nothing speaks against it already.

use std::fs;

use serde::{Deserialize, Serialize};

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
