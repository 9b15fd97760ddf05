//! One vCPU.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{SpecialRegisters, StateError, Support, exact, failed, msrs, slice, xsave};

/// How far two rates of the time stamp counter may differ and still be called the same, in millionths: the kernel's own
/// (`tsc_tolerance_ppm`), for a rate measured at boot differs a little from boot to boot.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Most model specific registers of one vCPU in a state file; KVM lists fewer than 300.
const MAX_MSRS: usize = 1024;
/// Most bytes of extended processor state in a state file; with AMX, the largest there is, it has 11 KiB.
const MAX_XSAVE_BYTES: usize = 64 << 10;

/// The debug registers of a vCPU as KVM makes it, and of a guest that debugs nothing: not worth a call of their own.
const DEBUG_WHEN_NEW: kvm_debugregs =
    kvm_debugregs { db: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400, flags: 0, reserved: [0; 9] };

/// Everything KVM holds of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest was told about its processor.
    #[serde(with = "slice")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Rate of the time stamp counter in kHz; 0 where KVM does not say.
    pub tsc_khz: u32,
    /// Running, halted, waiting for start-up.
    #[serde(with = "exact")]
    pub mp_state: kvm_mp_state,
    /// General registers.
    #[serde(with = "exact")]
    pub regs: kvm_regs,
    /// Segments, tables, control registers.
    #[serde(with = "exact")]
    pub sregs: SpecialRegisters,
    /// The XSAVE area, of the capturing host's size.
    #[serde(with = "slice")]
    pub xsave: Vec<u8>,
    /// Extended control registers.
    #[serde(with = "exact")]
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    #[serde(with = "exact")]
    pub debug: kvm_debugregs,
    /// The local APIC's registers.
    #[serde(with = "exact")]
    pub lapic: kvm_lapic_state,
    /// Model specific registers in the order in which they are loaded.
    #[serde(with = "slice")]
    pub msrs: Vec<kvm_msr_entry>,
    /// Exceptions, interrupts and NMIs on their way.
    #[serde(with = "exact")]
    pub events: kvm_vcpu_events,
}

/// Finishes the last exit of a vCPU without running guest code. After an exit for port or memory I/O, KVM completes the instruction
/// at the next `KVM_RUN` only: a capture before that has a half-done instruction in it, which is done twice or never after a restore.
///
/// # Errors
/// [`StateError::Unsettled`] if the vCPU stops for another exit (the second half of a page-crossing access): handle that and call again.
pub fn settle(vcpu: &mut VcpuFd) -> Result<(), StateError> {
    vcpu.set_kvm_immediate_exit(1);
    let result = match vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        Err(error) => Err(failed("KVM_RUN")(error)),
        Ok(exit) => Err(StateError::Unsettled(format!("{exit:?}"))),
    };
    vcpu.set_kvm_immediate_exit(0);
    result
}

impl VcpuState {
    /// Reads a vCPU that is stopped, [settled](settle), and not run again until its machine's capture is complete.
    ///
    /// # Errors
    /// [`StateError::Kvm`] with the call; [`StateError::Nested`] if the guest uses hardware virtualization itself.
    pub fn save(vcpu: &VcpuFd, support: &Support) -> Result<Self, StateError> {
        // First: reading it makes KVM take in start-up signals that wait, which changes registers, local APIC and events.
        let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        if support.capabilities.nested_state {
            refuse_nested(vcpu)?;
        }
        Ok(Self {
            mp_state,
            // Early, before anything that takes time: they contain the time stamp counter, from which the timers below count.
            msrs: msrs::save(vcpu, &support.msrs)?,
            lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: SpecialRegisters::save(vcpu, support.capabilities.sregs2)?,
            xsave: xsave::save(vcpu, support)?,
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            // Last: the calls above may turn what waits into an event.
            events: vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts everything into a new vCPU, whose machine has its memory and its irqchip.
    ///
    /// # Errors
    /// [`StateError`], after which the vCPU is unusable.
    pub fn load(&self, vcpu: &VcpuFd, support: &Support) -> Result<(), StateError> {
        self.prepare(vcpu, support)?;
        self.load_prepared(vcpu, support)
    }

    /// The first half of [`load`](Self::load): what no time or identity depends on, and what takes longest where the host is a virtual
    /// machine itself. A machine that is started ahead of its fork, for a template that is known, can have it done by then.
    ///
    /// # Errors
    /// [`StateError`], after which the vCPU is unusable.
    pub fn prepare(&self, vcpu: &VcpuFd, support: &Support) -> Result<(), StateError> {
        // First: from it KVM decides which values are valid everywhere below.
        vcpu.set_cpuid2(&self.cpuid()?).map_err(failed("KVM_SET_CPUID2"))?;
        // Before the time stamp counter among the MSRs, which is stored in counts of this rate.
        self.load_tsc_rate(vcpu, support)
    }

    /// The second half of [`load`](Self::load), for a new vCPU that was [prepared](Self::prepare) with the same state.
    ///
    /// # Errors
    /// [`StateError`], after which the vCPU is unusable.
    pub fn load_prepared(&self, vcpu: &VcpuFd, support: &Support) -> Result<(), StateError> {
        // Before the local APIC: contains its place and whether it is in x2APIC mode, which decides the layout of its registers.
        self.sregs.load(vcpu, support.capabilities.sregs2)?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        xsave::load(vcpu, &self.xsave, support)?;
        // A processor without XSAVE has none, and KVM refuses even an empty list.
        if self.xcrs.nr_xcrs != 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        if self.debug != DEBUG_WHEN_NEW {
            vcpu.set_debug_regs(&self.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        }
        // Before the MSRs: they contain the deadline of its timer, which counts only once the local APIC is in that mode.
        vcpu.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        msrs::load(vcpu, &self.msrs, self.sregs.is_first())?;
        // After the special registers: those of a processor just reset make KVM start it.
        vcpu.set_mp_state(self.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        // After everything that may raise or drop an event.
        vcpu.set_vcpu_events(&self.events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        if support.capabilities.kvmclock_ctrl && msrs::has_clock(&self.msrs) {
            // Tells the guest that it stood still, so that its lockup detectors stay calm.
            // A guest that gave up its clock has nothing to be told, which the kernel reports as an error.
            let _ = vcpu.kvmclock_ctrl();
        }
        Ok(())
    }

    /// Bounds that hold for every vCPU, of any host.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        if self.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
            return Err("a vCPU has too many CPUID entries");
        }
        if self.msrs.len() > MAX_MSRS {
            return Err("a vCPU has too many model specific registers");
        }
        if !(size_of::<kvm_xsave>()..=MAX_XSAVE_BYTES).contains(&self.xsave.len()) {
            return Err("a vCPU's extended processor state has an impossible length");
        }
        Ok(())
    }

    fn cpuid(&self) -> Result<CpuId, StateError> {
        let too_many =
            |_| StateError::TooMany { what: "CPUID entries", found: self.cpuid.len(), limit: KVM_MAX_CPUID_ENTRIES };
        CpuId::from_entries(&self.cpuid).map_err(too_many)
    }

    fn load_tsc_rate(&self, vcpu: &VcpuFd, support: &Support) -> Result<(), StateError> {
        let host = vcpu.get_tsc_khz().unwrap_or(0);
        let difference = u64::from(self.tsc_khz.abs_diff(host));
        if self.tsc_khz == 0 || host == 0 || difference * 1_000_000 <= u64::from(host) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if !support.capabilities.tsc_control {
            return Err(StateError::TscRate { state: self.tsc_khz, host });
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(failed("KVM_SET_TSC_KHZ"))
    }
}

/// A guest that has switched on VMX or runs in SVM guest mode has state that is not saved here. Guests are not offered either.
fn refuse_nested(vcpu: &VcpuFd) -> Result<(), StateError> {
    let mut nested = KvmNestedStateBuffer::empty();
    match vcpu.nested_state(&mut nested).map_err(failed("KVM_GET_NESTED_STATE"))? {
        Some(_) => Err(StateError::Nested),
        None => Ok(()),
    }
}
