//! `build`

use std::time::Instant;

use engine::{Accel, EngineName};
use host::{
    build::{self, BuildRequest},
    engines::Forced,
};
use serde_json::json;

use super::{Outcome, failed, open_to_make};
use crate::{
    args::{AccelArg, Build, EngineArg},
    output::{Output, clean, format, progress::Reporter},
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
    };
    let started = Instant::now();
    let mut reporter = Reporter::new(output);
    let built = build::build(&home, &store, &request, &mut |progress| reporter.show(&progress));
    drop(reporter);
    let manifest = built.map_err(failed)?;
    let disk = store.disk_bytes(&manifest.tag);
    for warning in &manifest.warnings {
        output.note(&format!("warning: {}", clean::line(warning)));
    }
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
        }))?;
        return Ok(0);
    }
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    output.line(&format!(
        "{}  {} memory, {} on disk, {} ({}), built in {}",
        output.style.bold(manifest.tag.as_str()),
        format::bytes(manifest.machine.memory_bytes),
        format::bytes(disk),
        manifest.engine.name,
        manifest.engine.accel,
        format::seconds(millis),
    ))?;
    output.note(&format!("next: offshoot fork {}", manifest.tag));
    Ok(0)
}
