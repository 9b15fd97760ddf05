//! Tests of the whole system: real guests through the real command line. `scripts/test` runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod adversary;
mod eval;
mod exec;
mod generation;
mod identity;
mod idle;
mod isolation;
mod limits;
mod mailboxes;
mod network;
mod network_acks;
mod network_addresses;
mod network_cleanup;
mod network_faults;
mod network_identity;
mod network_later;
mod network_obstacles;
mod network_policy;
mod network_user;
mod network_wire;
mod own_rootfs;
mod pool;
mod recovery;
mod signals;
mod warm_up;
