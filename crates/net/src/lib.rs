//! The host's side of a fork's network. It knows nothing of engines and guests.
//!
//! This is mode `tap`, for who has the rights; without any, [`UserLink`] connects a fork by a program.
//!
//! ```text
//!  guest            the fork's own network namespace             the host's namespace
//! ┌────────┐ frames ┌──────────────────────────────────────┐     ┌───────────────────────────────┐
//! │ eth0 ──┼────────┼─ tap0        route, `inet offshoot`  │     │ table `inet offshoot`: NAT,   │
//! │ A/32   │        │  gateway/32  (policy)      ── wire0 ─┼─────┼─ ofs…  forwarded ports, forks │
//! └────────┘        └──────────────────────────────────────┘     │  A/32   apart, host apart     │
//!                                                                └───────────────────────────────┘
//! ```
//!
//! Every fork is routed, not bridged. A bridge takes at most 1023 ports, and it is one Ethernet shared by guests who are hostile
//! to each other; here no frame of a guest ever leaves its namespace, so its MAC address can not be seen, let alone forged,
//! outside of it. The address is a /32 (and /128) with the pool's gateway on the link, which every fork's namespace has.
//!
//! What concerns one fork alone (its addresses, its policy, its rate) is in its own namespace and is gone with it. The host's namespace
//! has one small table for all forks; a fork that is opened changes it only if it has forwarded ports or a named net.
//!
//! **Nothing leaves before it is allowed to.** The namespace's forward chain drops everything from before the tap
//! exists. [`ClosedLink::open`] puts the policy in its place, in one transaction. The acknowledgement needs no open link: its
//! socket ([`AckSocket`]) is inside the namespace, on the gateway's address.
//!
//! Everything made is written down before it is made, by exact name ([`LinkRecord`]), so that whoever comes after a crash can
//! remove it, and nothing else.
#![deny(unsafe_code)]

mod ack;
mod address;
mod dns;
mod error;
mod fault;
mod findings;
mod host_table;
mod inventory;
mod lease;
mod link;
mod mode;
mod named_net;
mod namespace;
mod netlink;
mod nft;
mod policy;
mod ports;
mod record;
mod remove;
mod rules;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod user;

pub use ack::{ACK_PORT, AckDatagram, AckSocket, MAX_AT_ONCE, MAX_DATAGRAM};
pub use address::{Addresses, GATEWAY_MAC, MTU, Pool, PoolError, PoolTextError};
pub use dns::{Dns, MAX_DNS, Reach, Unreachable};
pub use error::{LinkError, missing_capability};
#[cfg(feature = "fault-points")]
pub use fault::STEPS;
pub use findings::{Finding, missing, risks};
pub use inventory::{Inventory, Leftover};
pub use lease::{DEFAULT_PAUSE, Lease, LeaseError, LeaseRecord, Leases};
pub use link::{ClosedLink, Network, OpenLink};
pub use mode::{Mode, ModeError};
pub use policy::{Egress, Forward, MAX_EGRESS, MAX_FORWARDS, NetName, Policy, PolicyError, Protocol, Rate};
pub use record::LinkRecord;
pub use state::since_boot;
pub use tap::TapOptions;
pub use user::{RunAs, UserAddresses, UserError, UserLink, UserProcess};
