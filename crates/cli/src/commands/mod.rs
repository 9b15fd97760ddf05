//! The verbs, one file each. A verb gets its arguments and how to print, and returns the exit code.

mod bench;
pub(crate) mod build;
mod cleanup;
mod completions;
pub(crate) mod cp;
mod doctor;
pub(crate) mod eval;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod forward;
mod inspect;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod ls;
pub(crate) mod mailboxes;
mod observe_network;
pub(crate) mod ping;
pub(crate) mod pool;
pub(crate) mod rmi;
mod route;
mod serve;
pub(crate) mod standby;
pub(crate) mod templates;
pub(crate) mod token;
pub(crate) mod verify;
mod version;

use std::{future::Future, time::Duration};

use host::{ForkRecord, Home, forks, guest::GuestChannel, stop};
use store::Store;

use crate::{
    args::{Command, Remote},
    error::{Coded, Failure},
    output::Output,
    remote, signals,
};

/// Time for a fork's agent to answer: it may have to be read in from disk on a busy machine.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// What a verb returns: its exit code.
pub(crate) type Outcome = Result<u8, Failure>;

/// Does what was asked: here, or by the daemon that `remote` names.
pub fn run(command: Command, remote: &Remote, output: &Output) -> Outcome {
    match remote.address()? {
        // What waits for a fork's network, or fills a pool, was started by a command of this machine.
        Some(address) if !command.is_internal() => remote::run(command, address, remote, output),
        _ => run_here(command, output),
    }
}

fn run_here(command: Command, output: &Output) -> Outcome {
    match command {
        Command::Build(args) => build::run(&args, output),
        Command::Templates => templates::run(output),
        Command::Rmi(args) => rmi::run(&args, output),
        Command::Mailboxes(args) => mailboxes::run(&args, output),
        Command::Fork(args) => fork::run(&args, output),
        Command::Ls => ls::run(output),
        Command::Inspect(args) => inspect::run(&args, output),
        Command::Exec(args) => exec::run(&args, output),
        Command::Eval(args) => eval::run(&args, output),
        Command::Ping(args) => ping::run(&args, output),
        Command::Cp(args) => cp::run(&args, output),
        Command::Logs(args) => logs::run(&args, output),
        Command::Forward(args) => forward::run(&args, output),
        Command::Route(args) => route::run(args, output),
        Command::Standby(args) => standby::standby(&args, output),
        Command::Resume(args) => standby::resume(&args, output),
        Command::Kill(args) => kill::run(&args, output),
        Command::Verify(args) => verify::run(&args, output),
        Command::Bench(args) => bench::run(&args, output),
        Command::Pool(args) => pool::run(&args, output),
        Command::Serve(args) => serve::run(&args, output),
        Command::Token(args) => token::run(&args, output),
        Command::Cleanup(args) => cleanup::run(&args, output),
        Command::ObserveNetwork => observe_network::run(),
        Command::Doctor => doctor::run(output),
        Command::Completions(args) => completions::run(&args),
        Command::Version => version::run(output),
    }
}

fn open() -> Result<(Home, Store), Failure> {
    let home = Home::from_env()?;
    let store = Store::open(&home.data)?;
    Ok((home, store))
}

/// The same, for a verb that makes something: what is unfinished when a signal asks to end is undone.
fn open_to_make() -> Result<(Home, Store), Failure> {
    let (home, store) = open()?;
    signals::undo_work(&home).map_err(|error| Failure::of("runtime", &error))?;
    Ok((home, store))
}

/// Why it failed: because a signal asked to end, if one did, and nothing is left then.
fn failed(error: impl Coded) -> Failure {
    match stop::requested() {
        Some(signal) => Failure::interrupted(signal, "interrupted; nothing is left behind"),
        None => error.into(),
    }
}

/// A living fork and a channel to its agent.
async fn connect(home: &Home, wanted: &str) -> Result<(ForkRecord, GuestChannel), Failure> {
    let record = forks::get_alive(home, wanted)?;
    let channel = GuestChannel::connect(&forks::dir(home, &record), CONNECT_LIMIT).await?;
    Ok((record, channel))
}

/// Runs what talks to a guest.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::of("runtime", &error))?;
    let result = runtime.block_on(future);
    // A read of standard input that nobody waits for any more must not keep the program.
    runtime.shutdown_background();
    result
}

/// Failures of single items that were reported on standard error as they came.
#[derive(Debug, Default)]
pub(crate) struct Failures(Vec<(String, Failure)>);

impl Failures {
    pub(crate) fn push(&mut self, subject: impl Into<String>, failure: Failure) {
        self.0.push((subject.into(), failure));
    }

    pub(crate) fn add<T, E: Coded>(&mut self, subject: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.push(subject, error.into())).ok()
    }

    pub(crate) fn to_json(&self, key: &str) -> Vec<serde_json::Value> {
        let value =
            |(subject, failure): &(String, Failure)| serde_json::json!({ key: subject, "error": failure.to_value() });
        self.0.iter().map(value).collect()
    }

    /// Nothing if there are none; the failure itself if nothing else was asked for; else one that lists them.
    pub(crate) fn finish(mut self, asked: usize, what: &str) -> Result<(), Failure> {
        match (self.0.len(), asked) {
            (0, _) => Ok(()),
            (1, 1) => self.0.pop().map_or(Ok(()), |(_, failure)| Err(failure)),
            (failed, _) => {
                let code = self.0.first().map_or("failed", |(_, failure)| failure.code()).to_owned();
                let causes = self.0.iter().map(|(subject, failure)| format!("{subject}: {}", failure.on_one_line()));
                let message = format!("{failed} of {asked} {what}");
                Err(Failure::new(code, message).with_causes(causes))
            }
        }
    }
}
