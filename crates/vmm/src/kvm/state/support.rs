//! What this host's KVM can save and load: asked once in a process, before the first guest, and used for every one.

use kvm_bindings::kvm_xsave;
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::{StateError, failed, msrs};

/// `KVM_CAP_SREGS2`, which `kvm_ioctls::Cap` does not have.
const SREGS2: std::ffi::c_ulong = kvm_bindings::KVM_CAP_SREGS2 as std::ffi::c_ulong;

/// What this host's KVM can save and load.
#[derive(Clone, Debug)]
pub struct Support {
    /// The optional parts it has.
    pub capabilities: Capabilities,
    /// Bytes of the extended processor state, at least the 4096 of `struct kvm_xsave`.
    pub xsave_bytes: usize,
    /// The model specific registers to save, in the order in which they are to be loaded.
    pub msrs: Vec<u32>,
}

/// Optional parts of KVM that a captured guest's state may depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `KVM_CAP_SREGS2`: page directory pointers of a 32-bit guest with physical address extension.
    pub sregs2: bool,
    /// `KVM_CAP_XSAVE2`: extended processor state beyond 4096 bytes.
    pub xsave2: bool,
    /// `KVM_CAP_TSC_CONTROL`: the time stamp counter at a rate that is not the host's.
    pub tsc_control: bool,
    /// `KVM_CAP_KVMCLOCK_CTRL`: telling the guest that it was stopped.
    pub kvmclock_ctrl: bool,
    /// `KVM_CAP_NESTED_STATE`: guests may be able to run guests.
    pub nested_state: bool,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`: local APIC timer in deadline mode.
    pub tsc_deadline: bool,
}

impl Support {
    /// Asks KVM. A few microseconds.
    ///
    /// # Errors
    /// [`StateError::Kvm`] if the list of registers cannot be read.
    pub fn probe(kvm: &Kvm) -> Result<Self, StateError> {
        let listed = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let xsave2 = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            capabilities: Capabilities {
                sregs2: kvm.check_extension_raw(SREGS2) > 0,
                xsave2: xsave2 > 0,
                tsc_control: kvm.check_extension(Cap::TscControl),
                kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
                nested_state: kvm.check_extension(Cap::NestedState),
                tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            },
            xsave_bytes: xsave2.max(size_of::<kvm_xsave>()),
            msrs: msrs::to_save(listed.as_slice()),
        })
    }
}
