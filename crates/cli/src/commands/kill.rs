//! `kill`

use host::forks;
use serde_json::json;

use super::{Failures, Outcome, open};
use crate::{
    args::Kill,
    output::{Output, PrintError, clean},
};

pub fn run(args: &Kill, output: &Output) -> Outcome {
    let (home, _) = open()?;
    let mut failures = Failures::default();
    let mut records = Vec::new();
    let asked = if args.all {
        records = forks::list(&home)?;
        records.len()
    } else {
        for wanted in &args.forks {
            let found = failures.add(wanted, forks::get(&home, wanted));
            // The same fork by name and by id is one fork.
            records.extend(found.filter(|record| !records.contains(record)));
        }
        args.forks.len()
    };
    let mut killed = Vec::new();
    for record in records {
        let was_alive = !record.is_dead();
        if failures.add(record.name.as_str(), forks::kill(&home, &record)).is_some() {
            killed.push((record, was_alive));
        }
    }
    if output.json {
        let killed: Vec<_> = killed
            .iter()
            .map(|(record, was_alive)| json!({ "id": record.id, "name": record.name, "was_alive": was_alive }))
            .collect();
        output.document(&json!({ "killed": killed, "failed": failures.to_json("fork") }))?;
    } else {
        killed.iter().try_for_each(|(record, was_alive)| print(record.name.as_str(), *was_alive, output))?;
        if args.all && asked == 0 {
            output.note("no forks");
        }
    }
    failures.finish(asked, "forks could not be removed")?;
    Ok(0)
}

/// As text.
pub fn print(name: &str, was_alive: bool, output: &Output) -> Result<(), PrintError> {
    if output.quiet {
        return Ok(());
    }
    let how = if was_alive { "killed" } else { "removed (it was dead)" };
    output.line(&format!("{}  {how}", clean::line(name)))
}
