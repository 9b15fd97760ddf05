//! Interrupts on their way, timers that run, and clocks.

use std::arch::global_asm;

use kvm_bindings::kvm_irqchip;
use offshoot_vmm::kvm::state::VmState;

use crate::guest::{CODE, DONE, Guest, READY, RESULTS, kvm};

/// Vector of the local APIC's timer in these guests.
const TIMER: u8 = 0x40;

// What all of them do at their end: let interrupts in and wait for one for some 2e9 counts, about a second. The handler writes
// to the port that means success.
global_asm!(
    ".pushsection .rodata",
    ".macro wait_for_interrupt",
    "rdtsc",
    "shl rdx, 32",
    "lea rbx, [rax + rdx]",
    "sti",
    "2: pause",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, rbx",
    "mov rcx, 2000000000",
    "cmp rax, rcx",
    "jb 2b",
    "out 0x12, al",
    ".endm",
    // Local APIC on, its timer once, interrupts off: waits until the interrupt is requested, and is captured then.
    "pending_64:",
    "mov r15, 0xfee00000",
    "mov dword ptr [r15 + 0xf0], 0x1ff",
    "mov dword ptr [r15 + 0x320], 0x40",
    "mov dword ptr [r15 + 0x3e0], 0xb",
    "mov dword ptr [r15 + 0x380], 1000",
    "3: pause",
    "mov eax, [r15 + 0x220]",
    "test eax, 1",
    "jz 3b",
    "mov dword ptr [r15 + 0x320], 0x10040",
    "out 0x10, al",
    "wait_for_interrupt",
    "pending_64_handler:",
    "out 0x11, al",
    "hlt",
    "pending_64_end:",
    // The same with a periodic timer that runs while it is captured, at 1 GHz 10 ms.
    "running_64:",
    "mov r15, 0xfee00000",
    "mov dword ptr [r15 + 0xf0], 0x1ff",
    "mov dword ptr [r15 + 0x320], 0x20040",
    "mov dword ptr [r15 + 0x3e0], 0xb",
    "mov dword ptr [r15 + 0x380], 10000000",
    "out 0x10, al",
    "wait_for_interrupt",
    "running_64_handler:",
    "mov dword ptr [r15 + 0xb0], 0",
    "out 0x11, al",
    "iretq",
    "running_64_end:",
    // Deadline mode: one in 2^28 counts, about 0.1 s.
    "deadline_64:",
    "mov r15, 0xfee00000",
    "mov dword ptr [r15 + 0xf0], 0x1ff",
    "mov dword ptr [r15 + 0x320], 0x40040",
    "mfence",
    "rdtsc",
    "add eax, 0x10000000",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "out 0x10, al",
    "wait_for_interrupt",
    "deadline_64_handler:",
    "out 0x11, al",
    "hlt",
    "deadline_64_end:",
    // PICs at vectors 0x20 and 0x28, only the timer's line open; channel 0 of the PIT every 10 ms; the local APIC lets the PIC through.
    "pit_64:",
    "mov r15, 0xfee00000",
    "mov dword ptr [r15 + 0xf0], 0x1ff",
    "mov dword ptr [r15 + 0x350], 0x700",
    "mov al, 0x11",
    "out 0x20, al",
    "out 0xa0, al",
    "mov al, 0x20",
    "out 0x21, al",
    "mov al, 0x28",
    "out 0xa1, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 2",
    "out 0xa1, al",
    "mov al, 1",
    "out 0x21, al",
    "out 0xa1, al",
    "mov al, 0xfe",
    "out 0x21, al",
    "mov al, 0xff",
    "out 0xa1, al",
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0x9c",
    "out 0x40, al",
    "mov al, 0x2e",
    "out 0x40, al",
    "out 0x10, al",
    "wait_for_interrupt",
    "pit_64_handler:",
    "mov al, 0x20",
    "out 0x20, al",
    "out 0x11, al",
    "iretq",
    "pit_64_end:",
    // KVM's clock in a page of its own; after the capture, that page is copied.
    "clock_64:",
    "mov ecx, 0x4b564d01",
    "mov eax, 0x30001",
    "xor edx, edx",
    "wrmsr",
    "out 0x10, al",
    "mov rax, [0x30018]",
    "mov [0x20000], rax",
    "rdtsc",
    "mov [0x20008], eax",
    "mov [0x2000c], edx",
    "out 0x11, al",
    "hlt",
    "clock_64_end:",
    ".popsection",
);

macro_rules! handler {
    ($start:ident, $handler:ident) => {
        code!($start, $handler).len()
    };
}

/// Captures the guest at its request and runs two forks of it to their end.
fn both_forks_get_it(code: &[u8], vector: u8, handler: usize) {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code, &[(vector, handler)]);
    template.enter_64_bit();
    assert_eq!(template.run(), READY);
    let snapshot = template.capture();
    drop(template);
    for _ in 0..2 {
        let mut fork = Guest::fork(&kvm, &file, &snapshot);
        assert_eq!(fork.run(), DONE, "the interrupt did not come");
    }
    // The check can fail: without the local APIC and PIC state there is no interrupt to come.
    let mut empty = Guest::fork(&kvm, &file, &snapshot);
    let mut lapic = empty.vcpu.get_lapic().unwrap();
    for offset in (0x200..0x280).chain(0x320..0x324).chain(0x350..0x354).chain(0x380..0x384) {
        lapic.regs[offset] = 0;
    }
    (lapic.regs[0x322], lapic.regs[0x352]) = (1, 1);
    empty.vcpu.set_lapic(&lapic).unwrap();
    assert_eq!(empty.run(), 0x12, "the interrupt came from nowhere");
}

#[test]
fn an_interrupt_that_waits_in_the_local_apic_is_delivered() {
    both_forks_get_it(code!(pending_64, pending_64_end), TIMER, handler!(pending_64, pending_64_handler));
}

#[test]
fn a_periodic_timer_goes_on() {
    both_forks_get_it(code!(running_64, running_64_end), TIMER, handler!(running_64, running_64_handler));
}

#[test]
fn a_deadline_is_kept() {
    both_forks_get_it(code!(deadline_64, deadline_64_end), TIMER, handler!(deadline_64, deadline_64_handler));
}

#[test]
fn the_pit_ticks_on_through_the_pic() {
    both_forks_get_it(code!(pit_64, pit_64_end), 0x20, handler!(pit_64, pit_64_handler));
}

#[test]
fn chips_and_timer_are_saved_as_they_were_loaded() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template =
        Guest::template(&kvm, &file, code!(pit_64, pit_64_end), &[(0x20, handler!(pit_64, pit_64_handler))]);
    template.enter_64_bit();
    assert_eq!(template.run(), READY);
    let mut snapshot = template.capture();
    // An IOAPIC with pins of every kind, all masked but one.
    // SAFETY: the third chip is the IOAPIC; all bytes of its entries are plain numbers.
    let ioapic = unsafe { &mut snapshot.vm.irqchips[2].chip.ioapic };
    for (pin, entry) in ioapic.redirtbl.iter_mut().enumerate() {
        entry.bits = 0x0001_0000 | (0x30 + pin as u64) | ((pin as u64 & 1) << 15);
    }
    ioapic.redirtbl[5].bits = 0x35;
    for _ in 0..2 {
        let fork = Guest::fork(&kvm, &file, &snapshot);
        let again = VmState::save(&fork.vm).unwrap();
        for (found, loaded) in again.irqchips.iter().zip(&snapshot.vm.irqchips).skip(1) {
            assert_eq!(bytes_of(found), bytes_of(loaded));
        }
        assert_eq!(again.pit.channels[0].count, snapshot.vm.pit.channels[0].count);
        assert_eq!(again.pit.channels[0].mode, snapshot.vm.pit.channels[0].mode);
        assert_eq!(again.pit.channels[0].count, 0x2e9c);
    }
}

#[test]
fn clocks_go_on_from_the_capture_and_the_guest_is_told_that_it_stood_still() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code!(clock_64, clock_64_end), &[]);
    template.enter_64_bit();
    assert_eq!(template.run(), READY);
    let mut snapshot = template.capture();
    drop(template);
    // As if the template were ten hours old.
    snapshot.vm.clock.realtime = snapshot.vm.clock.realtime.saturating_sub(36_000_000_000_000);
    let captured = snapshot.vm.clock.clock;
    let counter = snapshot.vcpus[0].msrs.iter().find(|msr| msr.index == 0x10).unwrap().data;
    let rate = u64::from(snapshot.vcpus[0].tsc_khz.max(1)) * 1000;
    for _ in 0..2 {
        let mut fork = Guest::fork(&kvm, &file, &snapshot);
        let passed = fork.vm.get_clock().unwrap().clock.wrapping_sub(captured);
        assert!(passed < 60_000_000_000, "{passed} ns have passed for the guest's clock");
        assert_eq!(fork.run(), DONE);
        let passed = fork.result(1).wrapping_sub(counter);
        assert!(passed < 60 * rate, "{passed} counts have passed for the guest");
        // Byte 29 of the clock's page: flags; bit 1: the guest was stopped.
        assert_eq!((fork.result(0) >> 40) & 2, 2, "{:#x} at {:#x}", fork.result(0), RESULTS);
    }
    assert_eq!(CODE % 4096, 0);
}

fn bytes_of(chip: &kvm_irqchip) -> &[u8] {
    zerocopy::IntoBytes::as_bytes(chip)
}
