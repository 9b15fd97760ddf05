//! `bench`

use std::collections::BTreeMap;

use host::{
    bench::{self, BenchRow, Figures},
    engines, stop,
};
use serde_json::json;

use super::{Outcome, failed, open_to_make, pool};
use crate::{
    args::Bench,
    error::{FAILED, Failure},
    output::{
        Output, PrintError, format,
        progress::Reporter,
        table::{Column, Table},
    },
};

pub fn run(args: &Bench, output: &Output) -> Outcome {
    let (home, store) = open_to_make()?;
    let template = store.get(&args.tag)?;
    let manifest = template.manifest();
    let engine = engines::for_template(manifest)?;
    let mut reporter = Reporter::new(output);
    let rows =
        bench::bench(&home, engine.as_ref(), &template, &args.at_once, args.rounds, args.network, &mut |progress| {
            reporter.show(&progress);
        });
    drop(reporter);
    pool::fill_later(&home, &args.tag);
    let rows = rows.map_err(failed)?;
    if let Some(signal) = stop::requested() {
        // Forks that were given up count as failed in the rows: they would be read as a measurement.
        return Err(Failure::interrupted(signal, "interrupted; nothing is left behind"));
    }
    if output.json {
        let memory = manifest.machine.memory_bytes;
        output.document(
            &json!({ "tag": manifest.tag, "engine": manifest.engine, "memory_bytes": memory, "rows": rows }),
        )?;
    } else {
        print(&rows, output)?;
    }
    Ok(if rows.iter().any(|row| row.failed > 0) { FAILED } else { 0 })
}

fn print(rows: &[BenchRow], output: &Output) -> Result<(), PrintError> {
    output.line("Fork to acknowledged identity, in ms; ALL: from the request to the last fork's")?;
    output.table(&totals(rows))?;
    if output.quiet {
        return Ok(());
    }
    for row in rows {
        output.line(&format!("\nSteps with {} at once, in ms", row.at_once))?;
        output.table(&steps(row))?;
    }
    Ok(())
}

fn totals(rows: &[BenchRow]) -> Table {
    let titles = ["AT ONCE", "FORKS", "P50", "P90", "P99", "MAX", "ALL P50", "ALL MAX", "PRIVATE", "SHARED", "FAILED"];
    let mut table = Table::new(&titles.map(Column::number));
    for row in rows {
        let (one, all) = (row.acked_ms, row.all_acked_ms);
        let times = [one.p50, one.p90, one.p99, one.max, all.p50, all.max].map(format::float_millis);
        let first = [row.at_once.to_string(), row.acked_ms.count.to_string()];
        let last = [format::bytes(row.private_bytes), format::bytes(row.shared_bytes), row.failed.to_string()];
        table.row(first.into_iter().chain(times).chain(last));
    }
    table
}

fn steps(row: &BenchRow) -> Table {
    let mut table = Table::new(&[
        Column::whole("SIDE"),
        Column::text("STEP"),
        Column::number("P50"),
        Column::number("P90"),
        Column::number("P99"),
        Column::number("MAX"),
    ]);
    let mut add = |side: &str, steps: &BTreeMap<String, Figures>| {
        // The longest first: it is the one to work on.
        let mut steps: Vec<_> = steps.iter().collect();
        steps.sort_by(|a, b| b.1.p50.total_cmp(&a.1.p50));
        for (step, figures) in steps {
            let times = [figures.p50, figures.p90, figures.p99, figures.max].map(format::float_millis);
            table.row([side.to_owned(), step.clone()].into_iter().chain(times));
        }
    };
    add("host", &row.host_steps);
    add("guest", &row.guest_steps);
    table
}
