//! Why a link could not be made, changed or removed; and which right is missing for it.

use std::{fs, io, path::PathBuf};

use identity::ForkId;
use thiserror::Error;

use crate::{
    lease::LeaseError,
    policy::{PolicyError, Protocol},
};

/// Why a fork's link could not be made, opened or removed.
#[derive(Debug, Error)]
pub enum LinkError {
    /// A right is missing.
    #[error("{doing} needs {capability}: run as root or with that capability, or choose a network that needs none")]
    Denied {
        /// What was done.
        doing: &'static str,
        /// The capability, e.g. `CAP_NET_ADMIN`.
        capability: &'static str,
        /// The kernel's refusal; none if it was not asked.
        #[source]
        source: Option<io::Error>,
    },
    /// No address.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A policy that can not be.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Only an open link can do that.
    #[error("the network link of fork {0} is closed")]
    Closed(ForkId),
    /// The fork has a link already.
    #[error("fork {0} has a network link already")]
    Exists(ForkId),
    /// There is no record of it.
    #[error("fork {0} has no network link")]
    Absent(ForkId),
    /// Somebody else makes or changes it right now.
    #[error("the network link of fork {0} is in work by another process")]
    Busy(ForkId),
    /// A port of the host is not free.
    #[error("the port {port}/{protocol} of the host is taken by {by}; forward another one")]
    PortTaken {
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
        /// Who has it, for people.
        by: String,
    },
    /// All 65535 numbers for named nets are in use.
    #[error("there are too many named nets; end forks of those that are not needed")]
    TooManyNets,
    /// The kernel refused a step, or a file could not be used.
    #[error("{doing} for the network of a fork failed")]
    Step {
        /// What was done.
        doing: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file of the state directory can not be used.
    #[error("{doing} {path}")]
    File {
        /// What was done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// For an error of the step `doing`.
pub(crate) fn step(doing: &'static str) -> impl FnOnce(io::Error) -> LinkError {
    move |source| match source.kind() {
        // Namespaces and mounts ask for the wider right, all else for the narrower.
        io::ErrorKind::PermissionDenied => {
            let capability =
                missing_capability().unwrap_or("CAP_SYS_ADMIN and CAP_NET_ADMIN in the host's user namespace");
            LinkError::Denied { doing, capability, source: Some(source) }
        }
        _ => LinkError::Step { doing, source },
    }
}

/// Only so that `namespace` can say that no thread was to be had.
impl From<io::Error> for LinkError {
    fn from(source: io::Error) -> Self {
        step("entering a network namespace")(source)
    }
}

/// The capability that a link needs and this thread does not have; `None` if it has all.
///
/// `CAP_SYS_ADMIN` makes, mounts and enters namespaces, `CAP_NET_ADMIN` makes links and rules.
#[must_use]
pub fn missing_capability() -> Option<&'static str> {
    // include/uapi/linux/capability.h
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(effective.trim(), 16).ok()?;
    [(SYS_ADMIN, "CAP_SYS_ADMIN"), (NET_ADMIN, "CAP_NET_ADMIN")]
        .into_iter()
        .find(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| name)
}
