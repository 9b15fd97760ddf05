//! The verbs done by a daemon (`--host`, `OFFSHOOT_HOST`), over its HTTP interface (docs/api.md).
//!
//! ```text
//! verbs ─▶ client ─▶ dial ─▶ unix socket, loopback, or TCP with TLS
//!   │        └─ problem documents become failures
//!   └─▶ the same tables, sinks and reporters as the verbs done here
//! ```
//!
//! What is in files and variables of this side (secrets, files, payloads) is read here; a daemon is never told a path of this machine.

mod address;
mod client;
mod dial;
mod events;
mod problem;
mod socket;
mod verbs;

pub use address::{Address, AddressError};

use self::client::Client;
use crate::{
    args::{Command, Remote},
    commands::{Outcome, block_on, exec},
    error::Failure,
    output::Output,
    signals::Signals,
};

/// Does what was asked, there.
pub fn run(command: Command, address: Address, remote: &Remote, output: &Output) -> Outcome {
    if let Some(verb) = local_only(&command) {
        return Err(only_here(verb));
    }
    if let Command::Exec(args) = &command {
        // It has signals of its own, and an exit code for what is not the command's fault.
        let client = Client::new(address, remote.ca.as_deref()).map_err(exec::own)?;
        return block_on(verbs::exec::exec(args, client, output)).map_err(exec::own);
    }
    if let Command::Forward(args) = &command {
        return block_on(verbs::forward::forward(args, address, remote.ca.clone(), output));
    }
    let mut client = Client::new(address, remote.ca.as_deref())?;
    block_on(async {
        let mut signals = Signals::new().map_err(|error| Failure::of("runtime", &error))?;
        tokio::select! {
            outcome = verb(&command, &mut client, output) => outcome,
            number = signals.end() => {
                Err(Failure::interrupted(number, "interrupted; what the daemon has begun, it goes on with"))
            }
        }
    })
}

async fn verb(command: &Command, client: &mut Client, output: &Output) -> Outcome {
    match command {
        Command::Build(args) => verbs::templates::build(args, client, output).await,
        Command::Templates => verbs::templates::list(client, output).await,
        Command::Rmi(args) => verbs::templates::remove(args, client, output).await,
        Command::Mailboxes(args) => verbs::templates::mailboxes(args, client, output).await,
        Command::Verify(args) => verbs::templates::verify(args, client, output).await,
        Command::Pool(args) => verbs::templates::pool(args, client, output).await,
        Command::Fork(args) => verbs::create::fork(args, client, output).await,
        Command::Ls => verbs::forks::list(client, output).await,
        Command::Inspect(args) => verbs::forks::inspect(args, client, output).await,
        Command::Kill(args) => verbs::forks::kill(args, client, output).await,
        Command::Standby(args) => verbs::forks::standby(args, client, output).await,
        Command::Resume(args) => verbs::forks::resume(args, client, output).await,
        Command::Ping(args) => verbs::forks::ping(args, client, output).await,
        Command::Eval(args) => verbs::forks::eval(args, client, output).await,
        Command::Cp(args) => verbs::files::copy(args, client, output).await,
        Command::Logs(args) => verbs::forks::logs(args, client, output).await,
        Command::Token(args) => verbs::tokens::token(args, client, output).await,
        Command::Version => verbs::tokens::version(client, output).await,
        command => Err(only_here(local_only(command).unwrap_or("this"))),
    }
}

/// The name of a verb that is about this machine.
fn local_only(command: &Command) -> Option<&'static str> {
    match command {
        Command::Doctor => Some("doctor"),
        Command::Cleanup(_) => Some("cleanup"),
        Command::Bench(_) => Some("bench"),
        Command::Serve(_) => Some("serve"),
        Command::Route(_) => Some("route"),
        Command::Completions(_) => Some("completions"),
        _ => None,
    }
}

fn only_here(verb: &str) -> Failure {
    Failure::usage(format!("{verb} is about the machine that it runs on, and --host or OFFSHOOT_HOST names another"))
        .with_code("local_only")
        .with_next(format!("run it there, or without: env -u OFFSHOOT_HOST offshoot {verb}"))
}
