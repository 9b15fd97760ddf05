//! The daemon, and who may use it.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::values;

/// `serve`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot serve                                          on a unix socket, for this user and root
  offshoot serve --listen 0.0.0.0:7443 --tls-cert c.pem --tls-key k.pem
  curl --unix-socket /run/offshoot/api/offshoot.sock http://offshoot/v1/forks

GET /docs shows every route; GET /openapi.json describes them to programs. Over TCP each request
needs a token (`offshoot token create`). Forks live on when the daemon ends; one that starts takes
up those that live, and removes what a crash left behind. OTEL_EXPORTER_OTLP_ENDPOINT names
who gets traces.")]
pub struct Serve {
    /// The unix socket [default: api/offshoot.sock in the state directory]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Permission bits of the socket, octal; 0660 lets its group in
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = values::mode)]
    pub socket_mode: u32,
    /// What users who reach the socket may do, other than this one and root: read, fork or admin
    #[arg(long, value_name = "SCOPE", default_value = "fork")]
    pub socket_scope: api::Scope,
    /// TCP address to listen on besides; other than on loopback it needs --tls-cert and --tls-key
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Certificate chain, PEM
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "listen"])]
    pub tls_cert: Option<PathBuf>,
    /// Key of the certificate, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Requests per second that each token, and each local user, may make; twice as many may come at once
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub rate: u32,
    /// Folder of recipes that clients may build, each in a folder of its own name
    #[arg(long, value_name = "DIR")]
    pub recipes: Option<PathBuf>,
    /// How long requests may go on once the daemon is asked to end
    #[arg(long, value_name = "S", default_value = "30", value_parser = values::seconds)]
    pub grace: Duration,
}

/// `token`
#[derive(Debug, Args)]
pub struct Token {
    /// What to do
    #[command(subcommand)]
    pub verb: TokenVerb,
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenVerb {
    /// Make a token; it is shown this once
    #[command(after_help = "Example:\n  offshoot token create ci --scope fork --expires 30d")]
    Create(TokenCreate),
    /// List tokens
    Ls,
    /// Remove a token; it ends at once
    Rm(TokenRm),
}

/// `token create`
#[derive(Debug, Args)]
pub struct TokenCreate {
    /// What it is for
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What it allows; each includes those before it: read, fork, admin
    #[arg(long, value_name = "SCOPE", default_value = "fork")]
    pub scope: api::Scope,
    /// How long it is good for, for example 12h or 30d [default: until it is removed]
    #[arg(long, value_name = "TIME", value_parser = values::life)]
    pub expires: Option<Duration>,
}

/// `token rm`
#[derive(Debug, Args)]
pub struct TokenRm {
    /// Its id, as `token ls` shows it
    #[arg(value_name = "ID")]
    pub id: String,
}
