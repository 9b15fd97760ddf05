//! What a worker is started with: one argument, a JSON document that names the descriptors it inherits.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::MachineConfig;

/// What the process is for; it decides with whom it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Builds a template: writes its memory file, and ends with the thread that started it and with its connection.
    Template,
    /// A fork: until it runs, it ends with the connection of whoever started it.
    Fork,
    /// A fork for later: it waits for whoever takes it over.
    Spare,
}

/// How the guest begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// From a kernel.
    Boot {
        /// The kernel image.
        kernel: RawFd,
        /// The initramfs.
        initramfs: Option<RawFd>,
        /// The kernel's command line.
        command_line: String,
        /// What the serial console's output is written to.
        console: RawFd,
    },
    /// From a captured state.
    Restore {
        /// The state file.
        state: RawFd,
        /// The list of pages to have ready ([`crate::prefetch`]).
        pages: Option<RawFd>,
        /// What the captured machine had for itself above the memory file.
        own: Option<Own>,
    },
}

/// The pages that a captured fork had for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// The file ([`memory::delta`]).
    pub file: RawFd,
    /// The id of the template, which the file must name.
    pub template: String,
}

/// What the machine's network card is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Nothing.
    Unconnected,
    /// A tap: each read and each write is one frame.
    Tap(RawFd),
    /// A stream socket: each frame has its length before it, 4 bytes, big endian.
    Stream(RawFd),
}

/// Everything a worker is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// What for.
    pub purpose: Purpose,
    /// User and group to change to; needs root.
    pub user: Option<(u32, u32)>,
    /// Whether to take on namespaces of its own; needs root.
    pub namespaces: bool,
    /// Memory and vCPUs; a captured state must have the same.
    pub machine: MachineConfig,
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// The listening control socket.
    pub control: RawFd,
    /// The memory file: open for writing for a template, for reading only for a fork.
    pub memory: RawFd,
    /// The root image, open for reading only.
    pub root_image: RawFd,
    /// Where ack lines go.
    pub ack: RawFd,
    /// Listening sockets of the control channels.
    pub channels: Vec<RawFd>,
    /// The network card, if the machine has one; a captured state must have the same.
    pub network: Option<Network>,
    /// Only to be kept open.
    pub held: Vec<RawFd>,
    /// How the guest begins.
    pub start: Start,
}

/// Why a worker can not use what it was started with.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// Not our document.
    #[error("the launch document can not be read: {0}")]
    Document(#[from] serde_json::Error),
    /// A descriptor that is none, or that is named twice.
    #[error("descriptor {number} can not be used")]
    Descriptor {
        /// The descriptor.
        number: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Launch {
    /// Reads the document.
    ///
    /// # Errors
    /// [`LaunchError::Document`].
    pub fn parse(text: &str) -> Result<Self, LaunchError> {
        Ok(serde_json::from_str(text)?)
    }

    /// Every descriptor that it names.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut all = vec![self.kvm, self.control, self.memory, self.root_image, self.ack];
        all.extend(&self.channels);
        all.extend(&self.held);
        match self.network {
            None | Some(Network::Unconnected) => {}
            Some(Network::Tap(number) | Network::Stream(number)) => all.push(number),
        }
        match &self.start {
            Start::Boot { kernel, initramfs, console, .. } => {
                all.extend([*kernel, *console]);
                all.extend(initramfs);
            }
            Start::Restore { state, pages, own } => {
                all.push(*state);
                all.extend(pages);
                all.extend(own.as_ref().map(|own| own.file));
            }
        }
        all
    }

    /// Checks the descriptors, and closes every other one above standard error.
    ///
    /// # Errors
    /// [`LaunchError::Descriptor`] for one that is not open, is a standard stream, or is named twice.
    pub(super) fn close_others(&self) -> Result<(), LaunchError> {
        let mut own = BTreeSet::new();
        for number in self.descriptors() {
            let refused = |source| LaunchError::Descriptor { number, source };
            if number <= 2 || !own.insert(number) {
                return Err(refused(io::ErrorKind::InvalidInput.into()));
            }
            // SAFETY: only used for this call, which fails for a number that is no open descriptor.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            fcntl_getfd(fd).and_then(|_| fcntl_setfd(fd, FdFlags::CLOEXEC)).map_err(|error| refused(error.into()))?;
        }
        let mut next = 3;
        for number in own.into_iter().chain([RawFd::MAX]) {
            close_range(next, number - 1).map_err(|source| LaunchError::Descriptor { number: next, source })?;
            next = number.saturating_add(1);
        }
        Ok(())
    }
}

fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    let (first, last) = (first.cast_unsigned(), last.cast_unsigned());
    // SAFETY: called before any value of this process owns a descriptor above standard error.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Takes a descriptor that [`Launch::close_others`] has checked.
///
/// # Safety
/// It must be taken once only.
pub(super) unsafe fn take(number: RawFd) -> OwnedFd {
    // SAFETY: it is open (checked), and by the caller's word nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_card_is_connected_to_is_inherited_like_the_rest() {
        let mut launch = Launch {
            purpose: Purpose::Fork,
            user: None,
            namespaces: false,
            machine: MachineConfig { memory_bytes: 4 << 20, vcpus: 1 },
            kvm: 3,
            control: 4,
            memory: 5,
            root_image: 6,
            ack: 7,
            channels: vec![8],
            network: None,
            held: vec![9],
            start: Start::Restore { state: 10, pages: None, own: Some(Own { file: 11, template: "t".into() }) },
        };
        let others = launch.descriptors();
        assert!(others.contains(&11) && !others.contains(&20));
        for (network, inherited) in
            [(Network::Unconnected, false), (Network::Tap(20), true), (Network::Stream(20), true)]
        {
            launch.network = Some(network);
            assert_eq!(launch.descriptors().contains(&20), inherited, "{network:?}");
            assert_eq!(launch.descriptors().len(), others.len() + usize::from(inherited));
            assert_eq!(Launch::parse(&serde_json::to_string(&launch).unwrap()).unwrap(), launch);
        }
    }
}
