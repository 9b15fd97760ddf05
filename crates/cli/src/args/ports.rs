//! Verbs that lead to ports of forks.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use clap::Args;
use host::guest::Target;
use route::Suffix;

use crate::values;

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
