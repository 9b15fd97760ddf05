//! Segments, descriptor tables and control registers, by `KVM_GET_SREGS2` where KVM has it.

use std::mem::{offset_of, size_of};

use kvm_bindings::{KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_dtable, kvm_segment, kvm_sregs, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{errno, ioctl_ior_nr, ioctl_iow_nr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{StateError, failed};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// The bit of the local APIC's base that only the vCPU that starts the machine has.
const BOOTSTRAP_PROCESSOR: u64 = 1 << 8;

/// `struct kvm_sregs2` of the kernel, with the same layout; the state file has this form also where the kernel has only the older.
///
/// The older form's bitmap of interrupts is left out: with an irqchip in the kernel the same interrupt is among the vCPU's events.
#[derive(Clone, Copy, Debug, Default, PartialEq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct SpecialRegisters {
    /// cs, ds, es, fs, gs, ss, tr, ldt.
    pub segments: [kvm_segment; 8],
    /// Global descriptor table.
    pub gdt: kvm_dtable,
    /// Interrupt descriptor table.
    pub idt: kvm_dtable,
    /// cr0, cr2, cr3, cr4, cr8.
    pub control: [u64; 5],
    /// Extended feature enable register.
    pub efer: u64,
    /// Place and mode of the local APIC.
    pub apic_base: u64,
    /// `KVM_SREGS2_FLAGS_*`.
    pub flags: u64,
    /// Page directory pointers, if the flag says that they count.
    pub pdptrs: [u64; 4],
}

const _: () = {
    assert!(size_of::<SpecialRegisters>() == size_of::<kvm_sregs2>());
    assert!(offset_of!(SpecialRegisters, gdt) == offset_of!(kvm_sregs2, gdt));
    assert!(offset_of!(SpecialRegisters, control) == offset_of!(kvm_sregs2, cr0));
    assert!(offset_of!(SpecialRegisters, apic_base) == offset_of!(kvm_sregs2, apic_base));
    assert!(offset_of!(SpecialRegisters, pdptrs) == offset_of!(kvm_sregs2, pdptrs));
};

impl SpecialRegisters {
    pub(super) fn save(vcpu: &VcpuFd, sregs2: bool) -> Result<Self, StateError> {
        if !sregs2 {
            return vcpu.get_sregs().map(Self::from_old).map_err(failed("KVM_GET_SREGS"));
        }
        let mut registers = Self::default();
        // SAFETY: the kernel writes one `struct kvm_sregs2`, whose layout the assertions above compare with ours.
        let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut registers) };
        if result == 0 { Ok(registers) } else { Err(failed("KVM_GET_SREGS2")(errno::Error::last())) }
    }

    /// Without `sregs2` the kernel reads the page directory pointers from the guest's memory, which is there already: the same result
    /// unless the guest changed the table without loading cr3 again.
    pub(super) fn load(&self, vcpu: &VcpuFd, sregs2: bool) -> Result<(), StateError> {
        if !sregs2 {
            return vcpu.set_sregs(&self.to_old()).map_err(failed("KVM_SET_SREGS"));
        }
        // SAFETY: the kernel reads one `struct kvm_sregs2`, whose layout the assertions above compare with ours.
        let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), self) };
        if result == 0 { Ok(()) } else { Err(failed("KVM_SET_SREGS2")(errno::Error::last())) }
    }

    /// Whether the captured guest needs `KVM_SET_SREGS2` to be put back exactly.
    #[must_use]
    pub fn has_page_directory_pointers(&self) -> bool {
        self.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0
    }

    /// Whether this is the vCPU that starts the machine.
    pub(super) fn is_first(&self) -> bool {
        self.apic_base & BOOTSTRAP_PROCESSOR != 0
    }

    fn from_old(old: kvm_sregs) -> Self {
        Self {
            segments: [old.cs, old.ds, old.es, old.fs, old.gs, old.ss, old.tr, old.ldt],
            gdt: old.gdt,
            idt: old.idt,
            control: [old.cr0, old.cr2, old.cr3, old.cr4, old.cr8],
            efer: old.efer,
            apic_base: old.apic_base,
            flags: 0,
            pdptrs: [0; 4],
        }
    }

    fn to_old(self) -> kvm_sregs {
        let [cs, ds, es, fs, gs, ss, tr, ldt] = self.segments;
        let [cr0, cr2, cr3, cr4, cr8] = self.control;
        let (gdt, idt, efer, apic_base) = (self.gdt, self.idt, self.efer, self.apic_base);
        kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_have_the_kernels_numbers() {
        assert_eq!((KVM_GET_SREGS2(), KVM_SET_SREGS2()), (0x8140_aecc, 0x4140_aecd));
    }

    #[test]
    fn the_old_form_keeps_every_field() {
        let mut registers = SpecialRegisters::default();
        for (byte, value) in registers.as_mut_bytes().iter_mut().zip((1..=251).cycle()) {
            *byte = value;
        }
        registers.flags = 0;
        registers.pdptrs = [0; 4];
        assert_eq!(SpecialRegisters::from_old(registers.to_old()), registers);
    }
}
