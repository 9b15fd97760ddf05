//! A captured machine without its memory: the state file of a template.
//!
//! # The file
//! ```text
//! offset  bytes
//!      0      8  magic, "offs-vm\n"
//!      8      4  format version, now 1
//!     12      4  checksum: CRC-32 of all bytes before it and all bytes after it
//!     16      8  length of the payload
//!     24      …  payload: [`Snapshot`] in the encoding of the crate `postcard`; nothing follows
//! ```
//! Numbers are little endian. Magic and version keep their places in every later version. The kernel's structures stand in it with all
//! their bytes; one that is shorter or longer is refused. The checksum finds damage; who made the file is known from the template's manifest.

mod error;
mod format;
mod host;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use error::{HostError, SnapshotError};
pub use format::{MAGIC, MAX_BYTES, MAX_DEVICE_BYTES, MAX_DEVICE_NAME, MAX_DEVICES, VERSION};
pub use host::HostCpu;

use crate::{
    config::MachineConfig,
    kvm::state::{VcpuState, VmState},
};

/// Everything of a captured machine but its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The machine's size.
    pub machine: MachineConfig,
    /// The processor and KVM it was captured on.
    pub host: HostCpu,
    /// Interrupt controllers, timer and clock.
    pub vm: VmState,
    /// One for each vCPU, in the order of their numbers.
    #[serde(deserialize_with = "format::vcpus")]
    pub vcpus: Vec<VcpuState>,
    /// What each device wrote about itself, by the device's name. Only the device knows the form, and must check it.
    #[serde(deserialize_with = "format::devices", serialize_with = "format::write_devices")]
    pub devices: BTreeMap<String, Vec<u8>>,
}
