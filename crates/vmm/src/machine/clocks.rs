//! The clocks of a machine that waits for its first run, or is paused.
//!
//! KVM's clocks run from the moment they are loaded, and while nobody runs. For the guest no time passes between its capture and
//! its first instruction here, nor while it is captured; and a spare machine may wait for minutes: so they are loaded once more
//! when it runs.

use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_clock_data, kvm_msr_entry};

use super::Prepared;
use crate::{kvm::run::VcpuThread, snapshot::Snapshot};

/// `IA32_TIME_STAMP_COUNTER`.
const TSC: u32 = 0x10;
/// Minutes away from everything, in counts.
const FAR_AWAY: u64 = 1 << 40;
/// A wait no guest notices: not worth the calls.
const SHORT: Duration = Duration::from_millis(20);

/// The clocks, as they were captured or found.
#[derive(Debug)]
pub(super) struct StoppedClocks {
    loaded: Instant,
    /// Of the machine, nanoseconds.
    clock: u64,
    /// Of each vCPU.
    counters: Vec<u64>,
}

impl StoppedClocks {
    /// Of a machine that has just been loaded.
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let counter = |msrs: &[kvm_msr_entry]| msrs.iter().find(|msr| msr.index == TSC).map(|msr| msr.data);
        Self {
            loaded: Instant::now(),
            clock: snapshot.vm.clock.clock,
            counters: snapshot.vcpus.iter().filter_map(|vcpu| counter(&vcpu.msrs)).collect(),
        }
    }

    /// Of a machine that has just been paused. `None` if KVM does not say: then the guest sees the time that it stood still.
    pub(super) fn read(prepared: &Prepared) -> Option<Self> {
        let counter = |vcpu: &VcpuThread| {
            let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: TSC, ..Default::default() }]).ok()?;
            (vcpu.vcpu().get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice().first().map(|msr| msr.data))?
        };
        // The clock first: nothing may go back.
        let clock = prepared.vm.fd().get_clock().ok()?.clock;
        let counters = prepared.vcpus.iter().map(counter).collect::<Option<_>>()?;
        Some(Self { loaded: Instant::now(), clock, counters })
    }

    /// Lets them run from where they were, if they have run for long. The machine must still be paused.
    ///
    /// Values that KVM took a moment ago it takes again; if it does not, the guest sees the time that it has waited.
    pub(super) fn restart(&self, prepared: &Prepared) {
        if self.loaded.elapsed() < SHORT {
            return;
        }
        // Counters before the clock, which is computed from them. The first is moved far away before: within a second of what KVM
        // expects it would be taken for an attempt to bring vCPUs in step, and forgotten. For the others that is what is wanted.
        let entry = |data| kvm_msr_entry { index: TSC, data, ..Default::default() };
        let mut before = self.counters.first().map(|counter| entry(counter.wrapping_add(FAR_AWAY)));
        for (vcpu, counter) in prepared.vcpus.iter().zip(&self.counters) {
            let entries: Vec<_> = before.take().into_iter().chain([entry(*counter)]).collect();
            if let Ok(msrs) = Msrs::from_entries(&entries) {
                let _ = vcpu.vcpu().set_msrs(&msrs);
            }
        }
        let _ = prepared.vm.fd().set_clock(&kvm_clock_data { clock: self.clock, ..Default::default() });
    }
}
