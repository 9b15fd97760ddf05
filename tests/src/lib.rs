//! What the tests of the whole system share: the program, templates that are built once, homes that must be empty at the
//! end, hosts with networks of their own, and what `/proc` says about machines.
//!
//! Nothing is skipped: a program or package that is missing fails the test, with the command that helps. What only one engine
//! has is marked as ignored; the rig, where that engine runs, includes it.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

pub mod bench;
pub mod capture;
pub mod daemon;
pub mod playwright;
pub mod processes;
pub mod programs;
pub mod recipes;
pub mod run;
pub mod servers;
pub mod templates;
pub mod watch;
pub mod world;

pub use bench::{Bench, Fork};
pub use capture::Capture;
pub use daemon::Daemon;
pub use run::Run;
pub use servers::Server;
pub use templates::{Kind, Template};
