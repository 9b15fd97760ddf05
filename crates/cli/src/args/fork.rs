//! Verbs that make forks, and those that end them.

use std::net::IpAddr;

use clap::{ArgAction, Args, ValueEnum};
use host::network::Mode;
use identity::{ForkName, MailboxName, Tag};
use net::{Egress, Forward, NetName};

use crate::values;

/// Verbs about one fork.
#[derive(Debug, Args)]
pub struct OfFork {
    /// The fork: its name, its id, or the first 6 digits or more of its id
    #[arg(value_name = "FORK")]
    pub fork: String,
}

/// `fork`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot fork py -n 10
  offshoot fork py --name worker -n 3                     worker-1, worker-2, worker-3
  offshoot fork py --env REGION=eu --secret API_KEY=env:API_KEY
  offshoot fork py --secret TLS_KEY=@key.pem --file /etc/app.toml=@app.toml:0600
  offshoot fork --from worker-1 -n 5                      memory and disk of worker-1, which goes on
  offshoot fork web --mailbox app:config='{\"shard\":7}' --wait-ack app:config
  offshoot fork web -p 8080:80 --egress 10.0.0.0/8          or deny; forks with --net NAME share a net

A secret is read from a file or a variable, because everybody on this machine can read the
arguments of a command. In the fork it is a file of mode 0400 under the identity directory,
never in its environment.")]
pub struct Fork {
    /// The template
    #[arg(value_name = "TAG", required_unless_present = "from", conflicts_with = "from")]
    pub tag: Option<Tag>,
    /// A fork instead of a template, running or in standby: children begin where it is
    #[arg(long, value_name = "FORK")]
    pub from: Option<String>,
    /// How many
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub count: usize,
    /// Name, also the host name; with -n, -1, -2… are appended [default: made of TAG and the id]
    #[arg(long, value_name = "NAME")]
    pub name: Option<ForkName>,
    /// Variable for everything that runs in the fork (repeatable)
    #[arg(short, long, value_name = "K=V")]
    pub env: Vec<String>,
    /// Label; shown by `ls` and `inspect`, and told to the fork (repeatable)
    #[arg(short, long, value_name = "K=V")]
    pub label: Vec<String>,
    /// Secret, from a file or a variable of this command (repeatable)
    #[arg(long, value_name = "K=@FILE|K=env:VAR")]
    pub secret: Vec<String>,
    /// File to write before the workload runs; :MODE is octal, 0644 by default (repeatable)
    #[arg(long, value_name = "PATH=@FILE[:MODE]")]
    pub file: Vec<String>,
    /// Payload for a mailbox, a JSON object (repeatable; `offshoot mailboxes TAG` lists them)
    #[arg(long, value_name = "NAME=JSON|NAME=@FILE")]
    pub mailbox: Vec<String>,
    /// Token of a mailbox that was planted with one (repeatable)
    #[arg(long, value_name = "NAME=@FILE|NAME=env:VAR")]
    pub mailbox_token: Vec<String>,
    /// Wait until this mailbox's owner has acknowledged its payload (repeatable)
    #[arg(long, value_name = "NAME")]
    pub wait_ack: Vec<MailboxName>,
    /// How long to wait for those acks, up to 30000; 0 is the default of 5000
    #[arg(long, value_name = "MS", default_value_t = 0, allow_negative_numbers = true)]
    pub ack_timeout_ms: i64,
    /// Most memory of the workload, for example 256M
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub memory_limit: Option<u64>,
    /// Most CPU time, in CPUs: 0.5, 1.5
    #[arg(long, value_name = "N", value_parser = values::cpu_millis)]
    pub cpus: Option<u64>,
    /// Most processes and threads of the workload
    #[arg(long, value_name = "N")]
    pub pids: Option<u64>,
    /// Network
    #[command(flatten)]
    pub network: Network,
}

/// A fork's network.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
pub struct Network {
    /// What the network card leads to [default: tap for root, else none]
    #[arg(long, value_name = "none|user|tap", env = "OFFSHOOT_NETWORK", hide_env_values = true)]
    pub network: Option<Mode>,
    /// Where connections of the fork may go: allow (anywhere but the host, other forks and link-local addresses), deny, or ranges
    #[arg(long, value_name = "allow|deny|CIDR,…", default_value = "allow", hide_default_value = true)]
    pub egress: Egress,
    /// Net that forks share: those of the same name reach each other
    #[arg(long, value_name = "NAME")]
    pub net: Option<NetName>,
    /// Port of this host that leads to a port of the fork (repeatable)
    #[arg(short = 'p', long, value_name = "HOST:GUEST[/udp]")]
    pub publish: Vec<Forward>,
    /// Most bytes per second in each direction, for example 10M
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub rate: Option<u64>,
    /// DNS server (repeatable) [default: this host's, as far as a fork can reach them]
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<IpAddr>,
    /// How long to wait for the fork's network, up to 30000; 0 is the default of 10000
    #[arg(long, value_name = "MS", default_value_t = 0, hide_default_value = true)]
    pub network_timeout_ms: u64,
    /// Whether to wait for the network at all; with false it opens when the fork has acknowledged it, and `inspect` shows whether it has
    #[arg(long, value_name = "BOOL", default_value_t = true, hide_default_value = true, action = ArgAction::Set, num_args = 0..=1,
          default_missing_value = "true", require_equals = true)]
    pub wait_network: bool,
    /// What becomes of a fork whose network is not acknowledged in time, where nobody waits: kill or keep
    #[arg(long, value_name = "kill|keep", default_value = "kill", hide_default_value = true)]
    pub on_network_failure: OnFailureArg,
}

/// What becomes of a fork whose network is not acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnFailureArg {
    /// It is destroyed
    Kill,
    /// It lives on, and its network stays closed
    Keep,
}

/// `standby` and `resume`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot standby worker-1 worker-2       memory and processes are released, names and addresses stay
  offshoot resume worker-1 worker-2

What comes back is the same fork: its programs go on where they were, with the right time and
fresh randomness. docs/standby.md says what they see.")]
pub struct Forks {
    /// The forks, by name or id
    #[arg(value_name = "FORK", required = true)]
    pub forks: Vec<String>,
}

/// `kill`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  offshoot kill worker-1 worker-2\n  offshoot kill --all")]
pub struct Kill {
    /// The forks, by name or id; one that has died already is just removed
    #[arg(value_name = "FORK", required_unless_present = "all", conflicts_with = "all")]
    pub forks: Vec<String>,
    /// All of them
    #[arg(long)]
    pub all: bool,
}

/// `cleanup`
#[derive(Debug, Args)]
#[command(
    after_help = "Nothing that offshoot did not make is ever touched; nothing that lives is, or may live, without --force."
)]
pub struct Cleanup {
    /// Remove what was found; without it, only say what would be removed
    #[arg(long)]
    pub yes: bool,
    /// End and remove as well what may live: forks whose records can not be read, or are another version's
    #[arg(long, requires = "yes")]
    pub force: bool,
}
