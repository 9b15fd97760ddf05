//! `version`

use host::ForkRecord;
use serde_json::json;
use store::Manifest;

use super::Outcome;
use crate::output::Output;

pub fn run(output: &Output) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    if output.json {
        output.document(&json!({
            "version": version,
            "formats": {
                "identity": identity::document::FORMAT,
                "template": Manifest::FORMAT,
                "fork": ForkRecord::FORMAT,
            },
        }))?;
    } else {
        output.line(&format!("offshoot {version}"))?;
    }
    Ok(0)
}
