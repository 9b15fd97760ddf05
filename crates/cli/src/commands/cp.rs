//! `cp`

use std::path::Path;

use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::Cp,
    error::Failure,
    output::{Output, clean},
    values::Place,
};

pub fn run(args: &Cp, output: &Output) -> Outcome {
    let (fork, copy) = match (&args.source, &args.destination) {
        (Place::Local(from), Place::Fork { fork, path }) => (fork, Copy::In { from, path }),
        (Place::Fork { fork, path }, Place::Local(to)) => (fork, Copy::Out { path, to }),
        (Place::Local(_), Place::Local(_)) => {
            return Err(Failure::usage("neither side is in a fork; write it as FORK:/PATH"));
        }
        (Place::Fork { .. }, Place::Fork { .. }) => {
            return Err(Failure::usage("both sides are in forks; copy to a local path first, then on from there"));
        }
    };
    let home = host::Home::from_env()?;
    block_on(async {
        let (_, mut channel) = connect(&home, fork).await?;
        match copy {
            Copy::In { from, path } => channel.copy_in(from, path).await?,
            Copy::Out { path, to } => channel.copy_out(path, to).await?,
        }
        Ok(())
    })?;
    if output.json {
        output.document(&json!({ "source": args.source, "destination": args.destination }))?;
    } else {
        let to = clean::line(&args.destination.to_string());
        output.note(&format!("copied to {to}"));
    }
    Ok(0)
}

enum Copy<'a> {
    In { from: &'a Path, path: &'a str },
    Out { path: &'a str, to: &'a Path },
}
