//! `templates`

use std::fmt;

use serde::Deserialize;
use serde_json::json;
use store::{Finding, Manifest};

use super::{Outcome, open};
use crate::{
    error::Failure,
    output::{
        Output, PrintError, format,
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
    } else {
        let row = |manifest: &Manifest| Row {
            tag: manifest.tag.to_string(),
            recipe: manifest.recipe.clone(),
            memory_bytes: manifest.machine.memory_bytes,
            disk_bytes: disk(manifest),
            vcpus: manifest.machine.vcpus,
            engine: Engine { name: manifest.engine.name.to_string(), accel: manifest.engine.accel.to_string() },
            kernel: manifest.kernel.clone(),
            created_ms: manifest.created_ms,
            findings: manifest.findings.clone(),
            findings_left_out: manifest.findings_left_out,
        };
        print(&usable.iter().map(row).collect::<Vec<_>>(), &broken, output)?;
    }
    Ok(0)
}

/// What is shown of a template.
#[derive(Debug, Deserialize)]
pub struct Row {
    pub tag: String,
    pub recipe: String,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub vcpus: u32,
    pub engine: Engine,
    pub kernel: String,
    pub created_ms: u64,
    /// A daemon of an older version tells of none.
    #[serde(default)]
    pub findings: Vec<Finding>,
    #[serde(default)]
    pub findings_left_out: u32,
}

/// What runs machines.
#[derive(Debug, Deserialize)]
pub struct Engine {
    pub name: String,
    pub accel: String,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.accel)
    }
}

/// As text.
pub fn print(templates: &[Row], broken: &[Failure], output: &Output) -> Result<(), PrintError> {
    let mut table = Table::new(&[
        Column::whole("TAG"),
        Column::text("RECIPE"),
        Column::number("MEMORY"),
        Column::number("ON DISK"),
        Column::number("VCPUS"),
        Column::text("ENGINE"),
        Column::text("KERNEL"),
        Column::number("AGE"),
        Column::number("FINDINGS"),
    ]);
    for template in templates {
        table.row([
            template.tag.clone(),
            template.recipe.clone(),
            format::bytes(template.memory_bytes),
            format::bytes(template.disk_bytes),
            template.vcpus.to_string(),
            template.engine.to_string(),
            template.kernel.clone(),
            format::age(template.created_ms),
            (template.findings.len() + template.findings_left_out as usize).to_string(),
        ]);
    }
    if table.is_empty() && broken.is_empty() {
        output.note("no templates; make one with `offshoot build python --tag py`");
    } else if !table.is_empty() {
        output.table(&table)?;
    }
    for failure in broken {
        output.note(&format!("warning: {}", failure.on_one_line()));
    }
    Ok(())
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
        "findings": manifest.findings,
        "findings_left_out": manifest.findings_left_out,
    })
}
