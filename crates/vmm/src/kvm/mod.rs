//! What is KVM's own: the virtual machine, its vCPUs, and their state.

pub mod state;
