//! `doctor`

use host::{
    Home,
    doctor::{self, Finding, Status},
};
use serde_json::json;

use super::Outcome;
use crate::{
    error::FAILED,
    output::{Output, PrintError, clean},
};

pub fn run(output: &Output) -> Outcome {
    let findings = doctor::run(&Home::from_env()?);
    let missing = findings.iter().any(|finding| finding.status == Status::Missing);
    if output.json {
        output.document(&json!({ "ready": !missing, "findings": findings }))?;
    } else {
        print(&findings, output)?;
    }
    Ok(if missing { FAILED } else { 0 })
}

fn print(findings: &[Finding], output: &Output) -> Result<(), PrintError> {
    let style = output.style;
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or_default();
    for finding in findings {
        let mark = match finding.status {
            Status::Ok if output.quiet => continue,
            Status::Ok => style.good("✓"),
            Status::Warn => style.warning("!"),
            Status::Missing => style.bad("✗"),
        };
        output.line(&format!("{mark} {:width$}  {}", finding.name, clean::line(&finding.detail)))?;
        if let Some(next) = &finding.next {
            output.line(&format!("  {:width$}  {} {}", "", style.faint("→"), clean::line(next)))?;
        }
    }
    Ok(())
}
