//! A driver, written by hand over guest memory, and what it sees of the devices. It can misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod block;
mod console;
mod hostile;
mod net;
mod random;
mod rng;
mod transport;

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::{bus::BusDevice, events::EventLoop, irq::Interrupt, memory::GuestMemory};

/// How long something that happens in another thread may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// RAM of the tests, with a hole in it.
const LOW_END: u64 = 4 << 20;
const HIGH_START: u64 = 8 << 20;
const HIGH_END: u64 = 9 << 20;

/// Where the rings are: 64 KiB for each queue's.
const RINGS: u64 = 1 << 20;
/// Where tests put their buffers.
const BUFFERS: u64 = 64 << 10;

const WRITE: u16 = 2;
const NEXT: u16 = 1;

fn memory() -> GuestMemory {
    let ranges = [(GuestAddress(0), LOW_END as usize), (GuestAddress(HIGH_START), (HIGH_END - HIGH_START) as usize)];
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

/// An interrupt line that counts.
#[derive(Debug, Default)]
struct Line {
    edges: Mutex<u64>,
    raised: Condvar,
}

impl Interrupt for Line {
    fn trigger(&self) {
        *self.edges.lock().unwrap() += 1;
        self.raised.notify_all();
    }
}

#[derive(Debug, Clone, Default)]
struct Ring {
    size: u16,
    base: u64,
    available: u16,
    used: u16,
    next_descriptor: u16,
}

impl Ring {
    fn available_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0xa000
    }
}

struct Driver {
    memory: GuestMemory,
    line: Arc<Line>,
    device: Arc<Mutex<MmioTransport>>,
    rings: BTreeMap<u16, Ring>,
}

impl Driver {
    fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::over(memory(), device)
    }

    fn over(memory: GuestMemory, device: impl VirtioDevice + 'static) -> Self {
        let line = Arc::new(Line::default());
        let irq: Arc<dyn Interrupt> = Arc::<Line>::clone(&line);
        let device = Arc::new(Mutex::new(MmioTransport::new(memory.clone(), irq, Box::new(device))));
        Self { memory, line, device, rings: BTreeMap::new() }
    }

    /// The same guest on another host: a device that has loaded what this one saved, over the same memory.
    fn move_to(&self, device: impl VirtioDevice + 'static) -> Self {
        let mut moved = Self::over(self.memory.clone(), device);
        moved.device.lock().unwrap().load(&self.device.lock().unwrap().save()).unwrap();
        moved.rings.clone_from(&self.rings);
        moved
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.lock().unwrap().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.device.lock().unwrap().write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.read(0x70)
    }

    fn set_status(&self, bits: u32) {
        self.write(0x70, self.status() | bits);
    }

    fn offered(&self) -> u64 {
        let half = |select| {
            self.write(0x14, select);
            u64::from(self.read(0x10))
        };
        half(0) | half(1) << 32
    }

    fn accept_features(&self, features: u64) {
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.set_status(8);
    }

    /// Up to the queues.
    fn begin(&self) {
        self.write(0x70, 0);
        self.set_status(1);
        self.set_status(2);
        self.accept_features(self.offered());
        assert_eq!(self.status(), 11);
    }

    /// All there is to do, with every queue at its greatest size.
    fn start(&mut self) {
        self.begin();
        for queue in 0.. {
            self.write(0x30, queue);
            let size = self.read(0x34);
            if size == 0 {
                break;
            }
            self.set_up(queue as u16, size as u16);
            assert_eq!(self.read(0x44), 1);
        }
        self.set_status(4);
        assert_eq!(self.status(), 15);
    }

    fn set_up(&mut self, queue: u16, size: u16) {
        let ring = Ring { size, base: RINGS + u64::from(queue) * 0x10000, ..Ring::default() };
        let (available, used) = (ring.available_ring(), ring.used_ring());
        self.describe(queue, u32::from(size), ring.base, available, used);
        self.rings.insert(queue, ring);
    }

    fn describe(&self, queue: u16, size: u32, descriptors: u64, available: u64, used: u64) {
        self.write(0x30, u32::from(queue));
        self.write(0x38, size);
        for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    fn descriptor(&self, queue: u16, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let at = self.rings[&queue].base + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(bytes, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain available that begins with a descriptor.
    fn offer(&mut self, queue: u16, head: u16) {
        let ring = self.rings.get_mut(&queue).unwrap();
        let slot = ring.available_ring() + 4 + u64::from(ring.available % ring.size) * 2;
        ring.available = ring.available.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.write_obj(ring.available, GuestAddress(ring.available_ring() + 2)).unwrap();
    }

    /// Makes a chain of buffers (address, bytes, flags) available; its head.
    fn add(&mut self, queue: u16, buffers: &[(u64, u32, u16)]) -> u16 {
        let size = self.rings[&queue].size;
        let head = self.rings[&queue].next_descriptor;
        for (number, &(address, bytes, flags)) in buffers.iter().enumerate() {
            let index = (head + number as u16) % size;
            let (next, link) = if number + 1 < buffers.len() { ((index + 1) % size, NEXT) } else { (0, 0) };
            self.descriptor(queue, index, address, bytes, flags | link, next);
        }
        self.rings.get_mut(&queue).unwrap().next_descriptor = (head + buffers.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    fn notify(&self, queue: u16) {
        self.write(0x50, u32::from(queue));
    }

    /// The next chain that came back: head and bytes written.
    fn used(&mut self, queue: u16) -> Option<(u32, u32)> {
        let ring = self.rings.get_mut(&queue).unwrap();
        let index: u16 = self.memory.read_obj(GuestAddress(ring.used_ring() + 2)).unwrap();
        if index == ring.used {
            return None;
        }
        let at = ring.used_ring() + 4 + u64::from(ring.used % ring.size) * 8;
        ring.used = ring.used.wrapping_add(1);
        Some((self.memory.read_obj(GuestAddress(at)).unwrap(), self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for a chain to come back.
    fn wait_used(&mut self, queue: u16) -> (u32, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let edges = *self.line.edges.lock().unwrap();
            if let Some(used) = self.used(queue) {
                return used;
            }
            let left = deadline.checked_duration_since(Instant::now()).expect("the device does not answer");
            let guard = self.line.edges.lock().unwrap();
            drop(self.line.raised.wait_timeout_while(guard, left, |now| *now == edges).unwrap());
        }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn needs_reset(&self) -> bool {
        self.status() & 64 != 0
    }

    /// An event loop that runs for this device.
    fn events(&self) -> EventLoop {
        let events = EventLoop::start(|| ()).unwrap();
        connect(&events, &self.device).unwrap();
        self.device.lock().unwrap().resume();
        events.resume();
        events
    }
}
