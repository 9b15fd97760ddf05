//! `offshoot`: fork a warm sandbox, every fork wakes up as itself.
#![forbid(unsafe_code)]

mod args;
mod assignments;
mod commands;
mod error;
mod output;
mod remote;
mod signals;
mod terminal;
mod usage;
mod values;

use std::{env, io, io::IsTerminal, process::ExitCode};

use clap::Parser;

use args::Cli;
use output::{Output, style::Style};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error, env::args_os().skip(1)),
    };
    let output = Output::new(cli.json, cli.quiet);
    match commands::run(cli.command, &cli.remote, &output) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.report(cli.json, Style::of(io::stderr().is_terminal()));
            ExitCode::from(failure.exit())
        }
    }
}
