//! Pages that a fork has before it runs.

use vm_memory::GuestAddress;

use super::MachineError;
use crate::{
    kvm::{prefault, run::VcpuThread, touch},
    memory::{self, GuestMemory},
    prefetch::{PageList, Use},
};

/// What a fork is to have ready.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ready {
    /// The pages that it will touch.
    pub pages: PageList,
    /// Whether nobody waits for it yet: then the pages that it will only read are worth the time, too.
    pub ahead: bool,
}

impl Ready {
    /// Copies the pages that will be written, and makes known to the processor what can be, for a machine whose memory is mapped
    /// and whose vCPUs have their features and nothing else yet. Pages that are not there are left out.
    pub(super) fn make(&self, memory: &GuestMemory, vcpus: &[VcpuThread]) -> Result<(), MachineError> {
        let size = memory::size(memory);
        let inside = |what| {
            self.pages.parts(what).filter_map(move |part| {
                let bytes = part.end.min(size).checked_sub(part.start).filter(|bytes| *bytes > 0)?;
                Some((part.start, bytes))
            })
        };
        for (offset, bytes) in inside(Use::Copied) {
            memory::populate(memory, offset, bytes);
        }
        // Only now: a page that is not the machine's own would be made known for reading only. One vCPU for all: their page tables
        // are the same.
        let Some(first) = vcpus.first() else { return Ok(()) };
        let places =
            |what| inside(what).filter_map(|(offset, bytes)| Some((memory::address_of(offset, bytes)?, bytes)));
        let wanted: Vec<(GuestAddress, u64)> = if self.ahead {
            places(Use::Copied).chain(places(Use::Read)).collect()
        } else {
            places(Use::Copied).collect()
        };
        let entered = {
            let vcpu = first.vcpu();
            wanted.iter().all(|(at, bytes)| prefault::enter(&vcpu, *at, *bytes))
        };
        if !entered && self.ahead {
            touch::run(first, memory, &touch::rounds(wanted.into_iter()))?;
        }
        Ok(())
    }
}
