//! Address ranges and the devices behind them.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

use thiserror::Error;

/// A device's registers, as the guest accesses them.
///
/// Everything that comes in is the guest's: offsets lie inside the registered range, `data` has 1 to 8 bytes, nothing else
/// is sure. Both methods run on a vCPU's thread, so they must not block.
pub trait BusDevice: Send + Debug {
    /// Reads registers. `data` is zero before, so that what has no register reads as zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes registers.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several threads reach: the vCPUs through the bus, the device thread for host events.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// A range that cannot be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the range of {length} bytes at {base:#x} is empty, past the end, or overlaps another device's")]
pub struct RangeError {
    base: u64,
    length: u64,
}

#[derive(Debug)]
struct Entry {
    length: u64,
    device: SharedDevice,
}

/// An address space: ports or memory-mapped registers.
#[derive(Debug, Default)]
pub struct Bus {
    entries: BTreeMap<u64, Entry>,
}

impl Bus {
    /// An address space without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `base..base + length`.
    ///
    /// # Errors
    /// [`RangeError`] for a range that is empty, past the end of the address space, or taken.
    pub fn insert(&mut self, base: u64, length: u64, device: SharedDevice) -> Result<(), RangeError> {
        let error = RangeError { base, length };
        let end = base.checked_add(length).filter(|end| *end > base).ok_or(error)?;
        // Ranges do not overlap, so only the last one before `end` can reach into the new one.
        if self.entries.range(..end).next_back().is_some_and(|(at, entry)| at + entry.length > base) {
            return Err(error);
        }
        self.entries.insert(base, Entry { length, device });
        Ok(())
    }

    /// Reads at an address of the guest's choice. `false` if nothing is there; `data` is then all ones, as on a bus that nobody drives.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        data.fill(0);
        device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        true
    }

    /// Writes at an address of the guest's choice. `false` if nothing is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        true
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &SharedDevice)> {
        let (base, entry) = self.entries.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= entry.length).then_some((offset, &entry.device))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            assert!(data.iter().all(|byte| *byte == 0));
            data[0] = u8::try_from(offset).unwrap();
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_only_inside_its_range() {
        let mut bus = Bus::new();
        let device = Arc::new(Mutex::new(Recorder::default()));
        bus.insert(0x100, 8, device.clone()).unwrap();
        let mut data = [7; 4];
        assert!(bus.read(0x104, &mut data));
        assert_eq!(data, [4, 0, 0, 0]);
        for outside in [0xff, 0x105, 0x108, u64::MAX] {
            assert!(!bus.read(outside, &mut data), "{outside:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(outside, &data));
        }
        assert!(bus.write(0x107, &[1]));
        assert_eq!(device.lock().unwrap().0, [(7, vec![1])]);
    }

    #[test]
    fn ranges_may_not_overlap() {
        let mut bus = Bus::new();
        let device = || Arc::new(Mutex::new(Recorder::default()));
        bus.insert(0x100, 0x10, device()).unwrap();
        for (base, length) in [(0x100, 0x10), (0xf8, 9), (0x10f, 1), (0x108, 2), (0, 0x1000), (0x10, 0), (u64::MAX, 2)]
        {
            assert_eq!(bus.insert(base, length, device()), Err(RangeError { base, length }));
        }
        bus.insert(0x110, 0x10, device()).unwrap();
        bus.insert(0xf0, 0x10, device()).unwrap();
    }
}
