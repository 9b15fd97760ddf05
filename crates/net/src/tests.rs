//! Tests on real links, in network namespaces of their own.
#![allow(clippy::unwrap_used, unsafe_code)]

mod faults;
mod leases;
mod leftovers;
mod reach;
mod rig;
mod user;
mod wire;
