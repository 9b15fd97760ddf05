//! What a guest is told of its processor.
//!
//! It gets what the host's KVM supports, less what a capture could not carry or another host might lack, with the
//! topology of its own machine: one socket, `vcpus` cores, one thread each.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::KvmError;

/// Paravirtual features (leaf 0x4000_0001, KVM's `cpuid.rst`): clock source, no I/O delay, second clock source, unhalt, send IPI,
/// stable clock. The others keep state in guest memory that the host writes while nobody runs (steal time), or complete
/// something later that a captured guest would wait for in vain (asynchronous page faults).
const PARAVIRTUAL: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 7 | 1 << 11 | 1 << 24;

/// What KVM supports on this host, before [`for_vcpu`].
///
/// # Errors
/// [`KvmError::Refused`].
pub fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::refused("tell the processor's features"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        restrict(entry, deadline);
    }
    Ok(cpuid)
}

/// The table of one vCPU of a machine of `vcpus`.
pub fn for_vcpu(supported: &CpuId, id: u8, vcpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        place(entry, id.into(), vcpus.max(1).into());
    }
    cpuid
}

/// Takes away what is the same for all vCPUs.
fn restrict(entry: &mut kvm_cpuid_entry2, deadline: bool) {
    match (entry.function, entry.index) {
        (1, _) => {
            // Nested virtualisation (VMX), debug store, perfmon: state that is not captured.
            entry.ecx &= !(1 << 5 | 1 << 2 | 1 << 15);
            entry.edx &= !(1 << 21);
            // A hypervisor is there, and its local APIC has the deadline timer.
            entry.ecx |= 1 << 31;
            if deadline {
                entry.ecx |= 1 << 24;
            }
        }
        // SGX; Intel PT.
        (7, 0) => entry.ebx &= !(1 << 2 | 1 << 25),
        // Performance counters, SGX, PT, AMX.
        (0xa | 0x12 | 0x14 | 0x1d | 0x1e | 0x8000_0022, _) => clear(entry),
        // AMX state in XSAVE areas: larger than the page KVM_GET_XSAVE has.
        (0xd, 0) => entry.eax &= !(3 << 17),
        (0xd, 17 | 18) => clear(entry),
        (0x4000_0001, _) => entry.eax &= PARAVIRTUAL,
        // Nested virtualisation (SVM), IBS, performance counters.
        (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28),
        (0x8000_000a | 0x8000_001b | 0x8000_001f, _) => clear(entry),
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Bits that hold a number below `count`.
fn width(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Sets identity and topology.
fn place(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | (1 << width(vcpus)) << 16 | id << 24;
            // More than one logical processor in the package.
            entry.edx = entry.edx & !(1 << 28) | u32::from(vcpus > 1) << 28;
        }
        // Caches: the first two levels are of one core, the third is shared. Bits 14-25: sharers, 26-31: cores (less one).
        4 if entry.eax & 0x1f != 0 => {
            let sharers = if (entry.eax >> 5) & 7 >= 3 { (1 << width(vcpus)) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharers << 14 | (vcpus - 1) << 26;
        }
        0xb | 0x1f => {
            let (shift, count, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (width(vcpus), vcpus, 2),
                _ => (0, 0, 0),
            };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (shift, count, entry.index | kind << 8, id);
        }
        // AMD: number of cores less one, and bits of a core's number.
        0x8000_0008 => entry.ecx = (vcpus - 1) | width(vcpus) << 12,
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharers = if (entry.eax >> 5) & 7 >= 3 { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharers << 14;
        }
        // AMD: own number, core (one thread each), node (one).
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn nothing_that_a_capture_cannot_carry_is_offered() {
        let mut one = entry(1, 0);
        restrict(&mut one, false);
        assert_eq!(one.ecx & (1 << 5), 0, "VMX");
        let mut amd = entry(0x8000_0001, 0);
        restrict(&mut amd, false);
        assert_eq!(amd.ecx & (1 << 2), 0, "SVM");
        let mut paravirtual = entry(0x4000_0001, 0);
        restrict(&mut paravirtual, false);
        assert_eq!(paravirtual.eax & (1 << 4 | 1 << 5 | 1 << 14), 0, "asynchronous page faults, steal time");
        let mut counters = entry(0xa, 0);
        restrict(&mut counters, false);
        assert_eq!(counters.eax, 0);
    }

    #[test]
    fn the_deadline_timer_is_announced_where_kvm_has_it() {
        for deadline in [false, true] {
            let mut one = kvm_cpuid_entry2 { function: 1, ..Default::default() };
            restrict(&mut one, deadline);
            assert_eq!(one.ecx, 1 << 31 | u32::from(deadline) << 24);
        }
    }

    #[test]
    fn each_vcpu_has_its_own_number() {
        for (id, vcpus, width) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (7, 8, 3)] {
            let mut one = entry(1, 0);
            place(&mut one, id, vcpus);
            assert_eq!((one.ebx >> 24, (one.ebx >> 16) & 0xff), (id, 1 << width));
            assert_eq!(one.edx >> 28 & 1, u32::from(vcpus > 1));
            let mut topology = entry(0xb, 1);
            place(&mut topology, id, vcpus);
            assert_eq!((topology.eax, topology.ebx, topology.ecx, topology.edx), (width, vcpus, 0x201, id));
        }
    }
}
