//! Registers of every kind.

use std::arch::global_asm;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_msr_entry};
use offshoot_vmm::kvm::state::{StateError, VcpuState};

use crate::guest::{DONE, Guest, READY, kvm};

// Fills registers, waits for the capture, stores what it finds.
global_asm!(
    ".pushsection .rodata",
    "registers_64:",
    "mov r15, 0x20000",
    // SSE, control word of SSE
    "mov rax, 0x1122334455667788",
    "mov [r15+0x800], rax",
    "not rax",
    "mov [r15+0x808], rax",
    "movups xmm0, [r15+0x800]",
    "movups xmm7, [r15+0x808]",
    "movups xmm15, [r15+0x800]",
    // debug registers
    "mov rax, 0x1234000",
    "mov dr0, rax",
    "mov rax, 0x5678000",
    "mov dr3, rax",
    "mov rax, 0x702",
    "mov dr7, rax",
    // MSRs: LSTAR, KERNEL_GS_BASE, PAT
    "mov ecx, 0xc0000082",
    "mov eax, 0x89abc000",
    "mov edx, 0xffffffff",
    "wrmsr",
    "mov ecx, 0xc0000102",
    "mov eax, 0x13572468",
    "mov edx, 0x7fff",
    "wrmsr",
    "mov ecx, 0x277",
    "mov eax, 0x00070106",
    "mov edx, 0x00070106",
    "wrmsr",
    // control registers
    "mov rax, 0x777000",
    "mov cr2, rax",
    "mov rax, 5",
    "mov cr8, rax",
    // general registers
    "mov r8, 0x0808080808080808",
    "mov r14, 0x1414141414141414",
    "mov rbp, 0x0b0b0b0b0b0b0b0b",
    "stc",
    "out 0x10, al",
    "pushfq",
    "pop [r15]",
    "mov [r15+8], r8",
    "mov [r15+16], r14",
    "mov [r15+24], rbp",
    "mov rax, cr2",
    "mov [r15+32], rax",
    "mov rax, cr8",
    "mov [r15+40], rax",
    "mov rax, dr0",
    "mov [r15+48], rax",
    "mov rax, dr3",
    "mov [r15+56], rax",
    "mov rax, dr7",
    "mov [r15+64], rax",
    "mov ecx, 0xc0000082",
    "rdmsr",
    "mov [r15+72], eax",
    "mov [r15+76], edx",
    "mov ecx, 0xc0000102",
    "rdmsr",
    "mov [r15+80], eax",
    "mov [r15+84], edx",
    "mov ecx, 0x277",
    "rdmsr",
    "mov [r15+88], eax",
    "mov [r15+92], edx",
    "movups [r15+96], xmm0",
    "movups [r15+112], xmm7",
    "movups [r15+128], xmm15",
    "out 0x11, al",
    "hlt",
    "registers_64_end:",
    ".popsection",
);

#[test]
fn a_guest_finds_its_registers_in_each_of_two_forks() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code!(registers_64, registers_64_end), &[]);
    template.enter_64_bit();
    assert_eq!(template.run(), READY);
    let snapshot = template.capture();
    drop(template);
    for _ in 0..2 {
        let mut fork = Guest::fork(&kvm, &file, &snapshot);
        assert_eq!(fork.run(), DONE);
        assert_eq!(fork.result(0) & 1, 1, "carry flag");
        assert_eq!([fork.result(1), fork.result(2), fork.result(3)], [0x08 * ONES, 0x14 * ONES, 0x0b * ONES]);
        assert_eq!([fork.result(4), fork.result(5)], [0x0077_7000, 5], "cr2, cr8");
        assert_eq!([fork.result(6), fork.result(7)], [0x0123_4000, 0x0567_8000], "dr0, dr3");
        assert_eq!(fork.result(8) & 0x702, 0x702, "dr7");
        assert_eq!(fork.result(9), 0xffff_ffff_89ab_c000, "LSTAR");
        assert_eq!(fork.result(10), 0x7fff_1357_2468, "KERNEL_GS_BASE");
        assert_eq!(fork.result(11), 0x0007_0106_0007_0106, "PAT");
        let (word, not) = (0x1122_3344_5566_7788_u64, !0x1122_3344_5566_7788_u64);
        assert_eq!([fork.result(12), fork.result(13)], [word, not], "xmm0");
        assert_eq!(fork.result(14), not, "xmm7");
        assert_eq!([fork.result(16), fork.result(17)], [word, not], "xmm15");
    }
}

const ONES: u64 = 0x0101_0101_0101_0101;

/// FPU, AVX and everything else there is, put in by the host: the guest need not be able to run AVX instructions (KVM may emulate).
#[test]
fn what_is_loaded_is_what_is_saved_again() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code!(registers_64, registers_64_end), &[]);
    template.enter_64_bit();
    let mut state = template.capture().vcpus.remove(0);
    let supported = state.xcrs.xcrs[0].value | 7 & supported_xcr0(&state);
    state.xcrs.xcrs[0].value = supported;
    fill_xsave(&mut state.xsave, supported);
    state.debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
    (state.debug.dr6, state.debug.dr7) = (0xffff_0ff1, 0x402);
    state.events.nmi.pending = 1;
    state.events.nmi.masked = 1;
    state.events.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
    state.mp_state.mp_state = KVM_MP_STATE_HALTED;
    // Local APIC: task priority, spurious vector, a request for vector 0x91 and one in service.
    for (offset, value) in [(0x80, 0x30), (0xf0, 0x1ff), (0x100 + 0x40, 1 << 2), (0x200 + 0x40, 1 << 17)] {
        for (byte, letter) in u32::to_le_bytes(value).into_iter().enumerate() {
            state.lapic.regs[offset + byte] = letter.cast_signed();
        }
    }
    state.sregs.control[4] = 3; // cr8 is the local APIC's task priority

    for _ in 0..2 {
        let fresh = Guest::fork(&kvm, &file, &template.capture());
        state.load(&fresh.vcpu, &fresh.support).unwrap();
        let again = VcpuState::save(&fresh.vcpu, &fresh.support).unwrap();
        assert_eq!(again.regs, state.regs);
        assert_eq!(again.sregs, state.sregs);
        assert_eq!(again.xcrs, state.xcrs);
        assert_eq!(again.debug, state.debug);
        assert_eq!(again.mp_state, state.mp_state);
        assert_eq!(again.events, state.events);
        // Without the processor's priority, which KVM works out anew.
        let told = |state: &VcpuState| [state.lapic.regs[..0xa0].to_vec(), state.lapic.regs[0xa4..].to_vec()];
        assert_eq!(told(&again), told(&state));
        // Without the area's size for what is switched on, which follows from the extended control register set above.
        let told =
            |state: &VcpuState| -> Vec<_> { state.cpuid.iter().filter(|leaf| leaf.function != 0xd).copied().collect() };
        assert_eq!(told(&again), told(&state));
        assert_eq!(again.tsc_khz, state.tsc_khz);
        assert!(again.xsave == state.xsave, "FPU, SSE and AVX registers");
        let timeless = |state: &VcpuState| -> Vec<_> {
            state.msrs.iter().filter(|msr| msr.index != 0x10).map(|msr| (msr.index, msr.data)).collect()
        };
        assert_eq!(timeless(&again), timeless(&state));
        let counter = |state: &VcpuState| state.msrs.iter().find(|msr| msr.index == 0x10).unwrap().data;
        let passed = counter(&again).wrapping_sub(counter(&state));
        assert!(
            passed < 60_000 * u64::from(state.tsc_khz.max(1)),
            "the counter goes on from where it was, not {passed} further"
        );
    }
}

#[test]
fn an_msr_that_is_refused_is_named() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code!(registers_64, registers_64_end), &[]);
    template.enter_64_bit();
    let snapshot = template.capture();
    let mut state = snapshot.vcpus[0].clone();
    // A number that no processor has, among the others.
    state.msrs.insert(3, kvm_msr_entry { index: 0x1234_5678, data: 0xff, ..Default::default() });
    let fork = Guest::fork(&kvm, &file, &snapshot);
    let refused = state.load(&fork.vcpu, &fork.support);
    assert!(matches!(refused, Err(StateError::Msr { index: 0x1234_5678, value: 0xff })), "{refused:?}");
}

#[test]
fn a_second_processor_that_was_never_started_is_not_started() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let template = Guest::template(&kvm, &file, code!(registers_64, registers_64_end), &[]);
    let state = VcpuState::save(&template.vm.create_vcpu(1).unwrap(), &template.support).unwrap();
    assert_eq!(state.mp_state, kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED });
    let other = Guest::template(&kvm, &file, code!(registers_64, registers_64_end), &[]);
    let vcpu = other.vm.create_vcpu(1).unwrap();
    state.load(&vcpu, &other.support).unwrap();
    assert_eq!(vcpu.get_mp_state().unwrap(), state.mp_state);
}

/// Leaf 0xd: the parts of the XSAVE area the guest may switch on.
fn supported_xcr0(state: &VcpuState) -> u64 {
    let leaf = state.cpuid.iter().find(|entry| entry.function == 0xd && entry.index == 0);
    leaf.map_or(3, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
}

/// Patterns in FPU registers and their control and status, SSE registers and MXCSR, and, where the guest has them, AVX.
fn fill_xsave(area: &mut [u8], xcr0: u64) {
    area[0..2].copy_from_slice(&0x027f_u16.to_le_bytes()); // control: 53 bit
    area[2..4].copy_from_slice(&0x3800_u16.to_le_bytes()); // status: top of stack 7
    area[4] = 0x80; // one register in use
    for (at, byte) in area[32..160].iter_mut().enumerate() {
        // ten bytes of each of eight registers
        *byte = if at % 16 < 10 { at as u8 | 1 } else { 0 };
    }
    area[24..28].copy_from_slice(&0x3f80_u32.to_le_bytes()); // MXCSR: round to zero for one
    let avx = if xcr0 & 4 != 0 { 576..832 } else { 0..0 };
    for range in [160..416, avx] {
        for (at, byte) in area[range].iter_mut().enumerate() {
            *byte = (at as u8).wrapping_mul(7) | 1;
        }
    }
    area[512..520].copy_from_slice(&(xcr0 & 7).to_le_bytes());
}
