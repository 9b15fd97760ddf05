//! What can be typed. Everything that has a form is parsed here, at the door; what would put a secret into an error
//! message (clap repeats what it refuses) is taken as text and parsed by the verb.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use host::{guest::Target, network::Mode};
use identity::{ForkName, MailboxName, Tag};
use net::{Egress, Forward, NetName};
use route::Suffix;

use crate::{
    remote::{Address, AddressError},
    values,
};

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

/// `build`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot build python --tag py
  offshoot build busybox --tag tiny --memory 128M
  offshoot build ./my-recipe --tag web --vcpus 2
  offshoot build ./rootfs.tar --tag mine        a root file system of your own")]
pub struct Build {
    /// A recipe by name (python, browser, busybox), a recipe's folder, or a root file system (folder, tar, OCI layout)
    #[arg(value_name = "RECIPE|DIR")]
    pub recipe: String,
    /// Name of the template; one that exists is never replaced (see rmi)
    #[arg(long, value_name = "TAG")]
    pub tag: Tag,
    /// Refuse a template in which the audit finds secrets, connections, unseeded randomness… (else they are warnings)
    #[arg(long)]
    pub strict: bool,
    /// Guest memory, for example 512M or 1G [default: the recipe's]
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub memory: Option<u64>,
    /// Virtual CPUs [default: the recipe's]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Guest kernel; with it come the modules installed for it, or those in a folder `modules` beside it [default: the distribution's, unpacked into the cache]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// What runs the template and its forks [default: kvm where a probe shows that it works, else qemu]
    #[arg(long, value_name = "ENGINE", env = "OFFSHOOT_ENGINE", hide_env_values = true)]
    pub engine: Option<EngineArg>,
    /// What executes the guest [default: kvm where a probe shows that it works, else tcg]
    #[arg(long, value_name = "ACCEL")]
    pub accel: Option<AccelArg>,
}

/// What runs a template and its forks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    /// offshoot's own machine monitor; needs hardware virtualisation
    Kvm,
    /// QEMU from the distribution
    Qemu,
}

/// What executes the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AccelArg {
    /// Hardware virtualisation
    Kvm,
    /// Emulation
    Tcg,
}

/// `rmi`
#[derive(Debug, Args)]
#[command(after_help = "Forks that were made of it live on.\n\nExample:\n  offshoot rmi py")]
pub struct Rmi {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
}

/// Verbs about one template.
#[derive(Debug, Args)]
pub struct OfTemplate {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
}

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

/// `exec`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot exec worker-1 -- uname -a
  offshoot exec worker-1 -i -t -- sh
  tar c src | offshoot exec worker-1 -i -w /tmp -- tar x
  offshoot exec worker-1 --timeout 10 -e DEBUG=1 -- ./job

The exit code is the command's; 124 if --timeout ended it; 125 if offshoot itself failed.")]
pub struct Exec {
    /// The fork: its name, its id, or the first 6 digits or more of its id
    #[arg(value_name = "FORK")]
    pub fork: String,
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Variable for the command (repeatable)
    #[arg(short, long, value_name = "K=V")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User name, or UID[:GID]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// End the command after this many seconds
    #[arg(long, value_name = "S", value_parser = values::seconds, allow_negative_numbers = true)]
    pub timeout: Option<Duration>,
    /// The command and its arguments, after --
    #[arg(value_name = "CMD", required = true, last = true)]
    pub command: Vec<String>,
}

/// `forward`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot forward worker-1 8080                  127.0.0.1:8080 is port 8080 of worker-1
  offshoot forward worker-1 9000:80 0:9222        the second on any port that is free
  offshoot forward worker-1 80 --json             says where it listens
  offshoot forward worker-1 9000:identity         where its payload is posted: docs/services.md

Connections go through the control channel to the loopback of the fork. It ends with Ctrl-C, or with the fork.")]
pub struct PortForward {
    /// The fork: its name, its id, or the first 6 digits or more of its id
    #[arg(value_name = "FORK")]
    pub fork: String,
    /// Port of the fork, with the port here before it if that is another one; 0 is any that is free
    #[arg(value_name = "[HERE:]PORT", required = true)]
    pub ports: Vec<PortPair>,
    /// Address to listen on; whoever reaches it reaches the fork's ports
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub address: IpAddr,
}

/// A port here, and one of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortPair {
    /// Here; 0 is any that is free.
    pub host: u16,
    /// In the fork.
    pub guest: Target,
}

impl FromStr for PortPair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let any = if text == Target::IDENTITY { "0" } else { text };
        let (host, guest) = text.split_once(':').unwrap_or((any, text));
        let port =
            |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten();
        match (port(host), guest.parse()) {
            (Some(host), Ok(guest)) => Ok(Self { host, guest }),
            _ => Err("ports are PORT or HERE:PORT, with numbers up to 65535, for example 9000:80; PORT may also be the word identity".into()),
        }
    }
}

/// `route`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot route --port 8000                       http://worker-1.localhost:8080 is port 8000 of worker-1,
                                                   http://3000-worker-1.localhost:8080 its port 3000
  offshoot route --listen 127.0.0.1:80 --suffix fork.test --hold 30
  curl -H 'Host: worker-1.localhost' http://127.0.0.1:8080/

A request for a fork that is being made, captured or in standby waits, and gets 503 with Retry-After
if that takes longer than --hold; 404 if there is no such fork, 502 if it is dead. Forks need no
network. docs/routing.md has every status. It ends with Ctrl-C.")]
pub struct Route {
    /// Where to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Listen on an address that others reach; whoever does reaches every port of every fork
    #[arg(long)]
    pub allow_remote: bool,
    /// Domain below which names are those of forks; below localhost they lead here in browsers without any DNS
    #[arg(long, value_name = "DOMAIN", default_value = "localhost")]
    pub suffix: Suffix,
    /// Port of a fork, unless it stands before its name: PORT-NAME.DOMAIN
    #[arg(long, value_name = "PORT", default_value_t = 80, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// How long a request waits for a fork that does not run as itself yet; 0 is not at all
    #[arg(long, value_name = "S", default_value = "10", value_parser = values::seconds_or_none, allow_negative_numbers = true)]
    pub hold: Duration,
    /// How long a fork may take to begin its answer, after the last byte of the request; 0 is as long as it likes
    #[arg(long, value_name = "S", default_value = "300", value_parser = values::seconds_or_none, allow_negative_numbers = true)]
    pub answer_timeout: Duration,
    /// Most connections at once; those above it get 503, and so do those above half of it to one fork
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_connections: u32,
    /// How long requests may go on once it is asked to end
    #[arg(long, value_name = "S", default_value = "10", value_parser = values::seconds_or_none, allow_negative_numbers = true)]
    pub grace: Duration,
    /// Print a line for each request
    #[arg(long)]
    pub log: bool,
}

/// `eval`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot eval worker-1 -- 'numpy.random.random()'
  echo 'print(1); 2' | offshoot eval worker-1 -

What the code printed comes first, then its value. An exception goes to standard error with
its stack; the exit code is 1 then.")]
pub struct Eval {
    /// The fork: its name, its id, or the first 6 digits or more of its id
    #[arg(value_name = "FORK")]
    pub fork: String,
    /// The code, or - to read it from standard input
    #[arg(value_name = "CODE|-")]
    pub source: Option<String>,
    /// Give up after this many seconds
    #[arg(long, value_name = "S", value_parser = values::seconds, default_value = "60", allow_negative_numbers = true)]
    pub timeout: Duration,
    /// The code, after --
    #[arg(value_name = "CODE", last = true, conflicts_with = "source")]
    pub code: Vec<String>,
}

/// `cp`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot cp data.csv worker-1:/tmp/
  offshoot cp worker-1:/var/log ./logs

A local name with a colon needs a slash before it: ./a:b")]
pub struct Cp {
    /// From: a local path, or FORK:PATH
    #[arg(value_name = "SRC", value_parser = values::place)]
    pub source: values::Place,
    /// To: a local path, or FORK:PATH
    #[arg(value_name = "DST", value_parser = values::place)]
    pub destination: values::Place,
}

/// `logs`
#[derive(Debug, Args)]
pub struct Logs {
    /// The fork: its name, its id, or the first 6 digits or more of its id
    #[arg(value_name = "FORK")]
    pub fork: String,
    /// Go on with what is written from now on
    #[arg(short, long)]
    pub follow: bool,
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

/// `verify`
#[derive(Debug, Args)]
#[command(after_help = "\
Compares everything that must differ: all pairs of forks, and each fork with the template.
Exit code 1 if any two share anything. The forks are removed again.")]
pub struct Verify {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
    /// How many forks to compare
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 3, allow_negative_numbers = true)]
    pub count: usize,
}

/// `bench`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  offshoot bench py -n 1,10,50 --rounds 5")]
pub struct Bench {
    /// The template
    #[arg(value_name = "TAG")]
    pub tag: Tag,
    /// How many at once, one or more numbers
    #[arg(short = 'n', long = "at-once", value_name = "N,N…", value_delimiter = ',', default_value = "1,10",
          value_parser = values::at_least_one, allow_negative_numbers = true)]
    pub at_once: Vec<usize>,
    /// Rounds of each
    #[arg(long, value_name = "R", default_value = "5", value_parser = values::at_least_one, allow_negative_numbers = true)]
    pub rounds: usize,
    /// What the network cards lead to [default: as `fork`]
    #[arg(long, value_name = "none|user|tap", env = "OFFSHOOT_NETWORK", hide_env_values = true)]
    pub network: Option<Mode>,
}

/// `pool`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  offshoot pool py 4      four machines with the template loaded, stopped, without identity
  offshoot pool           what is ready
  offshoot pool py 0      end them

A fork takes one if there is one, and another is started after it. A fork with --memory-limit
or --cpus starts a machine of its own.")]
pub struct Pool {
    /// The template [default: show all pools]
    #[arg(value_name = "TAG")]
    pub tag: Option<Tag>,
    /// How many to keep ready; 0 ends them [default: show the pool]
    #[arg(value_name = "SIZE")]
    pub size: Option<usize>,
    /// What their network cards lead to; only forks that ask for the same use them [default: as `fork`]
    #[arg(long, value_name = "none|tap", env = "OFFSHOOT_NETWORK", hide_env_values = true)]
    pub network: Option<Mode>,
    /// Fill the pool up to its size, unless somebody does already, and print nothing
    #[arg(long, hide = true, requires = "tag", conflicts_with = "size")]
    pub fill: bool,
}

/// `cleanup`
#[derive(Debug, Args)]
#[command(after_help = "Nothing that lives and nothing that offshoot did not make is ever touched.")]
pub struct Cleanup {
    /// Remove what was found; without it, only say what would be removed
    #[arg(long)]
    pub yes: bool,
}

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
    /// Requests per second that one token may make; twice as many may come at once
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
