//! Entering pages into the guest's page tables before it runs.
//!
//! A page that is there for the process is still unknown to the processor: the guest's first access makes it leave the
//! guest. Linux 6.11 and newer enter pages on request (`KVM_PRE_FAULT_MEMORY`), at a fraction of that.

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_iowr_nr};

#[allow(missing_docs)]
mod request {
    use super::*;

    ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
}

/// Interruptions to put up with in one call.
const ATTEMPTS: u32 = 16;

/// Enters the pages of a range of guest memory. `false` if this host's KVM can not do it: there is no use in asking again.
pub fn enter(vcpu: &VcpuFd, at: GuestAddress, bytes: u64) -> bool {
    let mut range = kvm_pre_fault_memory { gpa: at.0, size: bytes, ..Default::default() };
    for _ in 0..ATTEMPTS {
        // SAFETY: a vCPU, and the structure that the request takes; only addresses of the guest are in it.
        let result = unsafe { ioctl_with_mut_ref(vcpu, request::KVM_PRE_FAULT_MEMORY(), &mut range) };
        if result == 0 {
            return true;
        }
        // It goes on where it was interrupted.
        if !matches!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return false;
        }
    }
    true
}
