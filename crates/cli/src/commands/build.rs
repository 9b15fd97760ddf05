//! `build`

use std::time::Instant;

use engine::{Accel, EngineName};
use host::{
    build::{self, BuildRequest},
    engines::Forced,
};
use serde::Deserialize;
use serde_json::json;
use store::Finding;

use super::{Outcome, failed, open_to_make, templates::Engine};
use crate::{
    args::{AccelArg, Build, EngineArg},
    output::{Output, PrintError, clean, format, progress::Reporter},
};

pub fn run(args: &Build, output: &Output) -> Outcome {
    let (home, store) = open_to_make()?;
    let request = BuildRequest {
        recipe: args.recipe.clone(),
        tag: args.tag.clone(),
        memory: args.memory,
        vcpus: args.vcpus,
        kernel: args.kernel.clone(),
        forced: Forced {
            engine: args.engine.map(|engine| match engine {
                EngineArg::Kvm => EngineName::Kvm,
                EngineArg::Qemu => EngineName::Qemu,
            }),
            accel: args.accel.map(|accel| match accel {
                AccelArg::Kvm => Accel::Kvm,
                AccelArg::Tcg => Accel::Tcg,
            }),
        },
        strict: args.strict,
    };
    let started = Instant::now();
    let mut reporter = Reporter::new(output);
    let built = build::build(&home, &store, &request, &mut |progress| reporter.show(&progress));
    drop(reporter);
    let manifest = built.map_err(failed)?;
    let disk = store.disk_bytes(&manifest.tag);
    if output.json {
        output.document(&json!({
            "tag": manifest.tag,
            "id": manifest.id,
            "recipe": manifest.recipe,
            "engine": manifest.engine,
            "memory_bytes": manifest.machine.memory_bytes,
            "vcpus": manifest.machine.vcpus,
            "kernel": manifest.kernel,
            "disk_bytes": disk,
            "build_ms": manifest.build_millis,
            "warnings": manifest.warnings,
            "findings": manifest.findings,
            "findings_left_out": manifest.findings_left_out,
        }))?;
        return Ok(0);
    }
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let built = Built {
        tag: manifest.tag.to_string(),
        memory_bytes: manifest.machine.memory_bytes,
        disk_bytes: disk,
        engine: Engine { name: manifest.engine.name.to_string(), accel: manifest.engine.accel.to_string() },
        warnings: manifest.warnings,
        findings: manifest.findings,
        findings_left_out: manifest.findings_left_out,
    };
    print(&built, millis, output)?;
    Ok(0)
}

/// What is shown of a template that was just built.
#[derive(Debug, Deserialize)]
pub struct Built {
    pub tag: String,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub engine: Engine,
    pub warnings: Vec<String>,
    /// A daemon of an older version tells of none.
    #[serde(default)]
    pub findings: Vec<Finding>,
    #[serde(default)]
    pub findings_left_out: u32,
}

/// What the audit has found: what, and below it what to do.
fn note_findings(built: &Built, output: &Output) {
    let told: Vec<String> = built.findings.iter().map(ToString::to_string).collect();
    for warning in built.warnings.iter().filter(|warning| !told.contains(warning)) {
        output.note_wrapped(&format!("warning: {}", clean::line(warning)), 2);
    }
    for (finding, told) in built.findings.iter().zip(&told) {
        output.note_wrapped(&format!("warning: {}", clean::line(told)), 2);
        output.note_wrapped(&format!("  cure: {}", clean::line(&finding.cure)), 8);
    }
    if built.findings_left_out > 0 {
        output.note(&format!("warning: and {} findings more", built.findings_left_out));
    }
}

/// As text.
pub fn print(built: &Built, millis: u64, output: &Output) -> Result<(), PrintError> {
    note_findings(built, output);
    let tag = clean::line(&built.tag);
    output.line(&format!(
        "{}  {} memory, {} on disk, {} ({}), built in {}",
        output.style.bold(&tag),
        format::bytes(built.memory_bytes),
        format::bytes(built.disk_bytes),
        clean::line(&built.engine.name),
        clean::line(&built.engine.accel),
        format::seconds(millis),
    ))?;
    output.note(&format!("next: offshoot fork {tag}"));
    Ok(())
}
