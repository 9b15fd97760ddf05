//! Requests that do not reach a fork, and what is said instead: problem documents (RFC 9457), as the daemon's.

use std::{error::Error, io, time::Duration};

use host::{codes::Coded, guest::GuestError, standing::Waiting};
use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    body::Bytes,
    header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS},
};
use hyper_util::client::legacy;
use identity::ForkName;
use serde::Serialize;
use thiserror::Error;

use crate::{backend::not_connected, name::HostError};

/// In how many seconds it is worth another try.
const RETRY_SECONDS: u32 = 1;

/// Why a request was not answered by a fork.
#[derive(Debug, Error)]
pub(crate) enum Refusal {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Nobody has the name.
    #[error("there is no fork {fork}{}; see `offshoot ls`", read_as(*port, fork))]
    NoFork {
        /// Its name.
        fork: ForkName,
        /// The port that was part of the host name.
        port: Option<u16>,
    },
    /// Its machine has ended.
    #[error("fork {0} is dead: its machine has ended; remove it with `offshoot kill {0}`")]
    Dead(ForkName),
    /// It does not run as itself, and that did not change in time.
    #[error("{}", waits(fork, what))]
    NotYet {
        /// Its name.
        fork: ForkName,
        /// For what it waits.
        what: Waiting,
    },
    /// Its agent, the port, or the program there.
    #[error("{}", no_answer(fork, *port, source))]
    NoAnswer {
        /// The fork.
        fork: ForkName,
        /// The port.
        port: u16,
        /// What was wrong.
        source: legacy::Error,
    },
    /// The program has taken the request, and says nothing.
    #[error(
        "the program at port {port} of fork {fork} did not begin to answer within {} s; give it more with --answer-timeout, or see what it says with `offshoot logs {fork}`",
        limit.as_secs_f64()
    )]
    Late {
        /// The fork.
        fork: ForkName,
        /// The port.
        port: u16,
        /// The time it had.
        limit: Duration,
    },
    /// The program agreed to a WebSocket that nobody had asked for.
    #[error("the program at port {port} of fork {fork} switched to another protocol, and was not asked to")]
    Unasked {
        /// The fork.
        fork: ForkName,
        /// The port.
        port: u16,
    },
    /// A proxy's method.
    #[error("CONNECT is for proxies; ask NAME.SUFFIX for what you want")]
    Connect,
    /// Too many requests to one fork.
    #[error("fork {0} has as many requests as it may have at once; they have to be answered first")]
    ForkFull(ForkName),
    /// Too many connections.
    #[error("the router has as many connections as it may have; give it more with --max-connections")]
    Full,
    /// The router ends.
    #[error("the router is ending")]
    Ending,
    /// The state directory.
    #[error("the forks could not be looked at")]
    State(#[from] io::Error),
}

fn read_as(port: Option<u16>, fork: &ForkName) -> String {
    port.map_or_else(String::new, |port| format!(" ({port}-{fork} is port {port} of {fork})"))
}

fn no_answer(fork: &ForkName, port: u16, error: &legacy::Error) -> String {
    match not_connected(error) {
        Some(error) => format!("fork {fork} can not be asked: {error}"),
        None => format!(
            "the program at port {port} of fork {fork} gave no answer in HTTP; see what it says with `offshoot logs {fork}`"
        ),
    }
}

fn waits(fork: &ForkName, what: &Waiting) -> String {
    match what {
        Waiting::Identity => format!("fork {fork} is being made, and has not acknowledged its identity yet"),
        Waiting::Network(_) => format!("fork {fork} has not acknowledged its network yet"),
        Waiting::Resume(_) => format!("fork {fork} is in standby; bring it back with `offshoot resume {fork}`"),
        Waiting::Operation(_) => format!("fork {fork} is being put into standby, resumed or forked"),
    }
}

/// The status for a fork that could not be asked.
fn status_of(error: &GuestError) -> StatusCode {
    match error {
        GuestError::NoListener(_) | GuestError::Busy | GuestError::Held(_) => StatusCode::SERVICE_UNAVAILABLE,
        GuestError::Timeout(_) | GuestError::NotTaken(_) | GuestError::Stalled(_) => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::BAD_GATEWAY,
    }
}

#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: String,
    title: &'a str,
    status: u16,
    detail: String,
    code: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    causes: Vec<String>,
}

impl Refusal {
    /// Stable, for programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Host(HostError::Malformed { .. }) => "host_malformed",
            Self::Host(HostError::Elsewhere { .. }) => "host_not_routed",
            Self::Host(HostError::NoName(_)) | Self::NoFork { .. } => "fork_not_found",
            Self::Dead(_) => "fork_dead",
            Self::NotYet { what: Waiting::Identity | Waiting::Network(_), .. } => "fork_not_ready",
            Self::NotYet { what: Waiting::Resume(_), .. } => "fork_in_standby",
            Self::NotYet { what: Waiting::Operation(_), .. } => "fork_busy",
            Self::NoAnswer { source, .. } => not_connected(source).map_or("fork_answer", Coded::code),
            Self::Unasked { .. } => "fork_answer",
            Self::Late { .. } => "answer_timeout",
            Self::Connect => "method_not_allowed",
            Self::ForkFull(_) => "fork_full",
            Self::Full => "router_full",
            Self::Ending => "router_ending",
            Self::State(_) => "state_failed",
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Host(HostError::Malformed { .. }) => StatusCode::BAD_REQUEST,
            Self::Host(HostError::Elsewhere { .. }) => StatusCode::MISDIRECTED_REQUEST,
            Self::Host(HostError::NoName(_)) | Self::NoFork { .. } => StatusCode::NOT_FOUND,
            Self::NotYet { .. } | Self::ForkFull(_) | Self::Full | Self::Ending => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoAnswer { source, .. } => not_connected(source).map_or(StatusCode::BAD_GATEWAY, status_of),
            Self::Late { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::Dead(_) | Self::Unasked { .. } => StatusCode::BAD_GATEWAY,
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::State(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub(crate) fn to_response(&self) -> Response<Full<Bytes>> {
        let status = self.status();
        let problem = Problem {
            kind: format!("urn:offshoot:problem:{}", self.code()),
            title: status.canonical_reason().unwrap_or("Failed"),
            status: status.as_u16(),
            detail: self.to_string(),
            code: self.code(),
            causes: self.causes(),
        };
        let text = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_SECONDS.into());
        }
        response
    }

    fn causes(&self) -> Vec<String> {
        let causes = std::iter::successors(self.source(), |&error| error.source());
        causes.map(|error| error.to_string().chars().filter(|character| !character.is_control()).collect()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_says_when_to_try_again_and_what_will_not_does_not() {
        let fork = || ForkName::parse("w-1").unwrap();
        let of = |refusal: Refusal| {
            let response = refusal.to_response();
            (response.status().as_u16(), refusal.code(), response.headers().contains_key(RETRY_AFTER))
        };
        let not_yet = |what| Refusal::NotYet { fork: fork(), what };
        for (refusal, expected) in [
            (not_yet(Waiting::Identity), (503, "fork_not_ready", true)),
            (Refusal::Full, (503, "router_full", true)),
            (Refusal::ForkFull(fork()), (503, "fork_full", true)),
            (Refusal::Late { fork: fork(), port: 80, limit: Duration::from_secs(1) }, (504, "answer_timeout", false)),
            (Refusal::Dead(fork()), (502, "fork_dead", false)),
            (Refusal::NoFork { fork: fork(), port: Some(80) }, (404, "fork_not_found", false)),
            (Refusal::Connect, (405, "method_not_allowed", false)),
        ] {
            assert_eq!(of(refusal), expected);
        }
    }
}
