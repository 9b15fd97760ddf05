//! `templates`

use serde_json::json;
use store::Manifest;

use super::{Outcome, open};
use crate::{
    error::Failure,
    output::{
        Output, format,
        table::{Column, Table},
    },
};

pub fn run(output: &Output) -> Outcome {
    let (_, store) = open()?;
    let (mut usable, mut broken) = (Vec::new(), Vec::new());
    for template in store.list()? {
        match template {
            Ok(manifest) => usable.push(manifest),
            Err(error) => broken.push(Failure::from(error)),
        }
    }
    let disk = |manifest: &Manifest| store.disk_bytes(&manifest.tag);
    if output.json {
        let templates: Vec<_> = usable.iter().map(|manifest| describe(manifest, disk(manifest))).collect();
        let broken: Vec<_> = broken.iter().map(Failure::to_value).collect();
        output.document(&json!({ "templates": templates, "broken": broken }))?;
        return Ok(0);
    }
    let mut table = Table::new(&[
        Column::whole("TAG"),
        Column::text("RECIPE"),
        Column::number("MEMORY"),
        Column::number("ON DISK"),
        Column::number("VCPUS"),
        Column::text("ENGINE"),
        Column::text("KERNEL"),
        Column::number("AGE"),
    ]);
    for manifest in &usable {
        table.row([
            manifest.tag.to_string(),
            manifest.recipe.clone(),
            format::bytes(manifest.machine.memory_bytes),
            format::bytes(disk(manifest)),
            manifest.machine.vcpus.to_string(),
            format!("{} {}", manifest.engine.name, manifest.engine.accel),
            manifest.kernel.clone(),
            format::age(manifest.created_ms),
        ]);
    }
    if table.is_empty() && broken.is_empty() {
        output.note("no templates; make one with `offshoot build python --tag py`");
    } else if !table.is_empty() {
        output.table(&table)?;
    }
    for failure in &broken {
        output.note(&format!("warning: {}", failure.on_one_line()));
    }
    Ok(0)
}

fn describe(manifest: &Manifest, disk_bytes: u64) -> serde_json::Value {
    json!({
        "tag": manifest.tag,
        "id": manifest.id,
        "recipe": manifest.recipe,
        "engine": manifest.engine,
        "memory_bytes": manifest.machine.memory_bytes,
        "vcpus": manifest.machine.vcpus,
        "kernel": manifest.kernel,
        "disk_bytes": disk_bytes,
        "created_ms": manifest.created_ms,
        "build_ms": manifest.build_millis,
        "warnings": manifest.warnings,
    })
}
