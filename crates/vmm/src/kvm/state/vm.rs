//! What all vCPUs share: the two PICs, the IOAPIC, the PIT and the KVM clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::{StateError, exact, failed};

/// The state of a machine beside its vCPUs, memory and devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// First PIC, second PIC, IOAPIC.
    #[serde(with = "exact")]
    pub irqchips: [kvm_irqchip; 3],
    /// The programmable interval timer.
    #[serde(with = "exact")]
    pub pit: kvm_pit_state2,
    /// The paravirtual clock in nanoseconds, with the flags the kernel gave and, where it gave them, its real time and time stamp.
    #[serde(with = "exact")]
    pub clock: kvm_clock_data,
}

impl VmState {
    /// Reads the chips of a machine whose vCPUs are stopped and saved already.
    ///
    /// # Errors
    /// [`StateError::Kvm`] with the call, for example because the machine has no irqchip or PIT in the kernel.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        // The clock first: every microsecond it is read later is one by which it runs ahead of the vCPUs' time stamp counters.
        let clock = vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        let mut irqchips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut irqchips {
            vm.get_irqchip(chip).map_err(failed("KVM_GET_IRQCHIP"))?;
        }
        let pit = vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
        Ok(Self { irqchips, pit, clock })
    }

    /// Puts the chips back, after every vCPU was loaded and before the first runs.
    ///
    /// # Errors
    /// [`StateError::Kvm`] with the call.
    pub fn load(&self, vm: &VmFd) -> Result<(), StateError> {
        // The IOAPIC delivers what is pending in it while it is loaded, so the local APICs must be complete: see the module's order.
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        // After the chips: a channel that counts starts here and may raise its interrupt at once.
        vm.set_pit2(&self.pit).map_err(failed("KVM_SET_PIT2"))?;
        // Last, and without any flag. KVM_CLOCK_REALTIME would add the time since the capture, hours or months, to the guest's monotonic
        // clock: its timers would all be due and its watchdogs bark. For the guest no time passed; its wall clock is set by its agent.
        // The other flags only report.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}
