//! The control channel between host and agent: the gRPC service ([`proto`]) and the framing under it ([`session`]).
#![forbid(unsafe_code)]

pub mod session;

/// Generated from `proto/agent.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod proto {
    tonic::include_proto!("offshoot.guest.v1");
}
