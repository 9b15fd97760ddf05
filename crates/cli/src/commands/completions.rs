//! `completions`

use clap::CommandFactory;

use super::Outcome;
use crate::{
    args::{Cli, Completions},
    output,
};

pub fn run(args: &Completions) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "offshoot", &mut script);
    output::raw(&script)?;
    Ok(0)
}
