//! One vCPU: its making, and its state at the first instruction of a kernel.

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{KvmError, vm::Vm};
use crate::{
    layout::{BOOT_PARAMS, BOOT_STACK, GDT, PAGE_BYTES, PAGE_TABLES},
    memory::GuestMemory,
};

/// Segments of the 64-bit boot protocol: flat code at selector 0x10, data at 0x18, and a task at 0x20 that VMX insists on.
/// The numbers are descriptors as in memory: base 0, limit 4 GiB less one, present; code: execute and read, long; data: read and write.
const DESCRIPTORS: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0080_8b00_0000_ffff];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE_ET_PG: u64 = 1 | 1 << 4 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// Interrupts off; bit 1 is always set.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Enabled, write-back: with the ranges off Linux would switch its page attributes off too.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Local vector table entries of the local APIC, and their delivery modes.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTERNAL: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

/// Makes a vCPU without features or state. The ones after the first wait for the guest to start them.
///
/// # Errors
/// [`KvmError::Refused`].
pub fn create(vm: &Vm, id: u8) -> Result<VcpuFd, KvmError> {
    vm.fd().create_vcpu(id.into()).map_err(KvmError::refused("make a vCPU"))
}

/// Sets what all vCPUs of a machine that boots have.
///
/// # Errors
/// [`KvmError::Refused`], [`KvmError::Msr`].
pub fn reset(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    // First of all: what other state is valid depends on it.
    vcpu.set_cpuid2(cpuid).map_err(KvmError::refused("take the vCPU's features"))?;
    let msrs = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK)];
    let entries = msrs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let list = Msrs::from_entries(&entries).map_err(|_| KvmError::Msr(MSR_MISC_ENABLE))?;
    let taken = vcpu.set_msrs(&list).map_err(KvmError::refused("set model-specific registers"))?;
    if let Some((index, _)) = msrs.get(taken) {
        return Err(KvmError::Msr(*index));
    }
    // As after FNINIT, and the reset value of MXCSR.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(KvmError::refused("set the floating point unit"))?;
    let mut lapic = vcpu.get_lapic().map_err(KvmError::refused("tell the local APIC's state"))?;
    for (register, mode) in [(LVT_LINT0, DELIVER_EXTERNAL), (LVT_LINT1, DELIVER_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(mode.to_le_bytes()) {
            *byte = i8::from_ne_bytes([value]);
        }
    }
    vcpu.set_lapic(&lapic).map_err(KvmError::refused("set the local APIC"))
}

/// Puts the first vCPU at a kernel's 64-bit entry, and writes the tables it needs to get there.
///
/// # Errors
/// [`KvmError::Refused`], also for memory that is too small for the tables.
pub fn enter_kernel(vcpu: &VcpuFd, memory: &GuestMemory, entry: GuestAddress) -> Result<(), KvmError> {
    write_tables(memory).map_err(|error| KvmError::Refused {
        what: "boot in so little memory",
        source: std::io::Error::other(error),
    })?;
    let mut sregs = vcpu.get_sregs().map_err(KvmError::refused("tell the system registers"))?;
    let data = segment(DATA);
    (sregs.cs, sregs.tr) = (segment(CODE), segment(TASK));
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (DESCRIPTORS.len() * 8 - 1).to_le_bytes()[0].into();
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE_ET_PG, PAGE_TABLES, CR4_PAE, EFER_LME_LMA);
    vcpu.set_sregs(&sregs).map_err(KvmError::refused("set the system registers"))?;
    let regs = kvm_regs {
        rip: entry.0,
        rsi: BOOT_PARAMS,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(KvmError::refused("set the registers"))
}

/// The GDT, and page tables that map the first GiB to itself (the protocol wants kernel, parameters and command line mapped).
fn write_tables(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    for (index, descriptor) in (0_u64..).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(GDT + index * 8))?;
    }
    let [pml4, pdpt, directory] = [0, 1, 2].map(|page| PAGE_TABLES + page * PAGE_BYTES);
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    for index in 0..512 {
        memory.write_obj((index << 21) | PRESENT_WRITABLE | LARGE, GuestAddress(directory + index * 8))?;
    }
    Ok(())
}

/// The hidden part of a segment register, as its descriptor has it.
fn segment(selector: u16) -> kvm_segment {
    let descriptor = DESCRIPTORS[usize::from(selector / 8)];
    let bits = |from: u32, count: u32| u8::try_from((descriptor >> from) & ((1 << count) - 1)).unwrap_or_default();
    kvm_segment {
        base: 0,
        limit: if bits(55, 1) == 1 { u32::MAX } else { 0xffff },
        selector,
        type_: bits(40, 4),
        present: bits(47, 1),
        dpl: bits(45, 2),
        db: bits(54, 1),
        s: bits(44, 1),
        l: bits(53, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}
