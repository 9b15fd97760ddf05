//! The contract shared by host and guest.
//!
//! Everything a fork is told, and everything it answers, is described here and nowhere else: names and tags
//! ([`name`]), the identity document ([`document`]) with its network section ([`network`]), the mailbox page that carries it ([`mailbox`]), and the line the
//! fork answers with ([`ack`]). The crate is pure: it does no I/O, so both sides and every test can use it as it is.
#![forbid(unsafe_code)]

pub mod ack;
pub mod document;
pub mod key;
pub mod mailbox;
pub mod name;
pub mod network;
pub mod seal;
pub mod secret;
mod wire;

pub use ack::{Ack, AckError, Stage, Step};
pub use document::{Action, ClockNanos, Document, DocumentError, File, ForkIdentity, Limits};
pub use key::AckKey;
pub use name::{EnvName, FieldName, ForkId, ForkName, MailboxName, NameError, SecretName, Tag};
pub use network::{Inet, MacAddress, Network, NetworkError};
pub use secret::Secret;
