//! One machine: memory, vCPUs and devices together.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixListener},
};

/// What the devices of a machine are connected to on the host.
#[derive(Debug)]
pub struct DeviceFiles {
    /// `/dev/kvm`, opened by whoever started this process: in its jail there is no such path. `None` opens it here.
    pub kvm: Option<OwnedFd>,
    /// Root image; never written.
    pub root_image: File,
    /// Where the guest's ack lines go: written without blocking, one stream of bytes.
    pub ack: OwnedFd,
    /// Sockets of the control channels, at most 8, listening. Each serves one process at a time.
    pub channels: Vec<UnixListener>,
    /// Where the serial console's output goes. `None` drops it.
    pub console: Option<File>,
    /// Network interface (a tap with `IFF_VNET_HDR`), if the machine has one.
    pub tap: Option<OwnedFd>,
}

/// How a machine came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest asked for a reset.
    Reset,
    /// The guest failed beyond repair (triple fault).
    Shutdown,
    /// KVM or the guest did what the machine cannot handle.
    Failed(String),
}
