//! The verbs: build, fork, verify, kill, clean up; state on disk; recovery.
//!
//! Everything the command line (and any daemon) does is here. The truth is on disk: any process can pick up where another
//! stopped.
#![forbid(unsafe_code)]

pub mod acks;
pub mod audit;
pub mod bench;
pub mod branch;
pub mod build;
pub mod cleanup;
pub mod codes;
pub mod confine;
pub mod devtools;
pub mod doctor;
pub mod engines;
pub mod fault;
pub mod fork;
pub mod forks;
pub mod guest;
pub mod handoff;
pub mod home;
pub mod image;
pub mod limits;
mod machines;
pub mod network;
mod operation;
mod pages;
pub mod pool;
pub mod progress;
pub mod recipe;
pub mod record;
pub mod rehearsal;
pub mod request;
#[cfg(test)]
mod rig;
pub mod snapshot;
pub mod source;
pub mod standby;
pub mod standing;
pub mod stop;
pub mod verify;

pub use home::Home;
pub use network::NetworkRequest;
pub use record::ForkRecord;
pub use request::{ForkRequest, LimitRequest, MailboxRequest};
