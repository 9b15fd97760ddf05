//! A machine with 2 MiB of memory and one piece of code, and a way to make others of its snapshot.

use std::{collections::BTreeMap, fs::File};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use offshoot_vmm::{
    config::MachineConfig,
    kvm::state::{Support, VcpuState, VmState, settle},
    memory::{GuestMemory, Sharing, map},
    snapshot::{HostCpu, Snapshot},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Guest memory in bytes.
pub const MEMORY: u64 = 2 << 20;
/// Where guests start.
pub const CODE: u64 = 0x1_0000;
/// Where guests write what they find.
pub const RESULTS: u64 = 0x2_0000;
/// Guests write to it when they are ready to be captured.
pub const READY: u16 = 0x10;
/// Guests write to it when they found what they should.
pub const DONE: u16 = 0x11;

const TABLES: u64 = 0x1000;
const GDT: u64 = 0x7000;
const IDT: u64 = 0x8000;
const STACK: u64 = 0xa000;

/// The bytes between two labels of a `global_asm!`.
macro_rules! code {
    ($start:ident, $end:ident) => {{
        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }
        let (start, end) = (&raw const $start, &raw const $end);
        // SAFETY: both labels stand in one section of this program, in this order, with the guest's code between them.
        unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
    }};
}

/// `/dev/kvm`; `None` if whoever runs the tests said to do without.
pub fn kvm() -> Option<Kvm> {
    if std::env::var_os("OFFSHOOT_TEST_NO_KVM").is_some_and(|value| value == "1") {
        eprintln!("not run: OFFSHOOT_TEST_NO_KVM=1");
        return None;
    }
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => panic!(
            "/dev/kvm cannot be opened ({error}), and these tests run guests on it. Load the kvm module or give this user access; \
             or set OFFSHOOT_TEST_NO_KVM=1 to do without them"
        ),
    }
}

/// A machine with one vCPU.
pub struct Guest {
    // Before the memory: the machine refers to it.
    pub vcpu: VcpuFd,
    pub vm: VmFd,
    pub memory: GuestMemory,
    pub support: Support,
    pub host: HostCpu,
}

impl Guest {
    /// A machine with everything but register values.
    fn empty(kvm: &Kvm, file: &File, sharing: Sharing) -> Self {
        let support = Support::probe(kvm).unwrap();
        let host = HostCpu::probe(kvm, &support).unwrap();
        let memory = map(file, MEMORY, sharing).unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: memory.iter().next().unwrap().as_ptr() as u64,
        };
        // SAFETY: the memory is mapped for as long as the machine lives: both are in this struct, the machine before it.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Self { vcpu, vm, memory, support, host }
    }

    /// A template: its memory is the file. `handlers` are vectors and offsets in the code.
    pub fn template(kvm: &Kvm, file: &File, code: &[u8], handlers: &[(u8, usize)]) -> Self {
        file.set_len(MEMORY).unwrap();
        let guest = Self::empty(kvm, file, Sharing::Shared);
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
            entry.ecx |= 1 << 24; // TSC deadline timer: given by the monitor, not listed by KVM
        }
        guest.vcpu.set_cpuid2(&cpuid).unwrap();
        guest.memory.write_slice(code, GuestAddress(CODE)).unwrap();
        for (vector, offset) in handlers {
            guest.set_handler(*vector, CODE + *offset as u64);
        }
        guest
    }

    /// Long mode, 4 GiB mapped one to one, interrupts off.
    pub fn enter_64_bit(&self) {
        let entry = |index: u64, value: u64| self.memory.write_obj(value, GuestAddress(TABLES + index * 8)).unwrap();
        entry(0, (TABLES + 0x1000) | 7);
        for gigabyte in 0..4 {
            entry(512 + gigabyte, (TABLES + 0x2000 + gigabyte * 0x1000) | 7);
            for part in 0..512 {
                entry(1024 + gigabyte * 512 + part, (gigabyte << 30) | (part << 21) | 0x87);
            }
        }
        for (index, descriptor) in [0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
            self.memory.write_obj(descriptor, GuestAddress(GDT + index as u64 * 8)).unwrap();
        }
        let mut sregs = self.vcpu.get_sregs().unwrap();
        let segment = |selector, type_, l| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            l,
            db: 1 - l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(8, 11, 1);
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *data = segment(16, 3, 0);
        }
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        sregs.cr3 = TABLES;
        sregs.cr0 = 0x8000_0033; // paging, numeric errors, extension type, monitor coprocessor, protection
        sregs.cr4 = (1 << 5) | (1 << 9) | (1 << 10) | (1 << 18); // PAE, SSE, SSE exceptions, XSAVE
        sregs.efer = 0x500;
        self.vcpu.set_sregs(&sregs).unwrap();
        self.enter_at(CODE);
    }

    /// Real mode, code at segment 0.
    pub fn enter_16_bit(&self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.selector) = (CODE, (CODE >> 4).try_into().unwrap());
        }
        self.vcpu.set_sregs(&sregs).unwrap();
        self.enter_at(0);
    }

    fn enter_at(&self, rip: u64) {
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (rip, STACK, 2);
        self.vcpu.set_regs(&regs).unwrap();
    }

    fn set_handler(&self, vector: u8, address: u64) {
        let low = (address & 0xffff) | (8 << 16) | (0x8e00 << 32) | ((address >> 16 & 0xffff) << 48);
        let gate = GuestAddress(IDT + u64::from(vector) * 16);
        self.memory.write_obj([low, address >> 32], gate).unwrap();
    }

    /// Runs to the next write to a port. Everything else is a failure of the guest.
    pub fn run(&mut self) -> u16 {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) => return port,
                Err(error) if error.errno() == libc::EINTR => (),
                other => {
                    let exit = format!("{other:?}");
                    panic!("the guest stopped with {exit} at {:#x?}", self.vcpu.get_regs().unwrap());
                }
            }
        }
    }

    /// Captures the machine, through the file's form and back.
    pub fn capture(&mut self) -> Snapshot {
        settle(&mut self.vcpu).unwrap();
        let vcpus = vec![VcpuState::save(&self.vcpu, &self.support).unwrap()];
        let vm = VmState::save(&self.vm).unwrap();
        let machine = MachineConfig { memory_bytes: MEMORY, vcpus: 1 };
        let devices = BTreeMap::from([("none".to_owned(), Vec::new())]);
        let file = Snapshot { machine, host: self.host.clone(), vm, vcpus, devices }.encode().unwrap();
        Snapshot::decode(&file).unwrap()
    }

    /// A fork: its memory is private.
    pub fn fork(kvm: &Kvm, file: &File, snapshot: &Snapshot) -> Self {
        let guest = Self::empty(kvm, file, Sharing::Private);
        snapshot.check_host(&guest.host, &guest.support).unwrap();
        snapshot.vcpus[0].load(&guest.vcpu, &guest.support).unwrap();
        snapshot.vm.load(&guest.vm).unwrap();
        guest
    }

    /// A word the guest wrote.
    pub fn result(&self, index: u64) -> u64 {
        self.memory.read_obj(GuestAddress(RESULTS + index * 8)).unwrap()
    }

    /// All of its memory.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}
