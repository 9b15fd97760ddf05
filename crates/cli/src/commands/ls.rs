//! `ls`

use host::{ForkRecord, forks, network::Mode};
use serde_json::json;

use super::{Outcome, open};
use crate::output::{
    Output, format,
    table::{Column, Table},
};

pub fn run(output: &Output) -> Outcome {
    let (home, _) = open()?;
    let forks = forks::list(&home)?;
    if output.json {
        let forks: Vec<_> = forks.iter().map(describe).collect();
        output.document(&json!({ "forks": forks }))?;
        return Ok(0);
    }
    if output.quiet {
        for record in &forks {
            output.line(record.name.as_str())?;
        }
        return Ok(0);
    }
    if forks.is_empty() {
        output.note("no forks; make one with `offshoot fork TAG` (`offshoot templates` lists the tags)");
        return Ok(0);
    }
    output.table(&table(&forks))?;
    Ok(0)
}

fn table(forks: &[ForkRecord]) -> Table {
    let mut table = Table::new(&[
        Column::whole("NAME"),
        Column::text("ID"),
        Column::text("TEMPLATE"),
        Column::text("STATE"),
        Column::text("ADDRESS"),
        Column::number("AGE"),
        Column::number("PRIVATE"),
        Column::number("SHARED"),
        Column::text("LABELS"),
    ]);
    for record in forks {
        let alive = record.is_alive();
        let memory = if alive { forks::memory_of(record) } else { None };
        let labels: Vec<String> = record.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        table.row([
            record.name.to_string(),
            record.id.to_string(),
            record.template.to_string(),
            if alive { "alive" } else { "dead" }.to_owned(),
            address(record),
            format::age(record.created_ms),
            memory.map_or_else(|| "-".to_owned(), |(private, _)| format::bytes(private)),
            memory.map_or_else(|| "-".to_owned(), |(_, shared)| format::bytes(shared)),
            labels.join(","),
        ]);
    }
    table
}

/// Where a fork is reached; one without privileges has an address that only itself knows.
fn address(record: &ForkRecord) -> String {
    let network = record.network.as_ref().filter(|network| network.mode == Mode::Tap);
    network.and_then(|network| network.ipv4).map_or_else(|| "-".to_owned(), |address| address.to_string())
}

fn describe(record: &ForkRecord) -> serde_json::Value {
    let alive = record.is_alive();
    let memory = if alive { forks::memory_of(record) } else { None };
    json!({
        "id": record.id,
        "name": record.name,
        "template": record.template,
        "template_id": record.template_id,
        "alive": alive,
        "created_ms": record.created_ms,
        "engine": record.engine,
        "private_bytes": memory.map(|memory| memory.0),
        "shared_bytes": memory.map(|memory| memory.1),
        "labels": record.labels,
        "network": record.network,
    })
}
