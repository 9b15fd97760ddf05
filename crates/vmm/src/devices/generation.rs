//! The generation identifier: tells a guest that it is a copy.
//!
//! Linux 5.18 and later has a driver: it reseeds its random generator from these 16 bytes before anything else of a fork can
//! use it. They are written at every restore, after the state and before the first run; the interrupt that comes after makes
//! the guest look. A guest whose kernel has no such driver is not bothered: it would spend its first milliseconds on nothing.

use std::{io, sync::Arc};

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::{bus::BusDevice, irq::Interrupt, layout::GENERATION, memory::GuestMemory};

/// The identifier's place in one machine, the interrupt that says it changed, and the port that says somebody cares.
#[derive(Debug)]
pub struct Generation {
    memory: GuestMemory,
    changed: Arc<dyn Interrupt>,
    driver: bool,
}

impl Generation {
    /// The identifier of this machine.
    pub fn new(memory: GuestMemory, changed: Arc<dyn Interrupt>) -> Self {
        Self { memory, changed, driver: false }
    }

    /// Writes a fresh random identifier. The machine must not run.
    ///
    /// # Errors
    /// No random numbers, or memory that ends below 1 MiB.
    pub fn renew(&self) -> io::Result<()> {
        let mut fresh = [0_u8; 16];
        // Requests of up to 256 bytes are never cut short.
        getrandom(&mut fresh, GetRandomFlags::empty())?;
        self.memory.write_slice(&fresh, GuestAddress(GENERATION)).map_err(io::Error::other)
    }

    /// Raises the interrupt, if the guest has a driver. To be called with the interrupt controllers' state loaded, before the
    /// first run.
    pub fn notify(&self) {
        if self.driver {
            self.changed.trigger();
        }
    }

    /// Whether there is a driver, for [`Generation::load`].
    pub fn save(&self) -> Vec<u8> {
        vec![u8::from(self.driver)]
    }

    /// Takes over what was saved. `false` if it was not saved by [`Generation::save`].
    #[must_use]
    pub fn load(&mut self, state: &[u8]) -> bool {
        let [driver @ (0 | 1)] = state else { return false };
        self.driver = *driver == 1;
        true
    }
}

impl BusDevice for Generation {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, _: &[u8]) {
        self.driver = true;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::memory::{Sharing, map};

    #[derive(Debug, Default)]
    struct Count(AtomicU32);

    impl Interrupt for Count {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn no_two_machines_have_the_same_identifier() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 << 20).unwrap();
        let fresh = || {
            let memory = map(&file, 2 << 20, Sharing::Private).unwrap();
            let count = Arc::new(Count::default());
            let mut generation = Generation::new(memory.clone(), count.clone());
            generation.renew().unwrap();
            generation.notify();
            assert_eq!(count.0.load(Ordering::Relaxed), 0, "nobody would listen");
            assert!(generation.load(&[1]));
            generation.notify();
            assert_eq!(count.0.load(Ordering::Relaxed), 1);
            memory.read_obj::<u128>(GuestAddress(GENERATION)).unwrap()
        };
        let (one, other) = (fresh(), fresh());
        assert!(one != 0 && other != 0 && one != other);
    }

    #[test]
    fn a_driver_that_asked_is_remembered() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 << 20).unwrap();
        let memory = map(&file, 2 << 20, Sharing::Private).unwrap();
        let mut generation = Generation::new(memory, Arc::new(Count::default()));
        assert_eq!(generation.save(), [0]);
        generation.write(0, &[1]);
        assert_eq!(generation.save(), [1]);
        for damaged in [&[][..], &[2], &[1, 1]] {
            assert!(!generation.load(damaged));
        }
    }
}
