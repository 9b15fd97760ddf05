//! Interrupts from devices to the guest.

use std::{
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_ioctls::VmFd;

/// An interrupt line of one device.
pub trait Interrupt: Send + Sync + Debug {
    /// Raises one edge. May be called from any thread.
    fn trigger(&self);
}

/// A pin of the in-kernel IOAPIC, edge triggered.
///
/// Plain `KVM_IRQ_LINE` and no irqfd: the end of every irqfd waits for a grace period of the kernel, one after the
/// other, and a fork that ends should not take milliseconds for it.
pub struct GsiLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Up and down are one step. Between the two of another thread an edge would be lost.
    edge: Mutex<()>,
}

impl Debug for GsiLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GsiLine").field("gsi", &self.gsi).finish_non_exhaustive()
    }
}

impl GsiLine {
    /// The line with this number (0 to 23).
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi, edge: Mutex::new(()) }
    }
}

impl Interrupt for GsiLine {
    fn trigger(&self) {
        let _edge = self.edge.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails only for numbers that are no pins and for machines that have no irqchip, and then there is no one to tell.
        let _ = self.vm.set_irq_line(self.gsi, true);
        let _ = self.vm.set_irq_line(self.gsi, false);
    }
}
