//! `standby` and `resume`

use host::{
    ForkRecord, Home, forks,
    standby::{self, Moved, StandbyError},
    stop,
};
use serde_json::json;
use store::Store;

use super::{Failures, Outcome, open_to_make};
use crate::{
    args::Forks,
    error::Failure,
    output::{Output, PrintError, clean, format},
};

pub fn standby(args: &Forks, output: &Output) -> Outcome {
    each(args, output, "standby", standby::standby)
}

pub fn resume(args: &Forks, output: &Output) -> Outcome {
    each(args, output, "resumed", standby::resume)
}

fn each(
    args: &Forks,
    output: &Output,
    what: &str,
    verb: fn(&Home, &Store, &ForkRecord) -> Result<Moved, StandbyError>,
) -> Outcome {
    let (home, store) = open_to_make()?;
    let mut failures = Failures::default();
    let mut done: Vec<Moved> = Vec::new();
    for wanted in &args.forks {
        if stop::requested().is_some() {
            break;
        }
        let Some(record) = failures.add(wanted, forks::get(&home, wanted)) else { continue };
        // The same fork by name and by id is one fork.
        if !done.iter().any(|moved| moved.record.id == record.id) {
            done.extend(failures.add(wanted, verb(&home, &store, &record)));
        }
    }
    if output.json {
        let describe = |moved: &Moved| {
            json!({
                "id": moved.record.id,
                "name": moved.record.name,
                "micros": moved.micros,
                "standby": moved.record.standby,
                "data_bytes": moved.size.map(|size| size.data),
                "zero_bytes": moved.size.map(|size| size.zeros),
            })
        };
        let forks: Vec<_> = done.iter().map(describe).collect();
        output.document(&json!({ "forks": forks, "failed": failures.to_json("fork") }))?;
    } else {
        for moved in &done {
            let disk_bytes = moved.record.standby.as_ref().map(|standby| standby.disk_bytes);
            print(moved.record.name.as_str(), what, moved.micros, disk_bytes, output)?;
        }
    }
    if let Some(signal) = stop::requested().filter(|_| done.len() < args.forks.len()) {
        return Err(Failure::interrupted(signal, "interrupted; forks that are not named above are as they were"));
    }
    failures.finish(args.forks.len(), "forks could not be moved")?;
    Ok(0)
}

/// As text.
pub fn print(name: &str, what: &str, micros: u64, disk_bytes: Option<u64>, output: &Output) -> Result<(), PrintError> {
    if output.quiet {
        return Ok(());
    }
    let size = disk_bytes.map(|bytes| format!(", {} on disk", format::bytes(bytes))).unwrap_or_default();
    output.line(&format!("{}  {what} in {} ms{size}", clean::line(name), format::millis(micros)))
}
