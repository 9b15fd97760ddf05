//! The machine as KVM has it: its object, its vCPUs, their threads.

pub mod cpuid;
pub mod prefault;
pub mod run;
pub mod state;
pub mod touch;
pub mod vcpu;
pub mod vm;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// Version of KVM's interface; the only one since 2007.
const API_VERSION: i32 = 12;

/// What is used and has not always been there.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "in-kernel timer"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::MpState, "vCPU run state"),
    (Cap::ExtCpuid, "CPUID of vCPUs"),
];

/// A call of KVM's that failed.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device.
    #[error("/dev/kvm cannot be used")]
    Open(#[source] std::io::Error),
    /// Not KVM as we know it.
    #[error("this KVM speaks version {0} of its interface, not {API_VERSION}")]
    Version(i32),
    /// Too old, or not for x86-64.
    #[error("this KVM has no {0}")]
    Missing(&'static str),
    /// A request on a machine or vCPU.
    #[error("KVM refused to {what}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// A model-specific register.
    #[error("KVM did not take model-specific register {0:#x}")]
    Msr(u32),
}

impl KvmError {
    pub(crate) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Refused { what, source: error.into() }
    }
}

/// KVM, through a descriptor of `/dev/kvm` or else by that path, once it has been seen to have what machines need.
///
/// # Errors
/// [`KvmError::Open`], [`KvmError::Version`], [`KvmError::Missing`].
pub fn open(device: Option<OwnedFd>) -> Result<Kvm, KvmError> {
    let kvm = match device {
        // SAFETY: the descriptor is open and given up by its owner; whether it is KVM's is asked for below, and requests
        // to something else fail.
        Some(device) => unsafe { Kvm::from_raw_fd(device.into_raw_fd()) },
        None => Kvm::new().map_err(|error| KvmError::Open(error.into()))?,
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::Version(version));
    }
    match NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        None => Ok(kvm),
        Some((_, name)) => Err(KvmError::Missing(name)),
    }
}
