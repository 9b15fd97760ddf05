//! The worker: one jailed process that runs one guest.
//!
//! ```text
//! host                                          worker (`offshoot-vmm`)
//! opens every file and socket, starts it ─────► closes what is not its own
//!                                               jail: namespaces, user, limits, no capabilities, system calls
//!                                               only then: reads kernel or state, maps the memory, loads
//! status ─────────────────────────────────────► loaded, never run
//! read, deliver (fork: before its first run) ─► its own private mapping
//! resume (once) ──────────────────────────────► runs
//! ```
//!
//! Every thread of the process (device thread, vCPUs) calls [`seccomp::enter`] with its role before it does anything else;
//! outside of a worker that does nothing. In the jail nothing can be opened by path, `/dev/kvm` included: it is inherited
//! ([`crate::machine::DeviceFiles::kvm`]).

mod jail;
pub mod launch;
mod load;
pub mod protocol;
mod run;
pub mod seccomp;
mod server;

/// Version of this program.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");

pub use load::load;
pub use run::{Loading, Source, main};
pub use server::{End, Guest, ServeError, Server};
