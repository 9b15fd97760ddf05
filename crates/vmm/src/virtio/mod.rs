//! Virtio devices, and the memory-mapped transport (version 2 of virtio-mmio) that shows them to the guest.
//!
//! ```text
//!   vCPU threads ──MMIO exits──► MmioTransport ──notify──► VirtioDevice ──► host file, socket, pipe, tap
//!   device thread ──readiness──►  (one lock)   ──host_event──►            (used ring, interrupt)
//! ```
//!
//! A device works in the thread that calls it, under its transport's lock: a guest's notification on the vCPU's thread, a
//! host's readiness on the [device thread](crate::events). Neither ever waits for the host or for the guest; what can not
//! be done now is done at the next call.
//!
//! The guest is hostile. What it says is checked where it is used: rings when they are made ready, chains when they are
//! taken ([`Chain`]), addresses when they are accessed. A guest that breaks the rules of its queues gets a device that
//! NEEDS_RESET, and nothing else in the machine notices.

mod block;
mod chain;
mod console;
mod mmio;
mod net;
mod rng;

pub use block::Block;
pub use chain::{Chain, Queues, Segment};
pub use console::{Console, ConsoleError, HostEnd, PortConfig};
pub use mmio::{MmioTransport, connect};
pub use net::{Cable, Net};
pub use rng::Rng;

use std::{fmt::Debug, io};

use thiserror::Error;

use crate::events::{HostEvent, Watcher};

/// Size of one device's window in guest physical memory, bytes.
pub const MMIO_BYTES: u64 = 0x1000;

/// What a device is, with its number in the virtio specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A network card.
    Net = 1,
    /// A disk.
    Block = 2,
    /// Serial ports.
    Console = 3,
    /// A source of random bytes.
    Rng = 4,
}

/// How the guest broke the rules of its queues. The device needs a reset then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QueueError {
    /// The ring is not where the driver said, or its index jumped.
    #[error("the guest's ring is not in its memory, or holds more than its size")]
    Ring,
    /// The chain is a loop, leaves the table, or is longer than the queue.
    #[error("the guest's descriptor chain does not end")]
    Endless,
    /// A descriptor for reading after one for writing.
    #[error("the guest's descriptor chain mixes directions")]
    Order,
    /// A buffer outside memory.
    #[error("the guest's buffer is not in its memory")]
    Address,
    /// A buffer that can not hold what must be in it.
    #[error("the guest's buffer is too small")]
    Small,
}

/// Why a saved device can not be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LoadError {
    /// Not the bytes that `save` made, or of another version.
    #[error("the saved device is not in a format this version reads")]
    Format,
    /// The state is of another kind of device, or of one with other queues or features.
    #[error("the saved device is not the one that is there")]
    OtherDevice,
    /// The state contradicts itself, or names memory that is not there.
    #[error("the saved device's state is impossible")]
    Impossible,
}

/// Whether a call did all there was to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// All that can be done now is done.
    Done,
    /// The call did its share; it is to be called again, on the device thread.
    More,
}

/// A device behind a transport, which calls it with its own lock held.
pub trait VirtioDevice: Send + Debug {
    /// What it is.
    fn kind(&self) -> Kind;

    /// The feature bits it offers, without those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The greatest size of each of its queues, in descriptors: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration space. `data` is zeroed; what lies past the end stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver is ready, with these features.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// The driver has put something into a queue.
    ///
    /// # Errors
    /// [`QueueError`]: the guest broke the rules. The device is not called again before its reset.
    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<Progress, QueueError>;

    /// The device's descriptors are to be watched with `watcher`.
    ///
    /// # Errors
    /// If one can not be.
    fn attach(&mut self, watcher: Watcher) -> io::Result<()> {
        let _ = watcher;
        Ok(())
    }

    /// One of them is ready, or the device had more to do. The driver may not be there: then the queues are empty.
    ///
    /// # Errors
    /// As [`notify`](Self::notify).
    fn host_event(&mut self, event: HostEvent, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let _ = (event, queues);
        Ok(Progress::Done)
    }

    /// The machine was loaded and is about to run for the first time. What the device can not do before the guest runs
    /// belongs here: this is on the way of a fork to its ack.
    ///
    /// # Errors
    /// As [`notify`](Self::notify).
    fn restored(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let _ = queues;
        Ok(Progress::Done)
    }

    /// The driver starts over.
    fn reset(&mut self);

    /// What the guest can notice of the device, queues and transport excepted.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over a saved state, after [`activate`](Self::activate) if the driver was ready. The state may be hostile.
    ///
    /// # Errors
    /// [`LoadError`]; the device is not to be used then.
    fn load(&mut self, state: &[u8]) -> Result<(), LoadError> {
        if state.is_empty() { Ok(()) } else { Err(LoadError::Format) }
    }
}

/// Reads from a configuration space that is given as bytes.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests;
