//! FPU, SSE, AVX and the other registers of the XSAVE area, of the size this host has.

use kvm_bindings::{KVMIO, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr};
use vmm_sys_util::{errno, ioctl_ior_nr, ioctl_iow_nr};

use super::{StateError, Support, failed};

ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

/// Reads the area; its length is the host's.
pub(super) fn save(vcpu: &VcpuFd, support: &Support) -> Result<Vec<u8>, StateError> {
    let (request, call) = match support.capabilities.xsave2 {
        true => (KVM_GET_XSAVE2(), "KVM_GET_XSAVE2"),
        false => (KVM_GET_XSAVE(), "KVM_GET_XSAVE"),
    };
    let mut area = vec![0; support.xsave_bytes];
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes and KVM_GET_XSAVE2 as many as KVM_CAP_XSAVE2 says; `Support` has the larger of the two.
    // The capability grows only if this process asks for dynamic features (arch_prctl), which it never does.
    let result = unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) };
    if result == 0 { Ok(area) } else { Err(failed(call)(errno::Error::last())) }
}

/// Writes the area. One from a host that has less is filled up with zeros, which is what those registers' absence means.
pub(super) fn load(vcpu: &VcpuFd, area: &[u8], support: &Support) -> Result<(), StateError> {
    if area.len() > support.xsave_bytes {
        return Err(StateError::Xsave { state: area.len(), host: support.xsave_bytes });
    }
    if area.len() == support.xsave_bytes {
        return set(vcpu, area);
    }
    let mut larger = area.to_vec();
    larger.resize(support.xsave_bytes, 0);
    set(vcpu, &larger)
}

/// `area` has `Support::xsave_bytes` bytes.
fn set(vcpu: &VcpuFd, area: &[u8]) -> Result<(), StateError> {
    // SAFETY: KVM_SET_XSAVE reads as many bytes as KVM_CAP_XSAVE2 says, at least 4096, from any alignment; the callers checked the length.
    let result = unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(failed("KVM_SET_XSAVE")(errno::Error::last())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_have_the_kernels_numbers() {
        assert_eq!((KVM_GET_XSAVE(), KVM_GET_XSAVE2(), KVM_SET_XSAVE()), (0x9000_aea4, 0x9000_aecf, 0x5000_aea5));
    }
}
