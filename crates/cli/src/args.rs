//! What can be typed. Everything that has a form is parsed here, at the door; what would put a secret into an error
//! message (clap repeats what it refuses) is taken as text and parsed by the verb.

mod daemon;
mod fork;
mod inside;
mod ports;
mod template;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::remote::{Address, AddressError};

pub use daemon::{Serve, Token, TokenVerb};
pub use fork::{Cleanup, Fork, Forks, Kill, Network, OfFork, OnFailureArg};
pub use inside::{Cp, Eval, Exec, Logs};
pub use ports::{PortForward, PortPair, Route};
pub use template::{AccelArg, Bench, Build, EngineArg, OfTemplate, Pool, Rmi, Verify};

/// Fork a warm sandbox: every fork wakes up as itself.
#[derive(Debug, Parser)]
#[command(
    name = "offshoot",
    version,
    disable_help_subcommand = true,
    max_term_width = 100,
    after_help = "\
Begin with:
  offshoot doctor                        what this machine can do
  offshoot build python --tag py         a template: booted, numpy imported, captured
  offshoot fork py -n 10                 ten sandboxes, each with an identity of its own
  offshoot eval py-… -- 'import random; random.random()'

Exit codes:
  0 done · 1 failed · 2 wrong usage
  exec: the command's own; 124 after --timeout, 125 if offshoot itself failed
Environment:
  OFFSHOOT_DATA_DIR    templates             OFFSHOOT_CACHE_DIR   kernels and root images
  OFFSHOOT_STATE_DIR   forks                 OFFSHOOT_VMM         the program offshoot-vmm
  OFFSHOOT_ENGINE      what build uses       OFFSHOOT_NETWORK     what fork uses
  OFFSHOOT_NETWORK_POOL  forks' addresses    NO_COLOR, CLICOLOR=0   no colour
  OFFSHOOT_HOST        a daemon (--host)     OFFSHOOT_TOKEN, OFFSHOOT_CA  its token; its root"
)]
pub struct Cli {
    /// Print JSON instead of text; errors too (docs/json.md has every field)
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,

    /// Print results and errors only
    #[arg(short, long, global = true, help_heading = "Everywhere")]
    pub quiet: bool,

    /// Which daemon
    #[command(flatten)]
    pub remote: Remote,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// A daemon that does it instead.
#[derive(Debug, Args)]
pub struct Remote {
    /// Have it done by a daemon: unix:///PATH, https://NAME:PORT, or on this machine http://127.0.0.1:PORT
    #[arg(
        long,
        global = true,
        value_name = "HOST",
        env = "OFFSHOOT_HOST",
        hide_env = true,
        help_heading = "Everywhere"
    )]
    pub host: Option<String>,

    /// Root certificates to trust for https:// instead of this machine's, PEM
    #[arg(long, global = true, value_name = "FILE", env = "OFFSHOOT_CA", hide_env = true, help_heading = "Everywhere")]
    pub ca: Option<PathBuf>,
}

impl Remote {
    /// Where the daemon is, if one was named. An empty variable names none.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn address(&self) -> Result<Option<Address>, AddressError> {
        self.host.as_deref().filter(|host| !host.is_empty()).map(str::parse).transpose()
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a template: boot, warm up, freeze, capture
    Build(Build),
    /// List templates
    Templates,
    /// Remove a template
    Rmi(Rmi),
    /// List the mailboxes of a template, which `fork --mailbox` can write to
    Mailboxes(OfTemplate),
    /// Fork a template, or a fork; each has its identity before any of its workload runs
    Fork(Box<Fork>),
    /// List forks
    Ls,
    /// Print everything known of a fork (no secret is)
    Inspect(OfFork),
    /// Run a command in a fork
    Exec(Exec),
    /// Evaluate code in the warmed runtime of a fork
    Eval(Eval),
    /// Ask a fork whether it is well
    Ping(OfFork),
    /// Copy a file or a folder into a fork or out of it
    Cp(Cp),
    /// Print what the services and the runtime of a fork wrote
    Logs(Logs),
    /// Make ports of a fork's programs ports of this machine; the fork needs no network for it
    Forward(PortForward),
    /// Route HTTP and WebSocket for NAME.localhost to the fork of that name, once its identity is applied
    Route(Route),
    /// Put forks to disk; they come back as the same forks
    Standby(Forks),
    /// Bring forks back from standby
    Resume(Forks),
    /// End forks and remove what they had
    Kill(Kill),
    /// Fork a template and prove that no two forks share anything
    Verify(Verify),
    /// Measure how long forks take, step by step
    Bench(Bench),
    /// Keep machines of a template started, so that forks need not wait for that
    Pool(Pool),
    /// Serve all this over HTTP, to many clients at once
    Serve(Serve),
    /// Who may use the daemon with what scope
    Token(Token),
    /// Find what a crash left behind; remove it with --yes
    Cleanup(Cleanup),
    /// Wait for the network of a fork; the task comes on standard input
    #[command(hide = true)]
    ObserveNetwork,
    /// Say what this machine can do, and what to do about the rest
    Doctor,
    /// Print a completion script for a shell
    Completions(Completions),
    /// Print the version
    Version,
}

impl Command {
    /// Whether nobody types it.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::ObserveNetwork | Self::Pool(Pool { fill: true, .. }))
    }
}

/// `completions`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot completions bash > ~/.local/share/bash-completion/completions/offshoot
  offshoot completions fish > ~/.config/fish/completions/offshoot.fish
  offshoot completions zsh > \"${fpath[1]}/_offshoot\"")]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

#[cfg(test)]
mod tests;
