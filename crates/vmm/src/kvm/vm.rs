//! The machine's object in the kernel: memory slots, interrupt controllers, timer.

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::KvmError;
use crate::{
    layout::{KVM_IDENTITY_MAP, KVM_TSS},
    memory::GuestMemory,
};

/// A machine without vCPUs. It keeps its memory mapped as long as it lives, and must outlive its vCPUs' threads.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    memory: GuestMemory,
}

impl Vm {
    /// Makes a machine with this memory, interrupt controllers and a timer.
    ///
    /// # Errors
    /// [`KvmError::Refused`].
    pub fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::refused("make a machine"))?;
        // The order is worth milliseconds: a memory slot that is set after the interrupt controllers exist waits for a
        // grace period of the kernel (7.5 ms to make the machine and 16 ms to close it, instead of 0.3 ms).
        for (slot, region) in (0_u32..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the range is a mapping of `memory`'s, which this struct keeps; the guest, the only one to use the slot,
            // runs no longer when it goes; slots do not overlap, as regions do not; and what the guest does there is done to
            // bytes that are only accessed volatile.
            unsafe { fd.set_user_memory_region(slot) }.map_err(KvmError::refused("take guest memory"))?;
        }
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(KvmError::refused("place its identity map"))?;
        fd.set_tss_address(KVM_TSS).map_err(KvmError::refused("place its TSS"))?;
        fd.create_irq_chip().map_err(KvmError::refused("make interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(KvmError::refused("make a timer"))?;
        Ok(Self { fd: Arc::new(fd), memory })
    }

    /// The machine's object.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The machine's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}
