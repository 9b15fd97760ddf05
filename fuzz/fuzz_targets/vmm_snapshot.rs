//! A state file of the kvm engine. The harness puts magic, version, length and checksum right, so that the payload is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::snapshot::{MAGIC, Snapshot, VERSION};

fuzz_target!(|bytes: &[u8]| {
    let _ = Snapshot::decode(bytes);

    let mut file = [&MAGIC[..], &VERSION.to_le_bytes(), &[0; 4], &(bytes.len() as u64).to_le_bytes(), bytes].concat();
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&file[..12]);
    checksum.update(&file[16..]);
    file[12..16].copy_from_slice(&checksum.finalize().to_le_bytes());
    if let Ok(snapshot) = Snapshot::decode(&file) {
        assert_eq!(snapshot.vcpus.len(), usize::from(snapshot.machine.vcpus));
        let written = snapshot.encode().expect("what was read can be written");
        assert!(Snapshot::decode(&written).is_ok());
    }
});
