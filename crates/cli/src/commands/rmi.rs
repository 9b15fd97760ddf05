//! `rmi`

use host::pool;
use serde_json::json;

use super::{Outcome, open};
use crate::{args::Rmi, output::Output};

pub fn run(args: &Rmi, output: &Output) -> Outcome {
    let (home, store) = open()?;
    store.remove(&args.tag)?;
    pool::end(&home, &args.tag)?;
    if output.json {
        output.document(&json!({ "removed": args.tag }))?;
    } else if !output.quiet {
        output.line(&format!("removed template {}", args.tag))?;
    }
    Ok(0)
}
