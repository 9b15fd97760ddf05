//! `ls`

use std::collections::BTreeMap;

use host::{ForkRecord, forks, network::Mode};
use serde_json::json;

use super::{Outcome, open};
use crate::output::{
    Output, PrintError, clean, format,
    table::{Column, Table},
};

/// What is shown of a fork.
#[derive(Debug)]
pub struct Row {
    pub name: String,
    pub id: String,
    pub template: String,
    pub state: String,
    pub address: Option<String>,
    pub created_ms: u64,
    /// Bytes for itself, and shared.
    pub memory: Option<(u64, u64)>,
    pub labels: BTreeMap<String, String>,
}

impl From<&ForkRecord> for Row {
    fn from(record: &ForkRecord) -> Self {
        Self {
            name: record.name.to_string(),
            id: record.id.to_string(),
            template: record.template.to_string(),
            state: state(record).to_owned(),
            address: address(record),
            created_ms: record.created_ms,
            memory: if record.is_alive() { forks::memory_of(record) } else { None },
            labels: record.labels.clone(),
        }
    }
}

pub fn run(output: &Output) -> Outcome {
    let (home, _) = open()?;
    let forks = forks::list(&home)?;
    if output.json {
        let forks: Vec<_> = forks.iter().map(describe).collect();
        output.document(&json!({ "forks": forks }))?;
    } else {
        print(&forks.iter().map(Row::from).collect::<Vec<_>>(), output)?;
    }
    Ok(0)
}

/// As text.
pub fn print(forks: &[Row], output: &Output) -> Result<(), PrintError> {
    if output.quiet {
        return forks.iter().try_for_each(|fork| output.line(&clean::line(&fork.name)));
    }
    if forks.is_empty() {
        output.note("no forks; make one with `offshoot fork TAG` (`offshoot templates` lists the tags)");
        return Ok(());
    }
    output.table(&table(forks))
}

fn table(forks: &[Row]) -> Table {
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
    let none = || "-".to_owned();
    for fork in forks {
        let labels: Vec<String> = fork.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        table.row([
            fork.name.clone(),
            fork.id.clone(),
            fork.template.clone(),
            fork.state.clone(),
            fork.address.clone().unwrap_or_else(none),
            format::age(fork.created_ms),
            fork.memory.map_or_else(none, |(private, _)| format::bytes(private)),
            fork.memory.map_or_else(none, |(_, shared)| format::bytes(shared)),
            labels.join(","),
        ]);
    }
    table
}

pub(super) fn state(record: &ForkRecord) -> &'static str {
    match (&record.standby, record.is_alive()) {
        (Some(_), _) => "standby",
        (None, true) => "alive",
        (None, false) => "dead",
    }
}

/// Where a fork is reached; one without privileges has an address that only itself knows.
fn address(record: &ForkRecord) -> Option<String> {
    let network = record.network.as_ref().filter(|network| network.mode == Mode::Tap);
    Some(network?.ipv4?.to_string())
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
        "state": state(record),
        "standby": record.standby,
        "source": record.source,
        "created_ms": record.created_ms,
        "engine": record.engine,
        "private_bytes": memory.map(|memory| memory.0),
        "shared_bytes": memory.map(|memory| memory.1),
        "labels": record.labels,
        "network": record.network,
    })
}
