//! `inspect`: the record as it is on disk, and what can only be asked now. It is JSON for people too.

use std::time::Duration;

use host::{ForkRecord, Home, devtools, forks, network};
use serde_json::{Value, json};

use super::{Outcome, block_on, open};
use crate::{args::OfFork, error::Failure, output::Output};

/// Time for a browser to say where its DevTools are.
const DEVTOOLS_LIMIT: Duration = Duration::from_secs(5);

pub fn run(args: &OfFork, output: &Output) -> Outcome {
    let (home, _) = open()?;
    let record = forks::get(&home, &args.fork)?;
    let alive = record.is_alive();
    let memory = if alive { forks::memory_of(&record) } else { None };
    let devtools = if alive { devtools(&home, &record)? } else { None };
    let mut value = serde_json::to_value(&record).map_err(|error| Failure::of("internal", &error))?;
    if let Value::Object(fields) = &mut value {
        if let Some(network) = network::now(&record, &forks::dir(&home, &record)) {
            fields.insert("network".into(), json!(network));
        }
        if let Some(devtools) = devtools {
            fields.insert("devtools".into(), devtools);
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

/// Where its DevTools are, and how they are reached. A browser that does not say is no failure of this command.
fn devtools(home: &Home, record: &ForkRecord) -> Result<Option<Value>, Failure> {
    let Some(port) = record.devtools_port else { return Ok(None) };
    let mut shown = json!({ "port": port, "forward": format!("offshoot forward {} {port}", record.name) });
    match block_on(async { Ok(devtools::of(home, record, port, DEVTOOLS_LIMIT).await) })? {
        Ok(path) => {
            shown["path"] = json!(path.as_str());
            shown["url"] = json!(format!("ws://127.0.0.1:{port}{}", path.as_str()));
        }
        Err(error) => shown["error"] = json!(error.to_string()),
    }
    Ok(Some(shown))
}
