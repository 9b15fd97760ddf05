//! The state file: what is written is read again, and whatever else is read is refused, without a panic and without more memory than
//! the file itself takes. Needs no `/dev/kvm`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
};

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_lapic_state, kvm_msr_entry, kvm_pit_state2, kvm_regs,
};
use offshoot_vmm::{
    config::MachineConfig,
    kvm::state::{Capabilities, SpecialRegisters, Support, VcpuState, VmState},
    snapshot::{HostCpu, HostError, MAX_BYTES, MAX_DEVICE_BYTES, MAX_DEVICES, Snapshot, SnapshotError, VERSION},
};
use proptest::{collection::btree_map, prelude::*, sample::Index};

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread has allocated.
struct Counting;

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = NOW.try_with(|now| {
            now.set(now.get().wrapping_add(layout.size()));
            MOST.with(|most| most.set(most.get().max(now.get())));
        });
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let _ = NOW.try_with(|now| now.set(now.get().saturating_sub(layout.size())));
        // SAFETY: the caller's pointer, which came from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Decodes, and holds the decoder to its bound: the file's length, and a little for
/// vCPUs that are promised and do not come, and for nodes of a map.
fn decode(file: &[u8]) -> Result<Snapshot, SnapshotError> {
    NOW.set(0);
    MOST.set(0);
    let result = Snapshot::decode(file);
    let bound = file.len() + 32_768;
    assert!(MOST.get() <= bound, "{} bytes allocated for a file of {}", MOST.get(), file.len());
    result
}

fn vcpu(seed: u64) -> VcpuState {
    let byte = seed.to_le_bytes()[0];
    VcpuState {
        cpuid: (0..seed as u32 % 40)
            .map(|function| kvm_cpuid_entry2 { function, eax: !function, ..Default::default() })
            .collect(),
        tsc_khz: seed as u32,
        mp_state: Default::default(),
        regs: kvm_regs { rip: seed, rax: !seed, ..Default::default() },
        sregs: SpecialRegisters { efer: seed, ..Default::default() },
        xsave: vec![byte; 4096 + 64 * usize::from(byte)],
        xcrs: Default::default(),
        debug: Default::default(),
        lapic: kvm_lapic_state { regs: [byte.cast_signed(); 1024] },
        msrs: (0..seed as u32 % 100).map(|index| kvm_msr_entry { index, data: seed, ..Default::default() }).collect(),
        events: Default::default(),
    }
}

fn host() -> HostCpu {
    HostCpu {
        vendor: *b"GenuineIntel",
        signature: 0x000c_06f2,
        capabilities: Capabilities::default(),
        xsave_bytes: 4096,
        features: vec![kvm_cpuid_entry2 { function: 1, ecx: 0x201, edx: 0xff, ..Default::default() }],
    }
}

fn snapshot(seeds: &[u64], devices: BTreeMap<String, Vec<u8>>) -> Snapshot {
    let irqchips = [0, 1, 2].map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    Snapshot {
        machine: MachineConfig { memory_bytes: 256 << 20, vcpus: seeds.len() as u8 },
        host: host(),
        vm: VmState {
            irqchips,
            pit: kvm_pit_state2::default(),
            clock: kvm_clock_data { clock: 7, ..Default::default() },
        },
        vcpus: seeds.iter().copied().map(vcpu).collect(),
        devices,
    }
}

fn snapshots() -> impl Strategy<Value = Snapshot> {
    let devices = btree_map("[a-z0-9.]{1,20}", prop::collection::vec(any::<u8>(), 0..300), 0..6);
    (prop::collection::vec(any::<u64>(), 1..=8), devices).prop_map(|(seeds, devices)| snapshot(&seeds, devices))
}

/// Makes the checksum right, so that what is behind it is reached.
fn sealed(mut file: Vec<u8>) -> Vec<u8> {
    if let Some(payload) = file.len().checked_sub(24) {
        file[16..24].copy_from_slice(&(payload as u64).to_le_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&file[..12]);
        sum.update(&file[16..]);
        file[12..16].copy_from_slice(&sum.finalize().to_le_bytes());
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn what_is_written_is_read_again(snapshot in snapshots()) {
        let file = snapshot.encode().unwrap();
        let read = decode(&file).unwrap();
        prop_assert_eq!(format!("{read:?}"), format!("{snapshot:?}"));
        prop_assert!(read.encode().unwrap() == file);
    }

    #[test]
    fn a_file_with_one_changed_bit_is_refused(snapshot in snapshots(), at in any::<Index>(), bit in 0..8) {
        let mut file = snapshot.encode().unwrap();
        let at = at.index(file.len());
        file[at] ^= 1_u8 << bit;
        prop_assert!(decode(&file).is_err());
    }

    #[test]
    fn a_file_that_was_cut_is_refused(snapshot in snapshots(), at in any::<Index>()) {
        let file = snapshot.encode().unwrap();
        let at = at.index(file.len());
        prop_assert!(decode(&file[..at]).is_err());
        prop_assert!(decode(&sealed(file[..at].to_vec())).is_err(), "also with a right checksum");
    }

    #[test]
    fn hostile_content_with_a_right_checksum_is_refused_or_can_be_written_again(
        snapshot in snapshots(),
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..20),
    ) {
        let mut file = snapshot.encode().unwrap();
        for (at, byte) in changes {
            let at = 24 + at.index(file.len() - 24);
            file[at] = byte;
        }
        let file = sealed(file);
        if let Ok(read) = decode(&file) {
            let again = decode(&read.encode().unwrap()).unwrap();
            prop_assert_eq!(format!("{read:?}"), format!("{again:?}"));
        }
    }

    #[test]
    fn random_bytes_are_refused(payload in prop::collection::vec(any::<u8>(), 0..4000), whole in any::<bool>()) {
        let file = if whole { payload } else { [&b"offs-vm\n\x01\0\0\0"[..], &[0; 12], &payload].concat() };
        prop_assert!(decode(&sealed(file)).is_err());
    }
}

/// The fuzz target's work for a few seconds: small files changed in many ways.
#[test]
fn three_seconds_of_changes_do_no_harm() {
    let seed = snapshot(&[1, 2], BTreeMap::from([("disk".to_owned(), vec![1, 2, 3])])).encode().unwrap();
    let (mut random, end) = (0x9e37_79b9_7f4a_7c15_u64, std::time::Instant::now() + std::time::Duration::from_secs(3));
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    while std::time::Instant::now() < end {
        let mut file = seed.clone();
        for _ in 0..=next() % 4 {
            // Mostly near the fronts of fields: the first bytes, where the lengths are.
            let range = if next() % 2 == 0 { 120 } else { file.len() as u64 };
            let at = (next() % range) as usize;
            file[at] = next() as u8;
        }
        file.truncate(if next() % 8 == 0 { (next() % seed.len() as u64) as usize } else { file.len() });
        let _ = decode(&file);
        let _ = decode(&sealed(file));
    }
}

#[test]
fn lengths_that_lie_allocate_nothing() {
    // A machine, a host, and then a number of vCPUs that the file does not have.
    let file = snapshot(&[1], BTreeMap::new()).encode().unwrap();
    for at in 24..file.len().min(24 + 2200) {
        for lie in [[0xff, 0xff, 0xff, 0x0f], [0x80, 0x80, 0x80, 0x08]] {
            let mut file = file.clone();
            file.splice(at..=at, lie);
            let _ = decode(&sealed(file));
        }
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let good = snapshot(&[1], BTreeMap::new());
    let file = good.encode().unwrap();
    assert_eq!(decode(b"").err(), Some(SnapshotError::NotAState));
    assert_eq!(decode(b"\x7fELF").err(), Some(SnapshotError::NotAState));
    assert_eq!(decode(&file[..10]).err(), Some(SnapshotError::Length { found: 10, said: 24 }));
    let length = file.len() as u64;
    assert_eq!(decode(&file[..file.len() - 1]).err(), Some(SnapshotError::Length { found: length - 1, said: length }));
    let mut newer = file.clone();
    newer[8] = 2;
    assert_eq!(
        decode(&newer).err(),
        Some(SnapshotError::NewerFormat { found: 2, known: VERSION }),
        "before the checksum"
    );
    let mut damaged = file.clone();
    damaged[500] ^= 1;
    assert_eq!(decode(&damaged).err(), Some(SnapshotError::Checksum));
    let mut longer = file;
    longer.resize(MAX_BYTES + 1, 0);
    assert!(matches!(decode(&longer), Err(SnapshotError::TooLarge { .. })));

    let wrong = [
        Snapshot { machine: MachineConfig { vcpus: 2, ..good.machine }, ..good.clone() },
        Snapshot { machine: MachineConfig { memory_bytes: 5, ..good.machine }, ..good.clone() },
        snapshot(&[], BTreeMap::new()),
        snapshot(&[1; 9], BTreeMap::new()),
        snapshot(&[1], (0..=MAX_DEVICES).map(|number| (format!("{number}"), Vec::new())).collect()),
        snapshot(&[1], BTreeMap::from([("big".to_owned(), vec![0; MAX_DEVICE_BYTES + 1])])),
        snapshot(&[1], BTreeMap::from([("n".repeat(65), Vec::new())])),
    ];
    for (index, wrong) in wrong.into_iter().enumerate() {
        assert!(wrong.encode().is_err(), "{index}");
    }
}

#[test]
fn another_host_is_refused_with_the_reason() {
    let support = Support { capabilities: Capabilities::default(), xsave_bytes: 65_536, msrs: (0..100).collect() };
    let mut good = snapshot(&[3], BTreeMap::new());
    good.vcpus[0].cpuid = vec![kvm_cpuid_entry2 { function: 1, ecx: 0x8000_0201, edx: 0xff, ..Default::default() }];
    assert_eq!(good.check_host(&host(), &support), Ok(()));

    let amd = HostCpu { vendor: *b"AuthenticAMD", ..host() };
    assert!(matches!(good.check_host(&amd, &support), Err(HostError::Vendor { host, .. }) if host == "AuthenticAMD"));
    let older = HostCpu { signature: 0x0008_06f8, ..host() };
    assert_eq!(
        good.check_host(&older, &support),
        Err(HostError::Model { state: "6/207".to_owned(), host: "6/143".to_owned() })
    );
    let stepping = HostCpu { signature: 0x000c_06f3, ..host() };
    assert_eq!(good.check_host(&stepping, &support), Ok(()), "another stepping is no other model");
    let mut fewer = host();
    fewer.features[0].ecx = 1;
    let missing = HostError::Features { function: 1, index: 0, register: "ecx", missing: 0x200 };
    assert_eq!(good.check_host(&fewer, &support), Err(missing));
    let small = Support { xsave_bytes: 4096, ..support.clone() };
    assert_eq!(good.check_host(&host(), &small), Err(HostError::Xsave { state: 4096 + 192, host: 4096 }));
    let msrs = Support { msrs: vec![0, 1], ..support.clone() };
    assert_eq!(good.check_host(&host(), &msrs), Err(HostError::Msr(2)));
    let mut deadline = good.clone();
    deadline.host.capabilities.tsc_deadline = true;
    let lacks = HostError::Capability("KVM_CAP_TSC_DEADLINE_TIMER");
    assert_eq!(deadline.check_host(&host(), &support), Err(lacks));
    good.vcpus[0].sregs.flags = 1;
    assert_eq!(good.check_host(&host(), &support), Err(HostError::Capability("KVM_CAP_SREGS2")));

    let machine = MachineConfig { memory_bytes: 512 << 20, vcpus: 1 };
    assert!(matches!(good.check_machine(&machine), Err(HostError::Memory { .. })));
    assert_eq!(
        good.check_machine(&MachineConfig { vcpus: 2, ..good.machine }),
        Err(HostError::Vcpus { state: 1, given: 2 })
    );
    assert_eq!(good.check_machine(&good.machine), Ok(()));
}
