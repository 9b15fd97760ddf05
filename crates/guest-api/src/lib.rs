//! The control channel between host and agent: the gRPC service ([`proto`]), the framing under it ([`session`]), and how much may be under way ([`flow`]).
#![forbid(unsafe_code)]

pub mod flow;
pub mod session;

/// In the header of the answer to `Exec`: how many messages of stdin may be on their way to the command, as `ExecOutput.input_taken` counts them. Agents
/// that are older do not say so: they take what comes, and hold up everything behind it.
pub const INPUT_WINDOW: &str = "offshoot-input-window";

/// The signals that a service may be sent in a fork, without `SIG`.
pub const SIGNALS: [&str; 9] = ["HUP", "INT", "QUIT", "USR1", "USR2", "TERM", "ALRM", "CONT", "WINCH"];

/// What the warmed runtime is called among the sources of logs: no service may be.
pub const RUNTIME: &str = "runtime";

/// Generated from `proto/agent.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod proto {
    tonic::include_proto!("offshoot.guest.v1");
}
