//! The daemon: the verbs of `host` behind REST, for many clients at once.
//!
//! ```text
//! unix socket ─┐                                    ┌─ templates  jobs, progress
//!              ├─▶ who asks ─▶ rate ─▶ scope ─▶ ────┤─ forks      create 1..N, exec, eval, files, logs, standby
//! TCP + TLS  ──┘   (token, peer)    audit, figures  └─ events     server-sent
//! ```
//!
//! It is the same library that the command line uses, on the same directories; both may be used at once. There is no truth in the
//! daemon's memory: what it keeps there can be read again from disk, and is after a crash.
#![forbid(unsafe_code)]
// An error is an answer here: one for each request, not one for each call.
#![allow(clippy::result_large_err)]

mod audit;
mod auth;
mod events;
mod extract;
mod jobs;
mod keys;
mod metrics;
mod model;
mod problem;
mod recovery;
mod routes;
mod serve;
#[cfg(test)]
mod tests;
mod traces;
mod watch;
mod wire;
mod work;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use host::{Home, guest::Channels};
use store::Store;
use tokio::sync::watch as flag;

pub use auth::{NewToken, Scope, TokenError, TokenInfo, Tokens};
pub use routes::openapi;
pub use serve::{Config, Listen, ServeError, TlsFiles, serve, socket_path};

/// Most bytes of a JSON body: 64 KiB of identity for one fork as base64, with room for some hundred children.
pub(crate) const MAX_JSON: usize = 8 << 20;

/// What all requests share.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) home: Home,
    pub(crate) store: Store,
    /// This program: it waits for networks, in processes of its own.
    pub(crate) program: PathBuf,
    /// Where recipes besides the built-in ones are, if anywhere.
    pub(crate) recipes: Option<PathBuf>,
    /// What local users other than the daemon's own may do.
    pub(crate) socket_scope: Scope,
    pub(crate) tokens: Tokens,
    pub(crate) rates: auth::Rates,
    pub(crate) audit: audit::Audit,
    pub(crate) hub: Arc<events::Hub>,
    pub(crate) jobs: jobs::Jobs,
    pub(crate) keys: keys::Keys,
    pub(crate) forks: Arc<watch::Forks>,
    pub(crate) waker: watch::Waker,
    /// Channels to forks' agents, which requests share.
    pub(crate) channels: Channels,
    pub(crate) metrics: metrics::Metrics,
    pub(crate) traces: traces::Traces,
    pub(crate) work: work::Work,
    pub(crate) readiness: routes::Readiness,
    /// Whether the daemon is about to end.
    pub(crate) ending: flag::Receiver<bool>,
    /// Numbers of requests.
    pub(crate) requests: AtomicU64,
}

impl App {
    pub(crate) fn next_request(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }
}
