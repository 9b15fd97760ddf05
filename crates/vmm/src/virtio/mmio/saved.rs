//! The transport's state as bytes, with its device's in it.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT as _;

use super::{INTERRUPT_CONFIG, INTERRUPT_USED, MmioTransport, Setup, VERSION_1, status};
use crate::virtio::LoadError;

/// Version of what [`MmioTransport::save`] writes.
const FORMAT: u8 = 1;

#[derive(Serialize, Deserialize)]
struct State {
    format: u8,
    kind: u32,
    status: u8,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u8,
    config_generation: u32,
    queues: Vec<(Setup, Option<Positions>)>,
    device: Vec<u8>,
}

/// How far device and driver have come in a ready queue.
#[derive(Serialize, Deserialize)]
struct Positions {
    next_available: u16,
    next_used: u16,
}

impl MmioTransport {
    /// What the guest can notice of device and transport. The machine must be paused.
    pub fn save(&self) -> Vec<u8> {
        let queues = self
            .setups
            .iter()
            .zip(&self.queues)
            .map(|(setup, queue)| {
                let positions = queue
                    .as_ref()
                    .map(|queue| Positions { next_available: queue.next_avail(), next_used: queue.next_used() });
                (*setup, positions)
            })
            .collect();
        let state = State {
            format: FORMAT,
            kind: self.device.kind() as u32,
            status: self.status,
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues,
            device: self.device.save(),
        };
        // Fails only for types that have no fixed layout, which these are not.
        postcard::to_allocvec(&state).unwrap_or_default()
    }

    /// Takes over what [`save`](Self::save) gave, in a new transport over the same guest memory. The bytes may be hostile.
    ///
    /// # Errors
    /// [`LoadError`]; the transport is not to be used then.
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let (state, rest) = postcard::take_from_bytes::<State>(bytes).map_err(|_| LoadError::Format)?;
        if state.format != FORMAT || !rest.is_empty() {
            return Err(LoadError::Format);
        }
        if state.kind != self.device.kind() as u32
            || state.queues.len() != self.setups.len()
            || state.status & status::FEATURES_OK != 0 && state.driver_features & !self.offered() != 0
        {
            return Err(LoadError::OtherDevice);
        }
        if state.status & !(status::DRIVERS | status::NEEDS_RESET) != 0
            || state.interrupt_status & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0
            || state.status & status::FEATURES_OK != 0 && state.driver_features & VERSION_1 == 0
            || state.status & status::FEATURES_OK == 0 && state.status & status::DRIVER_OK != 0
        {
            return Err(LoadError::Impossible);
        }
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        for (index, (setup, positions)) in state.queues.into_iter().enumerate() {
            let queue = match positions {
                None => None,
                Some(positions) => {
                    let mut queue = self.queue(index, setup).ok_or(LoadError::Impossible)?;
                    queue.set_next_avail(positions.next_available);
                    queue.set_next_used(positions.next_used);
                    Some(queue)
                }
            };
            if let (Some(own_setup), Some(own_queue)) = (self.setups.get_mut(index), self.queues.get_mut(index)) {
                *own_setup = setup;
                *own_queue = queue;
            }
        }
        if self.status & status::DRIVER_OK != 0 {
            self.device.activate(self.driver_features);
        }
        self.restored = true;
        self.device.load(&state.device)
    }
}
