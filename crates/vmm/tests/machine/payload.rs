//! Guests of a few instructions, packed as 64-bit ELF kernels.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use offshoot_vmm::{
    config::MachineConfig,
    machine::{DeviceFiles, Machine, Ready},
    virtio::Cable,
};

/// Where the payload is loaded and begins.
pub const ENTRY: u64 = 0x10_0000;
/// Where it counts (eight bytes).
pub const COUNTER: u64 = 0x20_0000;
/// Where it looks for a byte to say.
pub const WORD: u64 = 0x20_1000;
pub const MEMORY: u64 = 4 << 20;

/// Says `A`, then for ever counts, and says the byte at [`WORD`] once it is not zero (and zeroes it).
pub const COUNT_AND_SAY: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'A', 0xee, // mov al, 'A'; out dx, al
    0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, // 7: inc qword [COUNTER]
    0x8a, 0x04, 0x25, 0x00, 0x10, 0x20, 0x00, // mov al, [WORD]
    0x84, 0xc0, 0x74, 0xed, // test al, al; jz 7
    0xee, // out dx, al
    0xc6, 0x04, 0x25, 0x00, 0x10, 0x20, 0x00, 0x00, // mov byte [WORD], 0
    0xeb, 0xe2, // jmp 7
];

/// Asks the keyboard controller for a reset, and stops.
pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xfa, 0xf4];

/// An invalid instruction, without anybody to handle it.
pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];

/// Reads a device register where no device is, says its lowest byte, stops.
pub const READ_NOWHERE: &[u8] = &[
    0x8b, 0x04, 0x25, 0x00, 0x00, 0x00, 0x3f, // mov eax, [0x3f000000]
    0x66, 0xba, 0xf8, 0x03, 0xee, // mov dx, 0x3f8; out dx, al
    0xfa, 0xf4, // cli; hlt
];

/// A machine with what its devices write.
#[derive(Debug)]
pub struct Guest {
    pub machine: Machine,
    console: File,
}

/// The root image, and what else every machine needs.
pub fn files(console: &File) -> DeviceFiles {
    let root_image = tempfile::tempfile().unwrap();
    root_image.set_len(4096).unwrap();
    DeviceFiles {
        kvm: None,
        root_image,
        ack: File::options().write(true).open("/dev/null").unwrap().into(),
        channels: Vec::new(),
        console: Some(console.try_clone().unwrap()),
        network: None,
    }
}

pub fn memory() -> File {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(MEMORY).unwrap();
    memory
}

/// An ELF image with one segment at [`ENTRY`].
fn kernel(code: &[u8]) -> File {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    let halves = |image: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| image.extend(v.to_le_bytes()));
    let words = |image: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| image.extend(v.to_le_bytes()));
    let quads = |image: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| image.extend(v.to_le_bytes()));
    halves(&mut image, &[2, 62]);
    words(&mut image, &[1]);
    quads(&mut image, &[ENTRY, 64, 0]);
    words(&mut image, &[0]);
    halves(&mut image, &[64, 56, 1, 0, 0, 0]);
    // PT_LOAD, to be read and executed.
    words(&mut image, &[1, 5]);
    let length = code.len() as u64;
    quads(&mut image, &[120, ENTRY, ENTRY, length, length, 4096]);
    image.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

impl Guest {
    /// Boots the payload; the machine is paused before its first instruction.
    pub fn boot(code: &[u8], vcpus: u8, memory: &File) -> Self {
        Self::boot_with(code, vcpus, memory, None)
    }

    /// The same, with a network card or without.
    pub fn boot_with(code: &[u8], vcpus: u8, memory: &File, network: Option<Cable>) -> Self {
        let console = tempfile::tempfile().unwrap();
        let config = MachineConfig { memory_bytes: MEMORY, vcpus };
        let files = DeviceFiles { network, ..files(&console) };
        let machine = Machine::boot(config, memory, &mut kernel(code), None, "", files).unwrap();
        Self { machine, console }
    }

    /// Restores a copy, paused.
    pub fn restore(snapshot: &offshoot_vmm::snapshot::Snapshot, memory: &File) -> Self {
        Self::restore_with(snapshot, memory, &Ready::default())
    }

    /// The same, with pages that it has before it runs.
    pub fn restore_with(snapshot: &offshoot_vmm::snapshot::Snapshot, memory: &File, ready: &Ready) -> Self {
        let console = tempfile::tempfile().unwrap();
        let machine = Machine::restore_with(snapshot, memory, None, files(&console), ready).unwrap();
        Self { machine, console }
    }

    /// The same, with what another copy had for itself.
    pub fn restore_above(snapshot: &offshoot_vmm::snapshot::Snapshot, memory: &File, own: &::memory::Delta) -> Self {
        let console = tempfile::tempfile().unwrap();
        let machine = Machine::restore_with(snapshot, memory, Some(own), files(&console), &Ready::default()).unwrap();
        Self { machine, console }
    }

    /// Waits until the guest has said exactly this.
    pub fn expect(&self, said: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut seen = vec![0; usize::try_from(self.console.metadata().unwrap().len()).unwrap()];
            self.console.read_exact_at(&mut seen, 0).unwrap();
            if seen == said {
                return;
            }
            assert!(Instant::now() < deadline, "{:?} was said, not {:?}", seen.escape_ascii(), said.escape_ascii());
            std::thread::yield_now();
        }
    }

    /// Has the guest say a byte; leaves it running. One that is about to forget the last byte would forget this one too.
    pub fn say(&mut self, word: u8) {
        loop {
            self.machine.pause();
            let mut last = [0];
            self.machine.read(WORD, &mut last).unwrap();
            if last == [0] {
                self.machine.write(WORD, &[word]).unwrap();
                return self.machine.resume();
            }
            self.machine.resume();
            std::thread::yield_now();
        }
    }

    /// How far the guest has counted. It must be paused.
    pub fn count(&self) -> u64 {
        let mut bytes = [0; 8];
        self.machine.read(COUNTER, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}
