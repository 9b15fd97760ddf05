//! The router: HTTP and WebSocket for `NAME.SUFFIX` go to a port of the fork of that name, and only while it runs as itself.
//!
//! ```text
//! client ──▶ listen ──▶ proxy ──▶ name      which fork, which port          ──▶ backend ──▶ control channel ──▶ loopback of the fork
//!                         │       hold      waits until it runs as itself        (its own kept connections)
//!                         └─▶ refusal       else a problem document
//! ```
//!
//! HTTP itself is hyper's on both sides. Which fork has a name is looked up for each request (`host::standing`); what is kept of a fork, its
//! connections above all, belongs to one machine of one fork, and goes with it.
#![forbid(unsafe_code)]

mod backend;
mod headers;
mod hold;
mod listen;
pub mod name;
mod proxy;
mod refusal;

pub use listen::{Access, Config, Log, RouteError, Router};
pub use name::{HostError, Suffix, Target};
