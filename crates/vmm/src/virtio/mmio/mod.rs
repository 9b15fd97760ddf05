//! The virtio-mmio transport, version 2 ("modern" only): registers, the driver's status machine, queues, interrupts.
//!
//! Numbers in this file are from the Virtual I/O Device specification 1.2, section 4.2.2 (registers) and 2.1 (status).

mod saved;

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::{Kind, MMIO_BYTES, Progress, QueueError, Queues, VirtioDevice};
use crate::{
    bus::BusDevice,
    events::{EventHandler, EventLoop, EventsError, HostEvent, Watcher},
    irq::Interrupt,
    memory::GuestMemory,
};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Nobody's number: drivers do not look at it.
const VENDOR: u32 = 0;

/// VIRTIO_F_VERSION_1: without it a driver would use the layouts from before the specification.
const VERSION_1: u64 = 1 << 32;

/// First offset of the device's configuration space.
const CONFIG: u64 = 0x100;

mod status {
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
    /// What a driver can set.
    pub(super) const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Bits of the interrupt status.
const INTERRUPT_USED: u8 = 1;
const INTERRUPT_CONFIG: u8 = 2;

/// What a driver has written about one queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Setup {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// One device in the guest's memory map.
#[derive(Debug)]
pub struct MmioTransport {
    memory: GuestMemory,
    irq: Arc<dyn Interrupt>,
    device: Box<dyn VirtioDevice>,
    watcher: Option<Watcher>,
    status: u8,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u8,
    config_generation: u32,
    setups: Vec<Setup>,
    /// The queues that are ready. Each was checked to lie in memory.
    queues: Vec<Option<Queue>>,
    /// Loaded, and not run since.
    restored: bool,
    fault: Option<QueueError>,
}

impl MmioTransport {
    /// A device that no driver has touched. `irq` gives one edge for each change of the interrupt status.
    pub fn new(memory: GuestMemory, irq: Arc<dyn Interrupt>, device: Box<dyn VirtioDevice>) -> Self {
        let setups: Vec<_> = device.queue_sizes().iter().map(|&size| Setup { size, ..Setup::default() }).collect();
        let queues = setups.iter().map(|_| None).collect();
        Self {
            memory,
            irq,
            device,
            watcher: None,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            interrupt_status: 0,
            config_generation: 0,
            setups,
            queues,
            restored: false,
            fault: None,
        }
    }

    /// What the device is.
    pub fn kind(&self) -> Kind {
        self.device.kind()
    }

    /// Whether the driver is ready and the device works.
    pub fn is_active(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && self.status & (status::FAILED | status::NEEDS_RESET) == 0
    }

    /// How the guest broke the rules, if the device stopped for it.
    pub fn fault(&self) -> Option<QueueError> {
        self.fault
    }

    /// Has the device's descriptors watched.
    ///
    /// # Errors
    /// If one can not be.
    pub fn attach(&mut self, watcher: Watcher) -> io::Result<()> {
        self.watcher = Some(watcher.clone());
        self.device.attach(watcher)
    }

    /// The machine is about to run. Called before the vCPUs run, with the event loop still paused or not.
    pub fn resume(&mut self) {
        if !std::mem::take(&mut self.restored) {
            return;
        }
        // An interrupt may have been on its way when the machine was saved. One too many does no harm, one too few does.
        if self.interrupt_status != 0 {
            self.irq.trigger();
        }
        self.call(|device, queues| device.restored(queues));
    }

    /// The configuration space has changed.
    pub fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        self.interrupt(INTERRUPT_CONFIG);
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    /// The queue a driver describes, if it can exist: a size the device allows, rings aligned and in memory.
    fn queue(&self, index: usize, setup: Setup) -> Option<Queue> {
        let max_size = *self.device.queue_sizes().get(index)?;
        let queue = Queue::try_from(QueueState {
            max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: false,
            size: setup.size,
            ready: true,
            desc_table: setup.descriptors,
            avail_ring: setup.available,
            used_ring: setup.used,
        })
        .ok()?;
        // The crate takes a ring at address 0 for one that was not set.
        (setup.available != 0 && queue.is_valid(&self.memory)).then_some(queue)
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_select).ok().filter(|&index| index < self.setups.len())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.kind() as u32,
            0x00c => VENDOR,
            0x010 => half(self.offered(), self.device_features_select),
            0x034 => self
                .selected()
                .and_then(|index| self.device.queue_sizes().get(index))
                .map_or(0, |&size| u32::from(size)),
            0x044 => u32::from(self.selected().and_then(|index| self.queues.get(index)).is_some_and(Option::is_some)),
            0x060 => u32::from(self.interrupt_status),
            0x070 => u32::from(self.status),
            // A shared memory region of length -1 is one that does not exist.
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            0x0fc => self.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.device_features_select = value,
            0x020 => self.set_driver_features(value),
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x044 => self.set_queue_ready(value),
            0x050 => self.notify(value),
            0x064 => self.interrupt_status &= !u8::try_from(value & 0xff).unwrap_or_default(),
            0x070 => self.set_status(value),
            0x038 | 0x080 | 0x084 | 0x090 | 0x094 | 0x0a0 | 0x0a4 => self.set_up_queue(offset, value),
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        // Agreed is agreed.
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // Bits only ever come: a driver that would take one back must reset.
        let mut new = u8::try_from(value & 0xff).unwrap_or_default() & status::DRIVERS;
        new &= !self.status;
        if new & status::FEATURES_OK != 0
            && (self.driver_features & !self.offered() != 0 || self.driver_features & VERSION_1 == 0)
        {
            // The driver reads the status back and sees that its choice was not accepted.
            new &= !status::FEATURES_OK;
        }
        if (self.status | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK != 0 && self.is_active() {
            self.device.activate(self.driver_features);
            // Whatever the host's side has been waiting to say can be said now. Not on the vCPU's thread, whose system
            // calls are fewer.
            self.call(|_, _| Ok(Progress::More));
        }
    }

    fn reset(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.interrupt_status = 0;
        self.restored = false;
        self.fault = None;
        for (setup, &size) in self.setups.iter_mut().zip(self.device.queue_sizes()) {
            *setup = Setup { size, ..Setup::default() };
        }
        self.queues.fill_with(|| None);
        self.device.reset();
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        // A queue that is ready stays as it is: its rings were checked.
        if self.status & (status::FEATURES_OK | status::FAILED) != status::FEATURES_OK {
            return;
        }
        let Some(index) = self.selected() else { return };
        if self.queues.get(index).is_some_and(Option::is_some) {
            return;
        }
        let Some(setup) = self.setups.get_mut(index) else { return };
        match offset {
            // What does not fit is a size that no queue has, and refused when the queue is to be ready.
            0x038 => setup.size = u16::try_from(value).unwrap_or(0),
            0x080 => set_low(&mut setup.descriptors, value),
            0x084 => set_high(&mut setup.descriptors, value),
            0x090 => set_low(&mut setup.available, value),
            0x094 => set_high(&mut setup.available, value),
            0x0a0 => set_low(&mut setup.used, value),
            0x0a4 => set_high(&mut setup.used, value),
            _ => {}
        }
    }

    fn set_queue_ready(&mut self, value: u32) {
        let Some(index) = self.selected() else { return };
        if value == 0 {
            if let Some(queue) = self.queues.get_mut(index) {
                *queue = None;
            }
            return;
        }
        if self.status & (status::FEATURES_OK | status::FAILED) != status::FEATURES_OK
            || self.queues.get(index).is_none_or(Option::is_some)
        {
            return;
        }
        let ready = self.setups.get(index).and_then(|&setup| self.queue(index, setup));
        if ready.is_none() {
            self.fail(QueueError::Ring);
        } else if let Some(queue) = self.queues.get_mut(index) {
            *queue = ready;
        }
    }

    fn notify(&mut self, value: u32) {
        let Ok(index) = u16::try_from(value) else { return };
        if !self.is_active() || self.queues.get(usize::from(index)).is_none_or(Option::is_none) {
            return;
        }
        self.call(|device, queues| device.notify(index, queues));
    }

    fn call(&mut self, call: impl FnOnce(&mut dyn VirtioDevice, &mut Queues<'_>) -> Result<Progress, QueueError>) {
        let active = self.is_active();
        let mut queues = Queues::new(&self.memory, if active { &mut self.queues } else { &mut [] });
        let result = call(&mut *self.device, &mut queues);
        if queues.wants_interrupt() {
            self.interrupt(INTERRUPT_USED);
        }
        match result {
            Ok(Progress::Done) => {}
            Ok(Progress::More) => {
                if let Some(watcher) = &self.watcher {
                    watcher.request();
                }
            }
            Err(error) => self.fail(error),
        }
    }

    /// The guest broke the rules: nothing of it is believed before a reset.
    fn fail(&mut self, error: QueueError) {
        self.fault = Some(error);
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt(INTERRUPT_CONFIG);
        }
    }

    fn interrupt(&mut self, bit: u8) {
        self.interrupt_status |= bit;
        self.irq.trigger();
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            if offset < MMIO_BYTES - CONFIG {
                self.device.read_config(offset, data);
            }
        } else if let (0, Ok(data)) = (offset % 4, <&mut [u8; 4]>::try_from(data)) {
            // Registers are read in one piece, as the specification demands; anything else reads as zero.
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device here has a configuration that a driver can write.
        if let (true, 0, Ok(&data)) = (offset < CONFIG, offset % 4, <&[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

impl EventHandler for Mutex<MmioTransport> {
    fn host_event(&self, event: HostEvent) {
        let mut transport = self.lock().unwrap_or_else(PoisonError::into_inner);
        transport.call(|device, queues| device.host_event(event, queues));
    }
}

/// Has a device's host descriptors watched by the machine's event loop.
///
/// # Errors
/// [`EventsError`].
pub fn connect(events: &EventLoop, transport: &Arc<Mutex<MmioTransport>>) -> Result<(), EventsError> {
    let handler: Arc<dyn EventHandler> = Arc::<Mutex<MmioTransport>>::clone(transport);
    let watcher = events.register(handler)?;
    transport.lock().unwrap_or_else(PoisonError::into_inner).attach(watcher).map_err(EventsError::Epoll)
}

fn half(value: u64, select: u32) -> u32 {
    let value = match select {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(value).unwrap_or_default()
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}
