//! `rmi`

use host::{pool, standby};
use identity::Tag;
use serde_json::json;

use super::{Outcome, open};
use crate::{
    args::Rmi,
    output::{Output, PrintError},
};

pub fn run(args: &Rmi, output: &Output) -> Outcome {
    let (home, store) = open()?;
    standby::remove_template(&home, &store, &args.tag)?;
    pool::end(&home, &args.tag)?;
    print(&args.tag, output)?;
    Ok(0)
}

/// That it is gone.
pub fn print(tag: &Tag, output: &Output) -> Result<(), PrintError> {
    if output.json {
        output.document(&json!({ "removed": tag }))
    } else if output.quiet {
        Ok(())
    } else {
        output.line(&format!("removed template {tag}"))
    }
}
