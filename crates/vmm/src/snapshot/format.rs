//! Reading and writing the file.

use std::collections::BTreeMap;

use serde::{
    Deserializer, Serializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap,
};

use super::{Snapshot, SnapshotError};
use crate::{config::MAX_VCPUS, kvm::state::VcpuState};

/// The first bytes. The line feed shows a transfer that changed line ends.
pub const MAGIC: [u8; 8] = *b"offs-vm\n";
/// The format written and read.
pub const VERSION: u32 = 1;
/// Most bytes of a state file: eight vCPUs with all vector state are 200 KiB, devices have the rest.
pub const MAX_BYTES: usize = 8 << 20;
/// Most devices.
pub const MAX_DEVICES: usize = 64;
/// Longest name of a device in bytes.
pub const MAX_DEVICE_NAME: usize = 64;
/// Most bytes of one device.
pub const MAX_DEVICE_BYTES: usize = 1 << 20;

const HEADER: usize = 24;

impl Snapshot {
    /// The file's bytes.
    ///
    /// # Errors
    /// [`SnapshotError::TooLarge`] and [`SnapshotError::Content`] if the snapshot has more of something than a file may have: what is
    /// written can always be read.
    pub fn encode(&self) -> Result<Vec<u8>, SnapshotError> {
        self.check()?;
        let payload = postcard::to_allocvec(self).map_err(|_| SnapshotError::Content("a value cannot be written"))?;
        let mut file = Vec::with_capacity(HEADER + payload.len());
        file.extend_from_slice(&MAGIC);
        file.extend_from_slice(&VERSION.to_le_bytes());
        file.extend_from_slice(&[0; 4]);
        file.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        file.extend_from_slice(&payload);
        if file.len() > MAX_BYTES {
            return Err(SnapshotError::TooLarge { found: file.len(), limit: MAX_BYTES });
        }
        let sum = checksum(&file);
        file[12..16].copy_from_slice(&sum.to_le_bytes());
        Ok(file)
    }

    /// Reads a file. Never panics, and allocates no more than the file has bytes and 32 KiB, whatever is in it.
    ///
    /// # Errors
    /// [`SnapshotError`] says why it is refused.
    pub fn decode(file: &[u8]) -> Result<Self, SnapshotError> {
        let (header, payload) = file.split_first_chunk::<HEADER>().ok_or_else(|| short(file))?;
        let (magic, rest) = header.split_at(8);
        if magic != MAGIC {
            return Err(SnapshotError::NotAState);
        }
        // Before anything else is believed: a later format may have its other fields elsewhere.
        let version = little_endian(&rest[..4]);
        if version > u64::from(VERSION) {
            return Err(SnapshotError::NewerFormat { found: narrow(version), known: VERSION });
        }
        if version < u64::from(VERSION) {
            return Err(SnapshotError::OlderFormat { found: narrow(version), known: VERSION });
        }
        if file.len() > MAX_BYTES {
            return Err(SnapshotError::TooLarge { found: file.len(), limit: MAX_BYTES });
        }
        let said = little_endian(&rest[8..]);
        if said != payload.len() as u64 {
            return Err(SnapshotError::Length { found: file.len() as u64, said: said.saturating_add(HEADER as u64) });
        }
        if little_endian(&rest[4..8]) != u64::from(checksum(file)) {
            return Err(SnapshotError::Checksum);
        }
        let (snapshot, left): (Self, _) =
            postcard::take_from_bytes(payload).map_err(|_| SnapshotError::Content("its payload cannot be read"))?;
        if !left.is_empty() {
            return Err(SnapshotError::Content("something follows its payload"));
        }
        snapshot.check()?;
        Ok(snapshot)
    }

    /// What must hold in every snapshot, so that nobody who uses one needs to ask.
    fn check(&self) -> Result<(), SnapshotError> {
        self.machine.check().map_err(|_| SnapshotError::Content("no machine has that size"))?;
        if self.vcpus.len() != usize::from(self.machine.vcpus) {
            return Err(SnapshotError::Content("its vCPUs are more or fewer than it says"));
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(SnapshotError::Content("it has too many devices"));
        }
        for (name, state) in &self.devices {
            if name.is_empty() || name.len() > MAX_DEVICE_NAME {
                return Err(SnapshotError::Content("a device has no name or one that is too long"));
            }
            if state.len() > MAX_DEVICE_BYTES {
                return Err(SnapshotError::Content("a device has too much state"));
            }
        }
        if !self.vm.irqchips.iter().zip(0..).all(|(chip, id)| chip.chip_id == id) {
            return Err(SnapshotError::Content("its interrupt controllers are not two PICs and an IOAPIC"));
        }
        self.host.check()?;
        self.vcpus.iter().try_for_each(VcpuState::check).map_err(SnapshotError::Content)
    }
}

/// Over everything but the checksum's own four bytes. `file` has a whole header.
fn checksum(file: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&file[..12]);
    hasher.update(&file[16..]);
    hasher.finalize()
}

/// The right refusal for what is shorter than a header.
fn short(file: &[u8]) -> SnapshotError {
    let common = file.len().min(MAGIC.len());
    if file.is_empty() || file[..common] != MAGIC[..common] {
        return SnapshotError::NotAState;
    }
    SnapshotError::Length { found: file.len() as u64, said: HEADER as u64 }
}

/// Up to eight bytes as a number.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

/// For numbers that came from four bytes.
fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The vCPUs, without believing their number: a large one would ask for a megabyte before the first is read.
pub(super) fn vcpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<VcpuState>, D::Error> {
    struct Vcpus;
    impl<'de> Visitor<'de> for Vcpus {
        type Value = Vec<VcpuState>;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(formatter, "at most {MAX_VCPUS} vCPUs")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
            let limit = usize::from(MAX_VCPUS);
            let mut vcpus = Vec::with_capacity(sequence.size_hint().unwrap_or(0).min(limit));
            while let Some(vcpu) = sequence.next_element()? {
                if vcpus.len() == limit {
                    return Err(A::Error::custom("too many vCPUs"));
                }
                vcpus.push(vcpu);
            }
            Ok(vcpus)
        }
    }
    deserializer.deserialize_seq(Vcpus)
}

/// Devices by name, each once and in the order of their names; their bytes are copied in one piece.
pub(super) fn devices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Vec<u8>>, D::Error> {
    struct Devices;
    impl<'de> Visitor<'de> for Devices {
        type Value = BTreeMap<String, Vec<u8>>;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(formatter, "at most {MAX_DEVICES} devices in the order of their names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut devices = BTreeMap::<String, Vec<u8>>::new();
            while let Some((name, state)) = map.next_entry::<&str, &[u8]>()? {
                let ordered = devices.last_key_value().is_none_or(|(last, _)| last.as_str() < name);
                if devices.len() == MAX_DEVICES || name.len() > MAX_DEVICE_NAME || !ordered {
                    return Err(A::Error::custom("too many devices, or not in order"));
                }
                devices.insert(name.to_owned(), state.to_vec());
            }
            Ok(devices)
        }
    }
    deserializer.deserialize_map(Devices)
}

/// The other direction of [`devices`].
pub(super) fn write_devices<S: Serializer>(
    devices: &BTreeMap<String, Vec<u8>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    struct Bytes<'a>(&'a [u8]);
    impl serde::Serialize for Bytes<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_bytes(self.0)
        }
    }
    let mut map = serializer.serialize_map(Some(devices.len()))?;
    for (name, state) in devices {
        map.serialize_entry(name, &Bytes(state))?;
    }
    map.end()
}
