//! One template, two forks.

use std::{arch::global_asm, io::Read, os::unix::fs::FileExt};

use vm_memory::{Bytes, GuestAddress};

use crate::guest::{CODE, DONE, Guest, MEMORY, READY, RESULTS, kvm};

// Copies a word from 0x3000 of its segment, which the host fills in each fork, and counts in a register across the capture.
global_asm!(
    ".pushsection .rodata",
    ".code16",
    "identity_16: mov bx, 41",
    "mov word ptr [0x4000], 7",
    "out 0x10, al",
    "inc bx",
    "mov ax, word ptr [0x3000]",
    "mov word ptr [0x4002], ax",
    "mov word ptr [0x4004], bx",
    "out 0x11, al",
    "hlt",
    "identity_16_end:",
    ".code64",
    ".popsection",
);

#[test]
fn two_forks_read_their_own_identity_and_the_template_stays_as_it_was() {
    let Some(kvm) = kvm() else { return };
    let mut file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code!(identity_16, identity_16_end), &[]);
    template.enter_16_bit();
    assert_eq!(template.run(), READY);
    let snapshot = template.capture();
    drop(template);
    let mut before = Vec::new();
    file.read_to_end(&mut before).unwrap();
    assert_eq!(before[CODE as usize + 0x4000], 7, "what the template wrote is in its file");

    let mut forks: Vec<Guest> = (0..2).map(|_| Guest::fork(&kvm, &file, &snapshot)).collect();
    for (fork, identity) in forks.iter_mut().zip([0xaaaa_u16, 0xbbbb]) {
        fork.memory.write_obj(identity, GuestAddress(CODE + 0x3000)).unwrap();
    }
    for fork in &mut forks {
        assert_eq!(fork.run(), DONE);
    }
    for (fork, identity) in forks.iter().zip([0xaaaa_u16, 0xbbbb]) {
        let found: [u16; 3] = fork.memory.read_obj(GuestAddress(CODE + 0x4000)).unwrap();
        assert_eq!(found, [7, identity, 42]);
        let bytes = fork.bytes();
        let differ: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != before[*at]).map(|at| at / 4096).collect();
        let pages = [CODE as usize / 4096 + 3, CODE as usize / 4096 + 4];
        assert!(
            differ.iter().all(|page| pages.contains(page)),
            "a fork differs in the two pages it was to write, not in {differ:?}"
        );
    }
    let mut after = vec![0; MEMORY as usize];
    file.read_exact_at(&mut after, 0).unwrap();
    assert!(before == after, "the template's memory has changed");
}

#[test]
fn a_capture_in_the_middle_of_an_instruction_is_finished_first() {
    let Some(kvm) = kvm() else { return };
    let file = tempfile::tempfile().unwrap();
    let mut template = Guest::template(&kvm, &file, code!(identity_16, identity_16_end), &[]);
    template.enter_16_bit();
    assert_eq!(template.run(), READY);
    let rip = template.capture().vcpus[0].regs.rip;
    // mov bx, 41; mov word [0x4000], 7; out 0x10, al: the capture stands behind the last.
    assert_eq!(rip, 3 + 6 + 2);
    let mut fork = Guest::fork(&kvm, &file, &template.capture());
    assert_eq!(fork.run(), DONE, "the write to the first port is not repeated");
    assert_eq!(fork.result(0), 0, "nothing is written at {RESULTS:#x} by this guest");
}
