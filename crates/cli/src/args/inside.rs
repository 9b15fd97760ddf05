//! Verbs that do something in a fork.

use std::time::Duration;

use clap::Args;

use crate::values;

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
