//! The floor of a fork: from nothing, or from a machine started ahead, to the first exit of the guest; directly on `/dev/kvm` with a
//! guest of five instructions. `bench/vmm` runs it.
//!
//! ```text
//! fork_floor [FORKS] [ALIVE AT ONCE] [MIB]      1000, 200, 256
//! ```
#![allow(clippy::cast_precision_loss)]

use std::{
    collections::{BTreeMap, VecDeque},
    error::Error,
    fs::File,
    time::{Duration, Instant},
};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_enable_cap, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use offshoot_vmm::{
    config::MachineConfig,
    kvm::state::{Support, VcpuState, VmState, settle},
    memory::{self, GuestMemory, Sharing},
    snapshot::{HostCpu, Snapshot},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Real mode: mov al, [0x3000]; out 0x10, al; mov al, [0x3000]; out 0x11, al; hlt
const CODE: [u8; 11] = [0xa0, 0x00, 0x30, 0xe6, 0x10, 0xa0, 0x00, 0x30, 0xe6, 0x11, 0xf4];
const CODE_AT: u64 = 0x1_0000;

/// When the memory slot is made, and which interrupt controllers there are.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    SlotFirst,
    IrqchipFirst,
    SplitIrqchip,
}

/// Where a fork's memory comes from.
#[derive(Clone, Copy, PartialEq)]
enum Memory {
    CopyOnWrite,
    Anonymous,
}

/// A machine, dropped before its memory.
struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: GuestMemory,
}

/// How long each step took, by name, in the order of their first appearance.
#[derive(Default)]
struct Steps(Vec<(&'static str, Vec<Duration>)>);

impl Steps {
    fn time<T>(&mut self, name: &'static str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = step();
        self.add(name, start.elapsed());
        result
    }

    fn add(&mut self, name: &'static str, took: Duration) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, times)) => times.push(took),
            None => self.0.push((name, vec![took])),
        }
    }

    fn row(&mut self, name: &str) -> String {
        let Some((_, times)) = self.0.iter_mut().find(|(known, _)| *known == name) else { return String::new() };
        times.sort_unstable();
        let at = |percent: usize| micros(times[(times.len() - 1) * percent / 100]);
        format!("{:>8.1} | {:>8.1} | {:>8.1}", at(50), at(99), at(100))
    }

    fn print(&mut self, title: &str) {
        println!("\n### {title}\n\n| step | p50 µs | p99 µs | most µs |\n|---|---:|---:|---:|");
        let names: Vec<&str> = self.0.iter().map(|(name, _)| *name).collect();
        for name in names {
            println!("| {name} | {} |", self.row(name));
        }
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1000.0
}

/// What all forks have in common.
struct Template {
    kvm: Kvm,
    support: Support,
    snapshot: Snapshot,
    file: File,
    bytes: u64,
}

fn slot(vm: &VmFd, memory: &GuestMemory) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory::size(memory),
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
    };
    // SAFETY: the memory outlives the machine: both are in `Guest`, the machine before it.
    unsafe { vm.set_user_memory_region(region) }?;
    Ok(())
}

fn irqchip(vm: &VmFd, order: Order) -> Result<()> {
    if order != Order::SplitIrqchip {
        return Ok(vm.create_irq_chip()?);
    }
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = 24;
    Ok(vm.enable_cap(&split)?)
}

/// A machine without state. The sum of its steps is what a pool of started machines saves.
fn machine(kvm: &Kvm, memory: GuestMemory, order: Order, steps: &mut Steps) -> Result<Guest> {
    let vm = steps.time("KVM_CREATE_VM", || kvm.create_vm())?;
    steps.time("KVM_SET_TSS_ADDR", || vm.set_tss_address(0xfffb_d000))?;
    if order == Order::IrqchipFirst {
        steps.time("KVM_CREATE_IRQCHIP", || irqchip(&vm, order))?;
    }
    steps.time("KVM_SET_USER_MEMORY_REGION", || slot(&vm, &memory))?;
    if order != Order::IrqchipFirst {
        steps.time("KVM_CREATE_IRQCHIP", || irqchip(&vm, order))?;
    }
    if order != Order::SplitIrqchip {
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        steps.time("KVM_CREATE_PIT2", || vm.create_pit2(pit))?;
    }
    let vcpu = steps.time("KVM_CREATE_VCPU and mmap", || vm.create_vcpu(0))?;
    Ok(Guest { vcpu, vm, memory })
}

fn run(vcpu: &mut VcpuFd) -> Result<u8> {
    match vcpu.run()? {
        VcpuExit::IoOut(_, data) => Ok(data[0]),
        other => Err(format!("the guest stopped with {other:?}").into()),
    }
}

/// Boots the guest, lets it run to its first exit, captures it.
fn template(bytes: u64) -> Result<Template> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    let support = Support::probe(&kvm)?;
    let file: File = rustix::fs::memfd_create("template", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    file.set_len(bytes)?;
    let memory = memory::map(&file, bytes, Sharing::Shared)?;
    memory.write_slice(&CODE, GuestAddress(CODE_AT))?;
    let mut guest = machine(&kvm, memory, Order::SlotFirst, &mut Steps::default())?;
    guest.vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = guest.vcpu.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        (segment.base, segment.selector) = (CODE_AT, 0x1000);
    }
    guest.vcpu.set_sregs(&sregs)?;
    let mut regs = guest.vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0, 2);
    guest.vcpu.set_regs(&regs)?;
    run(&mut guest.vcpu)?;
    settle(&mut guest.vcpu)?;
    let vcpus = vec![VcpuState::save(&guest.vcpu, &support)?];
    let vm = VmState::save(&guest.vm)?;
    let (machine, host) = (MachineConfig { memory_bytes: bytes, vcpus: 1 }, HostCpu::probe(&kvm, &support)?);
    let encoded = Snapshot { machine, host, vm, vcpus, devices: BTreeMap::new() }.encode()?;
    println!("\nstate file: {} bytes, {} model specific registers", encoded.len(), {
        let snapshot = Snapshot::decode(&encoded)?;
        snapshot.vcpus[0].msrs.len()
    });
    Ok(Template { kvm, support, snapshot: Snapshot::decode(&encoded)?, file, bytes })
}

fn map(template: &Template, memory: Memory) -> Result<GuestMemory> {
    if memory == Memory::CopyOnWrite {
        return Ok(memory::map(&template.file, template.bytes, Sharing::Private)?);
    }
    let ranges = [(GuestAddress(0), usize::try_from(template.bytes)?)];
    let memory = GuestMemory::from_ranges(&ranges)?;
    memory.write_slice(&CODE, GuestAddress(CODE_AT))?;
    Ok(memory)
}

/// How much of a fork is done before it is asked for.
#[derive(Clone, Copy, PartialEq)]
enum Ahead {
    Nothing,
    /// A machine with an empty memory slot, of any template.
    Started,
    /// The template is known: its memory is mapped, the vCPUs know their CPUID.
    Prepared,
    /// All of its state is loaded as well.
    Loaded,
}

/// `forks` forks in groups of `alive`, which live until the last of them has run.
fn measure(
    template: &Template,
    (forks, alive): (usize, usize),
    order: Order,
    memory: Memory,
    ahead: Ahead,
) -> Result<Steps> {
    let mut steps = Steps::default();
    let (vcpu_state, support) = (&template.snapshot.vcpus[0], &template.support);
    for group in 0..forks.div_ceil(alive) {
        let mut unseen = Steps::default();
        let mut waiting = Vec::new();
        for _ in 0..if ahead == Ahead::Nothing { 0 } else { alive } {
            let memory =
                if ahead == Ahead::Started { memory::reserve(template.bytes)? } else { map(template, memory)? };
            let guest = machine(&template.kvm, memory, order, &mut unseen)?;
            match ahead {
                Ahead::Nothing | Ahead::Started => (),
                Ahead::Prepared => vcpu_state.prepare(&guest.vcpu, support)?,
                Ahead::Loaded => {
                    vcpu_state.load(&guest.vcpu, support)?;
                    template.snapshot.vm.load(&guest.vm)?;
                }
            }
            waiting.push(guest);
        }
        let mut living = VecDeque::with_capacity(alive);
        for fork in 0..alive.min(forks - group * alive) {
            let identity = u8::try_from(fork % 251)? + 1;
            let start = Instant::now();
            let mut guest = match waiting.pop() {
                Some(guest) => guest,
                None => {
                    let memory = steps.time("memory mapped", || map(template, memory))?;
                    machine(&template.kvm, memory, order, &mut steps)?
                }
            };
            if ahead == Ahead::Started {
                steps.time("memory mapped", || memory::fill(&guest.memory, &template.file, Sharing::Private))?;
            }
            match ahead {
                Ahead::Nothing | Ahead::Started => {
                    steps.time("state of the vCPU", || vcpu_state.load(&guest.vcpu, support))?
                }
                Ahead::Prepared => {
                    steps.time("state of the vCPU", || vcpu_state.load_prepared(&guest.vcpu, support))?
                }
                Ahead::Loaded => (),
            }
            if ahead != Ahead::Loaded && order != Order::SplitIrqchip {
                steps.time("state of the machine", || template.snapshot.vm.load(&guest.vm))?;
            }
            steps.time("identity into its memory", || {
                guest.memory.write_obj(identity, GuestAddress(CODE_AT + 0x3000))
            })?;
            let seen = steps.time("KVM_RUN to the first exit", || run(&mut guest.vcpu))?;
            steps.add("**fork to first exit**", start.elapsed());
            if seen != identity {
                return Err(format!("the guest read {seen} and its identity is {identity}").into());
            }
            living.push_back(guest);
        }
        for guest in living.drain(..) {
            steps.time("(its end)", || drop(guest));
        }
    }
    Ok(steps)
}

/// The state of the vCPU and of the machine, call by call.
fn measure_calls(template: &Template, machines: usize) -> Result<Steps> {
    let mut steps = Steps::default();
    let (state, shared) = (&template.snapshot.vcpus[0], &template.snapshot.vm);
    let cpuid = CpuId::from_entries(&state.cpuid)?;
    let mut sregs = None;
    for _ in 0..machines {
        let guest =
            machine(&template.kvm, map(template, Memory::CopyOnWrite)?, Order::SlotFirst, &mut Steps::default())?;
        let vcpu = &guest.vcpu;
        state.load(vcpu, &template.support)?;
        let sregs = *sregs.get_or_insert(vcpu.get_sregs()?);
        let xsave = vcpu.get_xsave()?;
        let fresh =
            machine(&template.kvm, map(template, Memory::CopyOnWrite)?, Order::SlotFirst, &mut Steps::default())?;
        let vcpu = &fresh.vcpu;
        steps.time("KVM_SET_CPUID2", || vcpu.set_cpuid2(&cpuid))?;
        steps.time("KVM_GET_TSC_KHZ", || vcpu.get_tsc_khz())?;
        steps.time("KVM_SET_SREGS", || vcpu.set_sregs(&sregs))?;
        steps.time("KVM_SET_REGS", || vcpu.set_regs(&state.regs))?;
        // SAFETY: the area comes from KVM_GET_XSAVE, which fails where KVM_SET_XSAVE would read more than its 4096 bytes.
        steps.time("KVM_SET_XSAVE", || unsafe { vcpu.set_xsave(&xsave) })?;
        steps.time("KVM_SET_XCRS", || vcpu.set_xcrs(&state.xcrs))?;
        steps.time("KVM_SET_DEBUGREGS", || vcpu.set_debug_regs(&state.debug))?;
        steps.time("KVM_SET_LAPIC", || vcpu.set_lapic(&state.lapic))?;
        let msrs = Msrs::from_entries(&state.msrs)?;
        steps.time("KVM_SET_MSRS, all", || vcpu.set_msrs(&msrs))?;
        steps.time("KVM_SET_MP_STATE", || vcpu.set_mp_state(state.mp_state))?;
        steps.time("KVM_SET_VCPU_EVENTS", || vcpu.set_vcpu_events(&state.events))?;
        let _ = steps.time("KVM_KVMCLOCK_CTRL", || vcpu.kvmclock_ctrl());
        for (chip, name) in shared.irqchips.iter().zip(["first PIC", "second PIC", "IOAPIC"]) {
            steps.time(name, || fresh.vm.set_irqchip(chip))?;
        }
        steps.time("KVM_SET_PIT2", || fresh.vm.set_pit2(&shared.pit))?;
        let clock = kvm_bindings::kvm_clock_data { clock: shared.clock.clock, ..Default::default() };
        steps.time("KVM_SET_CLOCK", || fresh.vm.set_clock(&clock))?;
    }
    Ok(steps)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let forks = arguments.next().transpose()?.unwrap_or(1000);
    let alive = arguments.next().transpose()?.unwrap_or(200);
    let mebibytes = arguments.next().transpose()?.unwrap_or(256);
    println!("{forks} forks, {alive} alive at once, {mebibytes} MiB of guest memory each");
    let template = template((mebibytes as u64) << 20)?;
    let (many, few) = ((forks, alive), (forks.div_ceil(10), alive.min(forks.div_ceil(10))));
    let print = |title, count, order, memory, ahead| -> Result<()> {
        measure(&template, count, order, memory, ahead)?.print(title);
        Ok(())
    };
    let (cow, slot) = (Memory::CopyOnWrite, Order::SlotFirst);
    print("From nothing: copy-on-write memory, memory slot before the irqchip", many, slot, cow, Ahead::Nothing)?;
    print("From nothing: anonymous memory", many, slot, Memory::Anonymous, Ahead::Nothing)?;
    print("From a machine started ahead, of any template", many, slot, cow, Ahead::Started)?;
    print("From a machine prepared for this template", many, slot, cow, Ahead::Prepared)?;
    print("From a machine loaded with this template's state", many, slot, cow, Ahead::Loaded)?;
    print("From nothing: split irqchip", few, Order::SplitIrqchip, cow, Ahead::Nothing)?;
    print(
        "From nothing: irqchip before the memory slot, the order not to use",
        few,
        Order::IrqchipFirst,
        cow,
        Ahead::Nothing,
    )?;
    measure_calls(&template, few.0)?.print("The state, call by call");
    let mut decoding = Steps::default();
    let file = template.snapshot.encode()?;
    for _ in 0..forks {
        decoding.time("state file decoded", || Snapshot::decode(&file))?;
    }
    decoding.print("The state file");
    Ok(())
}
