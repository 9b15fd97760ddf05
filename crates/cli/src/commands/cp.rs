//! `cp`

use std::path::Path;

use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::Cp,
    error::Failure,
    output::{Output, PrintError, clean},
    values::Place,
};

pub fn run(args: &Cp, output: &Output) -> Outcome {
    let (fork, copy) = sides(args)?;
    let home = host::Home::from_env()?;
    block_on(async {
        let (_, mut channel) = connect(&home, fork).await?;
        match copy {
            Copy::In { from, path } => channel.copy_in(from, path).await?,
            Copy::Out { path, to } => channel.copy_out(path, to).await?,
        }
        Ok(())
    })?;
    print(args, output)?;
    Ok(0)
}

/// Which fork, and which way.
pub fn sides(args: &Cp) -> Result<(&str, Copy<'_>), Failure> {
    match (&args.source, &args.destination) {
        (Place::Local(from), Place::Fork { fork, path }) => Ok((fork, Copy::In { from, path })),
        (Place::Fork { fork, path }, Place::Local(to)) => Ok((fork, Copy::Out { path, to })),
        (Place::Local(_), Place::Local(_)) => Err(Failure::usage("neither side is in a fork; write it as FORK:/PATH")),
        (Place::Fork { .. }, Place::Fork { .. }) => {
            Err(Failure::usage("both sides are in forks; copy to a local path first, then on from there"))
        }
    }
}

/// That it is done.
pub fn print(args: &Cp, output: &Output) -> Result<(), PrintError> {
    if output.json {
        return output.document(&json!({ "source": args.source, "destination": args.destination }));
    }
    output.note(&format!("copied to {}", clean::line(&args.destination.to_string())));
    Ok(())
}

/// Which way.
#[derive(Debug)]
pub enum Copy<'a> {
    In { from: &'a Path, path: &'a str },
    Out { path: &'a str, to: &'a Path },
}
