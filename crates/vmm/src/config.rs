//! What a machine is made of: what must be the same in a template and in all its forks.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::layout::PAGE_BYTES;

/// Most virtual CPUs a machine has.
pub const MAX_VCPUS: u8 = 8;
/// Least guest memory in bytes: below it there is no place for a kernel.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
/// Most guest memory in bytes (1 TiB): what every x86-64 processor with virtualisation can address.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;

/// Address of every machine's network card at its boot: locally administered. Copies know it from their template; what a fork is called
/// on its network is part of its identity, which its agent sets.
pub const NETWORK_MAC: [u8; 6] = [0x02, 0x6f, 0x66, 0x66, 0x73, 0x68];

/// Size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// Number of virtual CPUs, from 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
}

/// A size no machine can have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Memory.
    #[error("guest memory must be a multiple of 4 KiB from {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES} bytes, not {0}")]
    Memory(u64),
    /// Processors.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
}

impl MachineConfig {
    /// Refuses sizes no machine can have.
    ///
    /// # Errors
    /// [`ConfigError`] names the bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        let sized = (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes);
        if !sized || !self.memory_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(ConfigError::Memory(self.memory_bytes));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_possible_sizes_pass() {
        let good = MachineConfig { memory_bytes: 256 << 20, vcpus: 2 };
        assert_eq!(good.check(), Ok(()));
        for memory_bytes in [0, 4096, (256 << 20) + 1, MAX_MEMORY_BYTES + 4096] {
            assert_eq!(MachineConfig { memory_bytes, ..good }.check(), Err(ConfigError::Memory(memory_bytes)));
        }
        for vcpus in [0, 9, 255] {
            assert_eq!(MachineConfig { vcpus, ..good }.check(), Err(ConfigError::Vcpus(vcpus)));
        }
    }
}
