//! The processor and the KVM a guest was captured on, and whether it can go on here.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::{HostError, Snapshot, SnapshotError};
use crate::{
    config::MachineConfig,
    kvm::state::{Capabilities, StateError, Support, slice},
};

/// A host, as far as a captured guest depends on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostCpu {
    /// The twelve letters of the processor's maker.
    pub vendor: [u8; 12],
    /// Family, model and stepping, as leaf 1 of CPUID has them.
    pub signature: u32,
    /// Optional parts of KVM.
    pub capabilities: Capabilities,
    /// Bytes of the extended processor state.
    pub xsave_bytes: u32,
    /// The leaves of CPUID that say what features KVM gives its guests.
    #[serde(with = "slice")]
    pub features: Vec<kvm_cpuid_entry2>,
}

/// A leaf of CPUID with, for eax, ebx, ecx and edx, the bits that are features of the processor or of KVM. Left out are those that
/// follow from a guest's own settings (OSXSAVE, OSPKE), that are the monitor's to give (hypervisor, TSC deadline timer) and numbers.
const FEATURE_LEAVES: [(u32, u32, [u32; 4]); 11] = [
    (0x1, 0, [0, 0, !(1 << 31 | 1 << 27 | 1 << 24 | 1 << 3), !0]),
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0x7, 1, [!0, !0, !0, !0]),
    (0x7, 2, [0, 0, 0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
    (0x8000_000a, 0, [0, 0, 0, !0]),
    (0x8000_0021, 0, [!0, 0, 0, 0]),
];

impl HostCpu {
    /// Asks KVM. Where the host is a virtual machine itself this takes up to a millisecond (each CPUID is an exit): once in a
    /// process, before it is given a guest.
    ///
    /// # Errors
    /// [`StateError::Kvm`].
    pub fn probe(kvm: &Kvm, support: &Support) -> Result<Self, StateError> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| StateError::Kvm { call: "KVM_GET_SUPPORTED_CPUID", source })?;
        Ok(Self::from_cpuid(cpuid.as_slice(), support))
    }

    /// From the leaves KVM supports, for those who have asked already.
    #[must_use]
    pub fn from_cpuid(cpuid: &[kvm_cpuid_entry2], support: &Support) -> Self {
        let leaf =
            |function, index| cpuid.iter().find(|entry| entry.function == function && entry.index == index).copied();
        let maker = leaf(0, 0).unwrap_or_default();
        let mut vendor = [0; 12];
        for (letters, register) in vendor.chunks_exact_mut(4).zip([maker.ebx, maker.edx, maker.ecx]) {
            letters.copy_from_slice(&register.to_le_bytes());
        }
        Self {
            vendor,
            signature: leaf(1, 0).unwrap_or_default().eax,
            capabilities: support.capabilities,
            xsave_bytes: u32::try_from(support.xsave_bytes).unwrap_or(u32::MAX),
            features: FEATURE_LEAVES.iter().filter_map(|(function, index, _)| leaf(*function, *index)).collect(),
        }
    }

    /// Family and model without the stepping: steppings differ in errata, which microcode levels out.
    fn model(&self) -> (u32, u32) {
        let family = (self.signature >> 8) & 0xf;
        let model = (self.signature >> 4) & 0xf;
        let extended = |family: u32| family == 0xf || family == 6;
        (
            if family == 0xf { family + ((self.signature >> 20) & 0xff) } else { family },
            if extended(family) { model + (((self.signature >> 16) & 0xf) << 4) } else { model },
        )
    }

    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        match self.features.len() > FEATURE_LEAVES.len() {
            true => Err(SnapshotError::Content("it has too many processor features")),
            false => Ok(()),
        }
    }
}

impl Snapshot {
    /// Whether the guest can go on on `host`: same maker and model of processor, and everything it was told of or its state needs.
    ///
    /// # Errors
    /// [`HostError`] names the first thing that is missing.
    pub fn check_host(&self, host: &HostCpu, support: &Support) -> Result<(), HostError> {
        if self.host.vendor != host.vendor {
            let name = |vendor: [u8; 12]| vendor.escape_ascii().to_string();
            return Err(HostError::Vendor { state: name(self.host.vendor), host: name(host.vendor) });
        }
        if self.host.model() != host.model() {
            let name = |(family, model): (u32, u32)| format!("{family}/{model}");
            return Err(HostError::Model { state: name(self.host.model()), host: name(host.model()) });
        }
        for vcpu in &self.vcpus {
            check_features(&vcpu.cpuid, &self.host.features, &host.features)?;
            if vcpu.sregs.has_page_directory_pointers() && !support.capabilities.sregs2 {
                return Err(HostError::Capability("KVM_CAP_SREGS2"));
            }
            if vcpu.xsave.len() > support.xsave_bytes {
                return Err(HostError::Xsave { state: vcpu.xsave.len(), host: support.xsave_bytes });
            }
            if let Some(unknown) = vcpu.msrs.iter().find(|msr| !support.msrs.contains(&msr.index)) {
                return Err(HostError::Msr(unknown.index));
            }
        }
        if self.host.capabilities.tsc_deadline && !support.capabilities.tsc_deadline {
            return Err(HostError::Capability("KVM_CAP_TSC_DEADLINE_TIMER"));
        }
        Ok(())
    }

    /// Whether this is the state of a machine of the given size.
    ///
    /// # Errors
    /// [`HostError::Memory`], [`HostError::Vcpus`].
    pub fn check_machine(&self, given: &MachineConfig) -> Result<(), HostError> {
        if self.machine.memory_bytes != given.memory_bytes {
            return Err(HostError::Memory { state: self.machine.memory_bytes, given: given.memory_bytes });
        }
        if self.machine.vcpus != given.vcpus {
            return Err(HostError::Vcpus { state: self.machine.vcpus, given: given.vcpus });
        }
        Ok(())
    }
}

/// Whether every feature that the guest was told of, and that the host it was made on gave, is given here too. (A monitor may tell of
/// features that KVM does not list as its own, and some KVMs show guests the whole of the processor: of those nothing can be asked.)
fn check_features(
    told: &[kvm_cpuid_entry2],
    there: &[kvm_cpuid_entry2],
    here: &[kvm_cpuid_entry2],
) -> Result<(), HostError> {
    for (function, index, masks) in FEATURE_LEAVES {
        let find = |leaves: &[kvm_cpuid_entry2]| {
            let entry = leaves.iter().find(|entry| entry.function == function && entry.index == index);
            entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
        };
        let (told, there, here) = (find(told), find(there), find(here));
        for (register, name) in ["eax", "ebx", "ecx", "edx"].into_iter().enumerate() {
            let missing = told[register] & there[register] & !here[register] & masks[register];
            if missing != 0 {
                return Err(HostError::Features { function, index, register: name, missing });
            }
        }
    }
    Ok(())
}
