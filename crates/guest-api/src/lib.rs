//! The control channel between host and agent: the gRPC service ([`proto`]), the framing under it ([`session`]), and how much may be under way ([`flow`]).
#![forbid(unsafe_code)]

pub mod flow;
pub mod session;

/// Generated from `proto/agent.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod proto {
    tonic::include_proto!("offshoot.guest.v1");
}
