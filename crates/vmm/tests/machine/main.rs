//! Whole machines with guests of a few instructions, directly on `/dev/kvm`, also where that cannot boot Linux.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod payload;

use std::{
    collections::HashSet,
    io::Read,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    time::{Duration, Instant},
};

use ::memory::{Delta, ProcessMemory, touched_pages, write_delta};
use offshoot_vmm::{
    machine::{DeviceFiles, Exit, Machine, MachineError, Ready},
    prefetch::PageList,
    snapshot::Snapshot,
    virtio::Cable,
};
use payload::{COUNT_AND_SAY, ENTRY, Guest, MEMORY, READ_NOWHERE, RESET, TRIPLE_FAULT, WORD, files, memory};

const LIMIT: Option<Duration> = Some(Duration::from_secs(20));

/// Whether whoever runs the tests said to do without KVM.
fn no_kvm() -> bool {
    std::env::var_os("OFFSHOOT_TEST_NO_KVM").is_some_and(|value| value == "1")
}

/// A guest that has been captured while it counted, with its memory.
fn captured(vcpus: u8) -> (Snapshot, std::fs::File, u64) {
    let memory = memory();
    let mut template = Guest::boot(COUNT_AND_SAY, vcpus, &memory);
    template.machine.resume();
    template.expect(b"A");
    template.machine.pause();
    let state = template.machine.snapshot().unwrap().encode().unwrap();
    let count = template.count();
    (Snapshot::decode(&state).unwrap(), memory, count)
}

#[test]
fn a_guest_runs_until_it_is_paused_and_goes_on_where_it_was() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let mut guest = Guest::boot(COUNT_AND_SAY, vcpus, &memory());
        assert_eq!(guest.count(), 0);
        guest.machine.resume();
        guest.expect(b"A");
        for round in 0..20 {
            guest.machine.pause();
            let (first, second) = (guest.count(), guest.count());
            assert_eq!(first, second, "round {round}: nothing runs in a machine that is paused");
            guest.machine.resume();
            guest.say(b'+');
            guest.expect([&b"A"[..], &b"+".repeat(round + 1)].concat().as_slice());
            guest.machine.pause();
            assert!(guest.count() >= first, "round {round}: it went on where it was");
            guest.machine.resume();
        }
        // Twice is as good as once.
        guest.machine.pause();
        guest.machine.pause();
        assert_eq!(guest.machine.wait(Some(Duration::ZERO)), None);
    }
}

#[test]
fn copies_go_on_where_the_template_was_and_do_not_see_each_other() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 3] {
        let (snapshot, memory, count) = captured(vcpus);
        let mut copies: Vec<_> = (0..3).map(|_| Guest::restore(&snapshot, &memory)).collect();
        for (copy, word) in copies.iter_mut().zip(b"xyz") {
            assert_eq!(copy.count(), count, "it has not run");
            copy.machine.write(WORD, &[*word]).unwrap();
        }
        copies.iter_mut().for_each(|copy| copy.machine.resume());
        for (copy, word) in copies.iter().zip(b"xyz") {
            copy.expect(&[*word]);
        }
        for copy in &mut copies {
            copy.machine.pause();
            assert!(copy.count() > count);
        }
        let mut template = [0xff];
        memory.read_exact_at(&mut template, WORD).unwrap();
        assert_eq!(template, [0], "the template's memory is as it was");
        // A copy of a copy.
        let again = copies[0].machine.snapshot().unwrap();
        assert_eq!(again.devices.keys().collect::<Vec<_>>(), snapshot.devices.keys().collect::<Vec<_>>());
    }
}

#[test]
fn every_copy_has_its_own_generation_and_the_pages_it_was_given_ahead() {
    if no_kvm() {
        return;
    }
    let (snapshot, memory, count) = captured(1);
    let mut seen = HashSet::new();
    let mut copies = Vec::new();
    // Written and read pages, some of them not there; for a copy that is waited for, and for one that is not.
    let pages =
        PageList::new([payload::COUNTER..MEMORY / 2, MEMORY - 4096..MEMORY + (8 << 20)], [0..4096, 8192..12288]);
    for ahead in [true, false, true] {
        let copy = Guest::restore_with(&snapshot, &memory, &Ready { pages: pages.clone(), ahead });
        assert_eq!(copy.count(), count);
        let mut generation = [0; 16];
        copy.machine.read(offshoot_vmm::layout::GENERATION, &mut generation).unwrap();
        assert!(seen.insert(generation));
        copies.push(copy);
    }
    // They run as others do, each in memory of its own.
    for (copy, word) in copies.iter_mut().zip(b"xyz") {
        copy.machine.write(WORD, &[*word]).unwrap();
        copy.machine.resume();
        copy.expect(&[*word]);
    }
    let mut template = [0xff];
    memory.read_exact_at(&mut template, WORD).unwrap();
    assert_eq!(template, [0], "the template's memory is as it was");
    assert!(!seen.contains(&[0; 16]));
}

/// What a copy has for itself, as a file.
fn own_pages(memory: &std::fs::File) -> Delta {
    // This process has one mapping of it: the template's machine is gone.
    let pid = std::process::id();
    let (file, process) = (tempfile::tempfile().unwrap(), ProcessMemory::open(pid, memory, MEMORY).unwrap());
    let touched = touched_pages(pid, memory, MEMORY).unwrap();
    write_delta(&process, MEMORY, &touched.copied, memory, "template", &file, |_, _| ()).unwrap();
    Delta::open(file, MEMORY, "template").unwrap()
}

#[test]
fn copies_of_a_copy_begin_with_what_it_had_for_itself_and_it_goes_on() {
    if no_kvm() {
        return;
    }
    let (template, memory, count) = captured(2);
    let mut first = Guest::restore(&template, &memory);
    first.machine.write(WORD, b"1").unwrap();
    first.machine.resume();
    first.expect(b"1");
    first.machine.pause();
    let counted = first.count();
    assert!(counted > count);
    let snapshot = first.machine.snapshot().unwrap();
    let own = own_pages(&memory);
    let generation = |guest: &Guest| {
        let mut generation = [0; 16];
        guest.machine.read(offshoot_vmm::layout::GENERATION, &mut generation).unwrap();
        generation
    };
    first.machine.resume();
    first.say(b'+');
    first.expect(b"1+");
    first.machine.pause();
    let mut copies = [(); 2].map(|()| Guest::restore_above(&snapshot, &memory, &own));
    let seen: HashSet<_> = copies.iter().chain([&first]).map(generation).collect();
    assert_eq!(seen.len(), 3, "what a copy had for itself does not hide that another is another");
    for (copy, word) in copies.iter_mut().zip(b"xy") {
        assert_eq!(copy.count(), counted);
        copy.machine.write(WORD, &[*word]).unwrap();
        copy.machine.resume();
        copy.expect(&[*word]);
    }
    assert_eq!(Guest::restore(&snapshot, &memory).count(), count, "the check can fail");
}

/// A spare machine may wait for minutes; its guest's timers would all be due, and its watchdogs bark.
#[test]
fn no_time_passes_for_a_copy_that_waits_for_its_first_run_or_is_paused() {
    if no_kvm() {
        return;
    }
    let (template, memory, _) = captured(2);
    let counter = |snapshot: &Snapshot, vcpu: usize| {
        let msrs = &snapshot.vcpus[vcpu].msrs;
        msrs.iter().find(|msr| msr.index == 0x10).map(|msr| msr.data).unwrap()
    };
    let mut copy = Guest::restore(&template, &memory);
    let waiting = Instant::now();
    std::thread::sleep(Duration::from_secs(3));
    let waited = waiting.elapsed();
    let running = Instant::now();
    copy.machine.resume();
    copy.machine.pause();
    let state = copy.machine.snapshot().unwrap();
    let ran = running.elapsed();
    let clock = Duration::from_nanos(state.vm.clock.clock - template.vm.clock.clock);
    assert!(clock <= ran + Duration::from_millis(100), "{clock:?} passed, it ran for {ran:?}");
    // SAFETY: every processor with virtualisation has the instruction.
    let host = unsafe { std::arch::x86_64::_rdtsc() };
    // Nor while it is captured.
    let standing = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let stood = standing.elapsed();
    let running = Instant::now();
    copy.machine.resume();
    copy.machine.pause();
    let later = copy.machine.snapshot().unwrap();
    let ran_on = running.elapsed();
    let clock = Duration::from_nanos(later.vm.clock.clock - state.vm.clock.clock);
    assert!(clock <= ran_on + Duration::from_millis(100), "{clock:?} passed in {stood:?}, it ran for {ran_on:?}");
    for vcpu in 0..2 {
        // A machine's counter begins at zero, unless this KVM cannot give it one of its own.
        if host.abs_diff(counter(&state, vcpu)) < 1 << 40 {
            eprintln!("not tested: guests have the host's time stamp counter here");
            continue;
        }
        // At 1 GHz or more, which every such processor has.
        let counts = counter(&state, vcpu).abs_diff(counter(&template, vcpu));
        let bound = u64::try_from((waited + ran).as_nanos()).unwrap();
        assert!(counts < bound, "vCPU {vcpu} has counted {counts} in {ran:?} after {waited:?}");
    }
}

#[test]
fn the_end_of_a_guest_is_told_with_its_reason() {
    if no_kvm() {
        return;
    }
    for (code, exit) in [(RESET, Exit::Reset), (TRIPLE_FAULT, Exit::Shutdown)] {
        let mut guest = Guest::boot(code, 2, &memory());
        guest.machine.resume();
        assert_eq!(guest.machine.wait(LIMIT), Some(exit));
        let mut events = [rustix::event::PollFd::from_borrowed_fd(guest.machine.as_fd(), rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut events, None).unwrap(), 1);
        // It can still be stopped and looked at.
        guest.machine.pause();
        guest.machine.read(ENTRY, &mut [0]).unwrap();
    }
}

#[test]
fn where_no_device_is_all_bits_are_set() {
    if no_kvm() {
        return;
    }
    let mut guest = Guest::boot(READ_NOWHERE, 1, &memory());
    guest.machine.resume();
    guest.expect(&[0xff]);
}

#[test]
fn memory_and_state_are_only_there_while_nothing_changes_them() {
    if no_kvm() {
        return;
    }
    let mut guest = Guest::boot(COUNT_AND_SAY, 1, &memory());
    guest.machine.resume();
    assert!(matches!(guest.machine.write(WORD, b"x"), Err(MachineError::Running)));
    assert!(matches!(guest.machine.read(WORD, &mut [0]), Err(MachineError::Running)));
    assert!(matches!(guest.machine.snapshot(), Err(MachineError::Running)));
    guest.machine.pause();
    for (offset, bytes) in [(MEMORY - 1, 2), (MEMORY, 1), (u64::MAX, 8)] {
        assert!(matches!(guest.machine.write(offset, &vec![1; bytes]), Err(MachineError::Place { .. })));
    }
    guest.machine.write(MEMORY - 1, &[1]).unwrap();
}

#[test]
fn a_card_that_was_captured_loose_is_connected_in_a_copy() {
    if no_kvm() {
        return;
    }
    let memory = memory();
    let mut template = Guest::boot_with(COUNT_AND_SAY, 1, &memory, Some(Cable::Loose));
    let snapshot = template.machine.snapshot().unwrap();
    assert!(snapshot.devices.contains_key("network"));
    let console = tempfile::tempfile().unwrap();
    let (ours, other) = std::os::unix::net::UnixStream::pair().unwrap();
    for cable in [Cable::Loose, Cable::Stream(ours.into())] {
        let files = DeviceFiles { network: Some(cable), ..files(&console) };
        Machine::restore(&snapshot, &memory, files).unwrap().resume();
    }
    // Nobody has sent anything, and the copy is gone.
    assert_eq!((&other).read(&mut [0; 100]).unwrap(), 0);
    let without = Machine::restore(&snapshot, &memory, files(&console)).map(drop);
    assert!(matches!(without, Err(MachineError::OtherDevices(name)) if name == "network"));
}

#[test]
fn a_state_with_other_devices_or_another_size_is_refused() {
    if no_kvm() {
        return;
    }
    let (snapshot, memory, _) = captured(1);
    let console = tempfile::tempfile().unwrap();
    let restore = |snapshot: &Snapshot| Machine::restore(snapshot, &memory, files(&console)).map(drop);
    for name in snapshot.devices.keys() {
        let mut without = snapshot.clone();
        without.devices.remove(name);
        assert!(matches!(restore(&without), Err(MachineError::OtherDevices(missing)) if missing == *name));
        let mut damaged = snapshot.clone();
        damaged.devices.insert(name.clone(), vec![0x77; 3]);
        assert!(restore(&damaged).is_err(), "{name}");
    }
    let mut with_network = files(&console);
    with_network.network = Some(Cable::Loose);
    let refused = Machine::restore(&snapshot, &memory, with_network).map(drop);
    assert!(matches!(refused, Err(MachineError::OtherDevices(name)) if name == "network"));
    let mut more = snapshot.clone();
    more.devices.insert("floppy".into(), Vec::new());
    assert!(matches!(restore(&more), Err(MachineError::OtherDevices(name)) if name == "floppy"));
    memory.set_len(MEMORY - 4096).unwrap();
    assert!(matches!(restore(&snapshot), Err(MachineError::Memory(_))));
    assert_eq!(memory.metadata().unwrap().size(), MEMORY - 4096);
}
