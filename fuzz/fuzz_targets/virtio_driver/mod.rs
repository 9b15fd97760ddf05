//! A driver that does what the input says. Shared by the targets of the virtio devices.

use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use vm_memory::{Bytes, GuestAddress};
use vmm::{
    bus::BusDevice,
    events::{EventHandler, HostEvent, Readiness},
    irq::Interrupt,
    memory::GuestMemory,
    virtio::{MmioTransport, VirtioDevice},
};

/// Bytes of RAM; behind it is nothing.
const MEMORY: usize = 1 << 20;

/// Rings of each queue, 16 KiB apart: descriptors, then the available ring, then the used ring.
const RINGS: u64 = 0x8_0000;

/// One thing that a driver, or the host at the other end, does.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// A register is written.
    Write(u8, u32),
    /// Bytes of any number are written anywhere in the window.
    WriteAny(u16, [u8; 8], u8),
    /// Bytes of any number are read anywhere in the window.
    ReadAny(u16, u8),
    /// Memory changes: also rings, also buffers that are in use.
    Memory(u32, Vec<u8>),
    /// Well-formed rings get a chain: address, length, whether the device is to write.
    Chain(u8, Vec<(u32, u32, bool)>),
    /// A queue is announced.
    Notify(u8),
    /// A descriptor of the host becomes ready.
    Host(u8, bool, bool, bool),
    /// The device thread comes around.
    Requested,
    /// Save and load.
    Again,
    /// Reset, and a start as a good driver makes it.
    Start,
}

#[derive(Debug)]
struct Nobody;

impl Interrupt for Nobody {
    fn trigger(&self) {}
}

/// A device and what its driver remembers.
pub struct Driver {
    memory: GuestMemory,
    device: Mutex<MmioTransport>,
    available: Vec<u16>,
}

impl Driver {
    /// A device that was started.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let device = Mutex::new(MmioTransport::new(memory.clone(), Arc::new(Nobody), device));
        let mut driver = Self { memory, device, available: Vec::new() };
        driver.start();
        driver
    }

    /// Does all steps.
    pub fn run(&mut self, steps: Vec<Step>) {
        for step in steps {
            self.step(step);
        }
    }

    /// Loads anything.
    #[allow(dead_code, reason = "not every target does")]
    pub fn load(&mut self, bytes: &[u8]) {
        let mut device = self.device.lock().expect("lock");
        if device.load(bytes).is_ok() {
            device.resume();
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(register, value) => self.write(u64::from(register) * 4, value),
            Step::WriteAny(offset, bytes, count) => {
                let count = usize::from(count).min(8);
                self.device.lock().expect("lock").write(u64::from(offset), &bytes[..count]);
            }
            Step::ReadAny(offset, count) => {
                let mut bytes = [0; 8];
                let count = usize::from(count).min(8);
                self.device.lock().expect("lock").read(u64::from(offset), &mut bytes[..count]);
            }
            Step::Memory(address, bytes) => {
                let _ = self.memory.write(&bytes, GuestAddress(u64::from(address) % MEMORY as u64));
            }
            Step::Chain(queue, buffers) => self.chain(queue, &buffers),
            Step::Notify(queue) => self.write(0x50, u32::from(queue)),
            Step::Host(key, readable, writable, hang_up) => {
                self.device.host_event(HostEvent::Ready(u32::from(key), Readiness { readable, writable, hang_up }));
            }
            Step::Requested => self.device.host_event(HostEvent::Requested),
            Step::Again => {
                let mut device = self.device.lock().expect("lock");
                let saved = device.save();
                device.load(&saved).expect("what was saved can be loaded");
                device.resume();
            }
            Step::Start => self.start(),
        }
    }

    fn write(&self, offset: u64, value: u32) {
        self.device.lock().expect("lock").write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.lock().expect("lock").read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn start(&mut self) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for half in [0, 1] {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, offered);
        }
        self.write(0x70, 11);
        self.available.clear();
        for queue in 0.. {
            self.write(0x30, queue);
            // No more than fit in the memory, and each small enough for its place.
            if self.read(0x34) == 0 || queue == 24 {
                break;
            }
            let base = RINGS + u64::from(queue) * 0x4000;
            let _ = self.memory.write(&[0; 0x4000], GuestAddress(base));
            self.write(0x38, self.read(0x34).min(32));
            for (register, address) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
                self.write(register, address as u32);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
            self.available.push(0);
        }
        self.write(0x70, 15);
    }

    fn chain(&mut self, queue: u8, buffers: &[(u32, u32, bool)]) {
        if self.available.is_empty() || buffers.is_empty() {
            return;
        }
        let queue = usize::from(queue) % self.available.len();
        let base = RINGS + queue as u64 * 0x4000;
        let size = 8;
        let buffers = &buffers[..buffers.len().min(size)];
        let head = self.available[queue] % 4 * 8;
        for (number, &(address, bytes, writes)) in buffers.iter().enumerate() {
            let at = GuestAddress(base + (u64::from(head) + number as u64) * 16);
            let next = number + 1 < buffers.len();
            let flags = u16::from(next) | u16::from(writes) << 1;
            let descriptor = [
                &u64::from(address).to_le_bytes()[..],
                &bytes.to_le_bytes(),
                &flags.to_le_bytes(),
                &(head + number as u16 + 1).to_le_bytes(),
            ]
            .concat();
            let _ = self.memory.write(&descriptor, at);
        }
        let slot = base + 0x1004 + u64::from(self.available[queue] % 32) * 2;
        self.available[queue] = self.available[queue].wrapping_add(1);
        let _ = self.memory.write(&head.to_le_bytes(), GuestAddress(slot));
        let _ = self.memory.write(&self.available[queue].to_le_bytes(), GuestAddress(base + 0x1002));
        self.write(0x50, queue as u32);
    }
}
