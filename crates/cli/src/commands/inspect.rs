//! `inspect`: the record as it is on disk, and what can only be asked now. It is JSON for people too.

use host::{forks, network};
use serde_json::{Value, json};

use super::{Outcome, open};
use crate::{args::OfFork, error::Failure, output::Output};

pub fn run(args: &OfFork, output: &Output) -> Outcome {
    let (home, _) = open()?;
    let record = forks::get(&home, &args.fork)?;
    let alive = record.is_alive();
    let memory = if alive { forks::memory_of(&record) } else { None };
    let mut value = serde_json::to_value(&record).map_err(|error| Failure::of("internal", &error))?;
    if let Value::Object(fields) = &mut value {
        if let Some(network) = network::now(&record, &forks::dir(&home, &record)) {
            fields.insert("network".into(), json!(network));
        }
        fields.insert("alive".into(), json!(alive));
        fields.insert("state".into(), json!(super::ls::state(&record)));
        fields.insert("directory".into(), json!(forks::dir(&home, &record)));
        fields.insert("private_bytes".into(), json!(memory.map(|memory| memory.0)));
        fields.insert("shared_bytes".into(), json!(memory.map(|memory| memory.1)));
    }
    output.document(&value)?;
    Ok(0)
}
