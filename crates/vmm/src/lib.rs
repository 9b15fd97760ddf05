//! The embedded KVM virtual machine monitor: what boots, captures and restores one guest, in one process.

pub mod boot;
pub mod bus;
pub mod config;
pub mod devices;
pub mod ending;
pub mod events;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod prefetch;
pub mod snapshot;
pub mod virtio;
pub mod worker;
