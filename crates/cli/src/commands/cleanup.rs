//! `cleanup`: a dry run unless `--yes`. What may live goes with `--force` only.

use host::cleanup::{self, Leftover, Plan};
use serde_json::{Value, json};

use super::{Failures, Outcome, open};
use crate::{
    args::Cleanup,
    error::Failure,
    output::{
        Output, PrintError, format,
        table::{Column, Table},
    },
};

pub fn run(args: &Cleanup, output: &Output) -> Outcome {
    let (home, store) = open()?;
    let plan = cleanup::plan(&home, &store).map_err(|error| {
        Failure::of("cleanup_failed", &error).with_next("check the directories that `offshoot --help` names")
    })?;
    let mut failures = Failures::default();
    let mut removed = Vec::new();
    let forced = if args.force { plan.unclear.as_slice() } else { &[] };
    if args.yes {
        for leftover in plan.leftovers.iter().chain(forced) {
            match cleanup::carry_out(&home, leftover) {
                Ok(()) => removed.push(leftover),
                Err(error) => failures.push(leftover.path.display().to_string(), Failure::of("cleanup_failed", &error)),
            }
        }
    }
    if output.json {
        let found = |leftover: &Leftover| {
            json!({
                "what": leftover.what,
                "reason": leftover.reason,
                "path": leftover.path,
                "removed": removed.contains(&leftover),
            })
        };
        output.document(&json!({
            "dry_run": !args.yes,
            "leftovers": plan.leftovers.iter().map(found).collect::<Vec<Value>>(),
            "unclear": plan.unclear.iter().map(found).collect::<Vec<Value>>(),
            "being_made": plan.being_made,
            "foreign": plan.foreign,
            "failed": failures.to_json("path"),
        }))?;
    } else {
        print(args, &plan, removed.len(), output)?;
    }
    failures.finish(plan.leftovers.len() + forced.len(), "leftovers could not be removed")?;
    Ok(0)
}

fn print(args: &Cleanup, plan: &Plan, removed: usize, output: &Output) -> Result<(), PrintError> {
    let mut table = Table::new(&[Column::text("WHAT"), Column::text("WHY"), Column::text("WHERE")]);
    let forced = if args.force { plan.unclear.as_slice() } else { &[] };
    for leftover in plan.leftovers.iter().chain(forced) {
        table.row([leftover.what.as_str(), &leftover.reason, &leftover.path.display().to_string()]);
    }
    if !table.is_empty() {
        output.table(&table)?;
    }
    if !args.force {
        for Leftover { what, reason, path, .. } in &plan.unclear {
            output.note(&format!("left alone, it may live: {what}, {reason}: {}", path.display()));
        }
        if !plan.unclear.is_empty() {
            output.note(
                "`offshoot cleanup --yes --force` ends and removes these; a newer offshoot may be able to read them",
            );
        }
    }
    for path in &plan.being_made {
        output.note(&format!("left alone, it is being made: {}", path.display()));
    }
    for path in &plan.foreign {
        output.note(&format!("left alone, it is not offshoot's: {}", path.display()));
    }
    let chosen = plan.leftovers.len() + forced.len();
    let found = format::count(chosen, "leftover");
    match (args.yes, chosen == 0) {
        (_, true) => output.note("nothing to clean up"),
        (false, false) => output.note(&format!("{found}; nothing was removed: `offshoot cleanup --yes` does")),
        (true, false) => output.note(&format!("removed {removed} of {found}")),
    }
    Ok(())
}
