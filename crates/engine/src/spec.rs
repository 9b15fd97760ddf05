//! What a machine is made of.

use std::{
    fmt,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::EngineError;

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// QEMU from the distribution.
    Qemu,
    /// Our own virtual machine monitor on KVM.
    Kvm,
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Qemu => "qemu",
            Self::Kvm => "kvm",
        })
    }
}

/// What executes the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// An engine's name, version and acceleration; a template remembers what made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineInfo {
    /// Which engine.
    pub name: EngineName,
    /// Its version, e.g. `7.2.22`.
    pub version: String,
    /// What executes the guest.
    pub accel: Accel,
}

/// What an engine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Mailboxes: it can write a fork's private memory before the fork runs.
    pub patch_memory: bool,
    /// The memory of forks is shared copy-on-write with their template.
    pub copy_on_write: bool,
    /// It opens a template's memory file for reading only. Where not, it keeps a writable descriptor it does not need.
    pub read_only_template: bool,
    /// Its spare machines can [rehearse](crate::SpareVm::rehearse).
    pub rehearse: bool,
}

/// The part of a machine that a template and its forks must have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Whether it has a network card. Machines of older templates have none. Without offloads Linux gives it buffers for frames of up to 1514
    /// bytes: the MTU of what it is connected to is at most 1500.
    #[serde(default)]
    pub network: bool,
}

/// What a fork's network card is connected to. Without one, what the guest sends is lost.
#[derive(Debug, Clone, Copy)]
pub enum NetworkEnd<'a> {
    /// A tap (`IFF_TAP | IFF_NO_PI`, without virtio headers): each read and each write is one frame.
    Tap(BorrowedFd<'a>),
    /// A stream socket: each frame has its length before it, 4 bytes, big endian (what QEMU's `-netdev socket` and passt speak).
    Stream(BorrowedFd<'a>),
}

/// With what rights the machine's process runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Confinement<'a> {
    /// User and group to change to before the program starts (needs root); `None` keeps the caller's.
    pub user: Option<(u32, u32)>,
    /// Whether to put it into network, IPC and UTS namespaces of its own (needs root).
    pub namespaces: bool,
    /// Files named `cgroup.procs` (opened for writing) that it enters before the program starts.
    pub cgroups: &'a [BorrowedFd<'a>],
}

/// How to boot a template.
#[derive(Debug)]
pub struct BootSpec<'a> {
    /// The machine's own directory: the caller's rights make sockets and logs in it, and it is the process' working directory.
    pub dir: &'a Path,
    /// Memory and CPUs.
    pub machine: Machine,
    /// The kernel image.
    pub kernel: &'a Path,
    /// The initramfs that holds the agent.
    pub initramfs: &'a Path,
    /// The root image, ext4, opened for reading only.
    pub root_image: &'a Path,
    /// The memory file to make; it becomes the template's memory.
    pub memory_file: &'a Path,
    /// Rights of the process.
    pub confinement: Confinement<'a>,
}

/// A fork to take hold of.
#[derive(Debug)]
pub struct HoldSpec<'a> {
    /// The machine's own directory.
    pub dir: &'a Path,
    /// Memory and CPUs, as the template has them.
    pub machine: Machine,
    /// The template's memory, of which the fork has a private mapping.
    pub memory_file: &'a Path,
}

/// How to restore a fork.
#[derive(Debug)]
pub struct RestoreSpec<'a> {
    /// The machine's own directory: the caller's rights make sockets and logs in it, and it is the process' working directory.
    pub dir: &'a Path,
    /// Memory and CPUs, as the template has them.
    pub machine: Machine,
    /// The root image, opened for reading only.
    pub root_image: &'a Path,
    /// The template's memory; mapped privately.
    pub memory_file: &'a Path,
    /// The device state: the template's, or that of a captured fork.
    pub state_file: &'a Path,
    /// The pages that a captured fork had for itself, to be put above the template's memory, and the template's id, which the
    /// file must name. `None` for a fork of the template.
    pub delta: Option<(&'a Path, &'a str)>,
    /// What [`Engine::pages_to_have_ready`](crate::Engine::pages_to_have_ready) said of an earlier fork of the template, if
    /// such a file is there.
    pub pages_file: Option<&'a Path>,
    /// What its network card is connected to. Only for a machine that has one.
    pub network: Option<NetworkEnd<'a>>,
    /// Rights of the process.
    pub confinement: Confinement<'a>,
}

impl<'a> RestoreSpec<'a> {
    /// What the card is connected to.
    ///
    /// # Errors
    /// [`EngineError::Refused`] for an end without a card.
    pub(crate) fn network_end(&self) -> Result<Option<NetworkEnd<'a>>, EngineError> {
        if self.network.is_some() && !self.machine.network {
            return Err(EngineError::Refused {
                during: "connecting the network card",
                reason: "the template was built without one".into(),
            });
        }
        Ok(self.network)
    }
}

impl AsRawFd for NetworkEnd<'_> {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tap(fd) | Self::Stream(fd) => fd.as_raw_fd(),
        }
    }
}
