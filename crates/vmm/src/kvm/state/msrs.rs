//! Model specific registers: which are saved, and in which order they are loaded.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{StateError, failed};

/// What one `KVM_GET_MSRS` or `KVM_SET_MSRS` takes (`MAX_IO_MSRS` of the kernel).
pub(super) const MAX_AT_ONCE: usize = 256;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
const ARCH_CAPABILITIES: u32 = 0x10a;
const PERF_CAPABILITIES: u32 = 0x345;
const MICROCODE_REVISION: u32 = 0x8b;
const PLATFORM_INFO: u32 = 0xce;
const MISC_ENABLE: u32 = 0x1a0;
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const KVM_PV_EOI: u32 = 0x4b56_4d04;
const KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;

/// Registers that a guest can set and `KVM_GET_MSR_INDEX_LIST` leaves out in many kernels: the memory type ranges.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// The registers to save out of the list of this host's KVM, in the order of [`rank`].
pub(super) fn to_save(listed: &[u32]) -> Vec<u32> {
    let mut indices: Vec<u32> = listed.iter().copied().filter(|index| belongs(*index)).chain(MTRRS).collect();
    indices.sort_by_key(|index| (rank(*index), *index));
    indices.dedup();
    indices
}

/// Registers that are listed and yet no part of a guest's state.
fn belongs(index: u32) -> bool {
    match index {
        // The same values as KVM_WALL_CLOCK and KVM_SYSTEM_TIME under their first numbers. Writing them as well would switch the
        // machine to the old clock, which has no common time base for all vCPUs.
        KVM_WALL_CLOCK_OLD | KVM_SYSTEM_TIME_OLD => false,
        // Writing it means "that page is there now"; its value is always 0.
        KVM_ASYNC_PF_ACK => false,
        // Hyper-V's, which our guests are not offered; writing one makes KVM build the whole emulation.
        0x4000_0000..=0x4000_01ff => false,
        // What nested VMX can do: follows from the CPUID, and the guest is not offered it.
        0x480..=0x493 => false,
        _ => true,
    }
}

/// Smaller is loaded earlier.
///
/// 0. What the CPU is: KVM derives from these which values of others are valid (PERF_CAPABILITIES resets the counters).
/// 1. The time stamp counter: everything timed counts from it.
/// 2. Everything else.
/// 3. Pages KVM writes into: the wall clock, then the clock, then steal time and the end-of-interrupt page.
/// 4. Asynchronous page faults are switched on after their vector was set.
/// 5. The deadline of the local APIC's timer: ignored unless the local APIC is in deadline mode already, and compared with the time
///    stamp counter at once. (So the local APIC, and with it `MSR_IA32_APICBASE` among the special registers, are loaded before.)
fn rank(index: u32) -> u8 {
    match index {
        ARCH_CAPABILITIES | PERF_CAPABILITIES | MICROCODE_REVISION | PLATFORM_INFO | MISC_ENABLE => 0,
        TSC => 1,
        KVM_WALL_CLOCK | KVM_SYSTEM_TIME | KVM_STEAL_TIME | KVM_PV_EOI => 3,
        KVM_ASYNC_PF_EN => 4,
        TSC_DEADLINE => 5,
        _ => 2,
    }
}

/// Whether a new vCPU has 0 here by the architecture, so that a 0 need not be written: each write costs a restore 0.1 µs and more.
fn zero_when_new(index: u32) -> bool {
    matches!(index,
        // performance counters and their control
        0xc1..=0xd8 | 0x186..=0x19d | 0x309..=0x30c | 0x38d..=0x390 | 0x3f1 | 0x3f2 | 0x4c1..=0x4d8
        // branch records
        | 0x1d9..=0x1de
        // AMD's counters
        | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0303
        // clock pages and machine check, switched off
        | KVM_WALL_CLOCK | KVM_SYSTEM_TIME | KVM_STEAL_TIME | KVM_PV_EOI | KVM_ASYNC_PF_EN | 0x17a | 0x17b
        | TSC_DEADLINE)
        || MTRRS.contains(&index)
}

/// Whether the guest uses KVM's clock.
pub(super) fn has_clock(values: &[kvm_msr_entry]) -> bool {
    values.iter().any(|entry| entry.index == KVM_SYSTEM_TIME && entry.data & 1 == 1)
}

/// Reads the registers. One that this vCPU does not have (the list is the host's, not the vCPU's) is left out.
pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<kvm_msr_entry> =
            rest.iter().take(MAX_AT_ONCE).map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = from_entries(&asked)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(read).filter(|entry| entry.data != 0 || !zero_when_new(entry.index)));
        // KVM stops at the first register it refuses; go on behind it.
        let done = if read < asked.len() { read + 1 } else { read };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(values)
}

/// What is written to the time stamp counter before its value: minutes away from everything.
const FAR_AWAY: u64 = 1 << 40;

/// Writes the registers in the given order.
///
/// KVM takes a time stamp counter that is within a second of what it expects, from the last write to any vCPU's or else from the
/// machine's creation, for an attempt to bring vCPUs in step: it then gives the vCPU the others' offset and forgets the value. For all
/// vCPUs but the first that is what keeps them exactly together. For the `first` it would be wrong by up to a second, back or forth,
/// whenever a machine happens to have waited for about as long as the template had run; so it is moved far away before.
pub(super) fn load(vcpu: &VcpuFd, values: &[kvm_msr_entry], first: bool) -> Result<(), StateError> {
    if let Some(counter) = values.iter().find(|entry| first && entry.index == TSC) {
        let far = kvm_msr_entry { data: counter.data.wrapping_add(FAR_AWAY), ..*counter };
        write(vcpu, &[far])?;
    }
    values.chunks(MAX_AT_ONCE).try_for_each(|chunk| write(vcpu, chunk))
}

fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let written = vcpu.set_msrs(&from_entries(entries)?).map_err(failed("KVM_SET_MSRS"))?;
    match entries.get(written) {
        Some(refused) => Err(StateError::Msr { index: refused.index, value: refused.data }),
        None => Ok(()),
    }
}

fn from_entries(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries).map_err(|_| StateError::TooMany {
        what: "model specific registers",
        found: entries.len(),
        limit: MAX_AT_ONCE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_the_documented_one_and_nothing_comes_twice() {
        let listed = [
            0x6e0,
            0x174,
            KVM_ASYNC_PF_EN,
            0x4b56_4d06,
            0x10,
            KVM_SYSTEM_TIME,
            0x10a,
            0x12,
            0x11,
            0x200,
            0x4000_0000,
            0x480,
        ];
        let order = to_save(&listed);
        let place = |index: u32| order.iter().position(|other| *other == index);
        assert!(place(0x10a) < place(0x10) && place(0x10) < place(0x174) && place(0x174) < place(KVM_SYSTEM_TIME));
        assert!(place(0x4b56_4d06) < place(KVM_ASYNC_PF_EN), "the vector before the switch");
        assert_eq!(order.last(), Some(&0x6e0), "the deadline last");
        assert_eq!(order.iter().filter(|index| **index == 0x200).count(), 1);
        for left_out in [0x11, 0x12, 0x4000_0000, 0x480] {
            assert_eq!(place(left_out), None, "{left_out:#x}");
        }
    }
}
