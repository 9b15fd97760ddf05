//! What KVM holds of a guest, as plain values: one [`VcpuState`] for each vCPU and one [`VmState`] for the chips they share.
//!
//! # Order
//! Capture, with every vCPU stopped outside of `KVM_RUN` and after [`settle`]: all vCPUs, then the machine.
//!
//! Restore: memory slots, in-kernel irqchip, PIT, all vCPUs created; then [`VcpuState::load`] of every vCPU, the
//! first one first (the others' time stamp counters follow its), then [`VmState::load`],
//! then the first `KVM_RUN`. The vCPUs come first because loading the IOAPIC delivers what it still holds into the local APICs, and
//! loading a local APIC afterwards would lose it. The clock comes last because it counts from the moment it is loaded.
//! The order inside each of the two stands in its `load`.

mod msrs;
mod pod;
mod sregs;
mod support;
mod vcpu;
mod vm;
mod xsave;

pub use sregs::SpecialRegisters;
pub use support::{Capabilities, Support};
pub use vcpu::{VcpuState, settle};
pub use vm::VmState;

pub(crate) use pod::{exact, slice};

/// Why KVM's state of a guest could not be taken or put back.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A call of KVM failed.
    #[error("{call} failed: {source}")]
    Kvm {
        /// The name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// KVM accepted the model specific registers only up to this one.
    #[error(
        "this host's KVM refuses the value {value:#x} for model specific register {index:#x}; restore on a host like the template's"
    )]
    Msr {
        /// The register's index.
        index: u32,
        /// The value that was refused.
        value: u64,
    },
    /// The extended processor state is larger than what this host knows.
    #[error(
        "the extended processor state takes {state} bytes and this host knows {host}; restore on a host with the same vector extensions"
    )]
    Xsave {
        /// Bytes in the state.
        state: usize,
        /// Bytes this host's KVM reads.
        host: usize,
    },
    /// The guest's time stamp counter cannot run at its rate here.
    #[error(
        "the guest counts time at {state} kHz, this host at {host} kHz and KVM cannot scale it; restore on a host of the same clock rate"
    )]
    TscRate {
        /// The captured rate in kHz.
        state: u32,
        /// The rate here in kHz.
        host: u32,
    },
    /// A list is longer than KVM takes.
    #[error("the state has {found} {what}; KVM takes {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// The guest runs guests of its own.
    #[error("the guest has hardware virtualization in use, which cannot be captured; stop its virtual machines first")]
    Nested,
    /// `KVM_RUN` did not come straight back when it was asked to.
    #[error("the vCPU has unfinished work that only running it can finish: it stopped with {0}")]
    Unsettled(String),
}

/// Names the call that failed.
fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { call, source }
}
