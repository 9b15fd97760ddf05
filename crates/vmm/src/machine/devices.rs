//! The devices of one machine: which there are, where the guest finds them, their states by name.

use std::{
    collections::BTreeMap,
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::MachineError;
use crate::{
    bus::Bus,
    config::NETWORK_MAC,
    devices::{Generation, ResetPort, SerialPort},
    ending::Ending,
    events::EventLoop,
    irq::GsiLine,
    kvm::{run::Buses, vm::Vm},
    layout::{
        GENERATION_GSI, GENERATION_PORT, KEYBOARD_PORT, KEYBOARD_PORTS, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS,
        VIRTIO_MMIO_BYTES, virtio_slot,
    },
    virtio::{Block, Cable, Console, LoadError, MmioTransport, Net, Rng, VirtioDevice, connect},
};

/// What the devices of a machine are connected to on the host.
#[derive(Debug)]
pub struct DeviceFiles {
    /// `/dev/kvm`, opened by whoever started this process: in its jail there is no such path. `None` opens it here.
    pub kvm: Option<OwnedFd>,
    /// Root image; never written.
    pub root_image: File,
    /// Where the guest's ack lines go: written without blocking, one stream of bytes.
    pub ack: OwnedFd,
    /// Sockets of the control channels, at most 8, listening. Each serves one process at a time.
    pub channels: Vec<UnixListener>,
    /// Where the serial console's output goes: a regular file, or something that never blocks. `None` drops it.
    pub console: Option<File>,
    /// What the network card is connected to; `None` if the machine has no card. A copy has one if the template had one.
    pub network: Option<Cable>,
}

/// Names of devices in the state file.
const SERIAL: &str = "serial";
const GENERATION: &str = "generation";
const ROOT: &str = "root";
const PORTS: &str = "ports";
const RANDOM: &str = "random";
const NETWORK: &str = "network";

/// All devices.
#[derive(Debug)]
pub(super) struct Devices {
    serial: Arc<Mutex<SerialPort>>,
    generation: Arc<Mutex<Generation>>,
    /// By slot.
    virtio: Vec<(&'static str, Arc<Mutex<MmioTransport>>)>,
}

/// Panics of a device's thread are reported by the thread.
fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    /// Makes the devices, as they are after a reset or with the given states.
    pub(super) fn new(
        vm: &Vm,
        ending: &Arc<Ending>,
        files: DeviceFiles,
        states: Option<&BTreeMap<String, Vec<u8>>>,
    ) -> Result<(Self, Buses), MachineError> {
        let line = |gsi| Arc::new(GsiLine::new(vm.fd().clone(), gsi));
        let saved = |name: &str| match states {
            None => Ok(None),
            Some(states) => states.get(name).map(Some).ok_or_else(|| MachineError::OtherDevices(name.into())),
        };
        let (mut ports, mut mmio) = (Bus::new(), Bus::new());

        let serial = match saved(SERIAL)? {
            None => SerialPort::new(line(SERIAL_GSI), files.console),
            Some(state) => SerialPort::load(state, line(SERIAL_GSI), files.console)?,
        };
        let serial = Arc::new(Mutex::new(serial));
        ports.insert(SERIAL_PORT, SERIAL_PORTS, serial.clone())?;
        let reset = Arc::new(Mutex::new(ResetPort::new(ending.clone())));
        ports.insert(KEYBOARD_PORT, KEYBOARD_PORTS, reset)?;
        let mut generation = Generation::new(vm.memory().clone(), line(GENERATION_GSI));
        if saved(GENERATION)?.is_some_and(|state| !generation.load(state)) {
            return Err(MachineError::Device { device: GENERATION, source: LoadError::Format });
        }
        let generation = Arc::new(Mutex::new(generation));
        ports.insert(GENERATION_PORT.into(), 1, generation.clone())?;

        let disk = Block::new(files.root_image, ROOT).map_err(MachineError::resources("its root image"))?;
        let mut devices: Vec<(&'static str, Box<dyn VirtioDevice>)> = vec![
            (ROOT, Box::new(disk)),
            (PORTS, Box::new(Console::offshoot(files.ack, files.channels)?)),
            (RANDOM, Box::new(Rng::new())),
        ];
        if let Some(cable) = files.network {
            let card = Net::new(cable, NETWORK_MAC).map_err(MachineError::resources("its network card"))?;
            devices.push((NETWORK, Box::new(card)));
        }
        let mut virtio = Vec::with_capacity(devices.len());
        for (slot, (name, device)) in (0..).zip(devices) {
            let (base, gsi) = virtio_slot(slot).ok_or_else(|| MachineError::OtherDevices(name.into()))?;
            let mut transport = MmioTransport::new(vm.memory().clone(), line(gsi), device);
            if let Some(state) = saved(name)? {
                transport.load(state).map_err(|source| MachineError::Device { device: name, source })?;
            }
            let transport = Arc::new(Mutex::new(transport));
            mmio.insert(base, VIRTIO_MMIO_BYTES, transport.clone())?;
            virtio.push((name, transport));
        }
        let devices = Self { serial, generation, virtio };
        if let Some(other) = states.and_then(|states| states.keys().find(|name| !devices.has(name))) {
            return Err(MachineError::OtherDevices(other.clone()));
        }
        Ok((devices, Buses { ports, mmio }))
    }

    fn has(&self, name: &str) -> bool {
        name == SERIAL || name == GENERATION || self.virtio.iter().any(|(have, _)| *have == name)
    }

    /// The virtio slots that have a device.
    pub(super) fn slots(&self) -> Vec<u32> {
        (0..).zip(&self.virtio).map(|(slot, _)| slot).collect()
    }

    /// Has the host's ends watched. Their callbacks begin when the loop is resumed.
    pub(super) fn connect(&self, events: &EventLoop) -> Result<(), MachineError> {
        self.virtio.iter().try_for_each(|(_, transport)| Ok(connect(events, transport)?))
    }

    /// Before the vCPUs run.
    pub(super) fn resume(&self) {
        for (_, transport) in &self.virtio {
            lock(transport).resume();
        }
    }

    /// The generation identifier.
    pub(super) fn generation(&self) -> MutexGuard<'_, Generation> {
        lock(&self.generation)
    }

    /// All states, by name. The machine must be paused.
    pub(super) fn save(&self) -> Result<BTreeMap<String, Vec<u8>>, MachineError> {
        let virtio = self.virtio.iter().map(|(name, transport)| ((*name).to_owned(), lock(transport).save()));
        let mut states: BTreeMap<_, _> = virtio.collect();
        states.insert(SERIAL.into(), lock(&self.serial).save()?);
        states.insert(GENERATION.into(), self.generation().save());
        Ok(states)
    }
}
