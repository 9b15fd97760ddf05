//! Why a machine was not made, or did not do what it was asked.

use std::io;

use thiserror::Error;

use crate::{
    boot::BootError,
    bus::RangeError,
    config::ConfigError,
    devices::SerialError,
    events::EventsError,
    kvm::{KvmError, state::StateError},
    memory::MemoryError,
    snapshot::HostError,
    virtio::{ConsoleError, LoadError},
};

/// Why a machine was not made, or did not do what it was asked.
#[derive(Debug, Error)]
pub enum MachineError {
    /// An impossible size.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What a captured machine had for itself.
    #[error(transparent)]
    Own(#[from] memory::DeltaError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// What KVM holds of the guest.
    #[error(transparent)]
    State(#[from] StateError),
    /// A state from another machine or host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The kernel and what comes with it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The device thread.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The ports to the host.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Two devices in one place.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A device's state.
    #[error("the state of the device `{device}` cannot be loaded")]
    Device {
        /// Its name in the state file.
        device: &'static str,
        /// What is wrong with it.
        #[source]
        source: LoadError,
    },
    /// The devices are not those that were captured.
    #[error("the captured machine has the device `{0}` and this one has not, or the other way round")]
    OtherDevices(String),
    /// The host has no more of something.
    #[error("the host could not give the machine {what}")]
    Resources {
        /// Of what.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Memory or state was asked for while the guest could change it.
    #[error("the machine must be paused for that")]
    Running,
    /// A place that is not in the guest's memory.
    #[error("{bytes} bytes at offset {offset:#x} are not in one piece of guest memory")]
    Place {
        /// Offset in the memory file.
        offset: u64,
        /// Number of bytes.
        bytes: usize,
    },
}

impl MachineError {
    pub(super) fn resources(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Resources { what, source }
    }
}
