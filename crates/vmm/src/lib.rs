//! The embedded KVM virtual machine monitor: what boots, captures and restores one guest, in one process.
