//! Our own forks, as `offshoot bench` measures them.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    CROWD, MEMORY_MIB, Outcome,
    table::{Figures, Table},
};

/// For one command.
const LIMIT_SECONDS: u32 = 900;

pub struct Offshoot {
    pub program: PathBuf,
    pub rounds: usize,
}

impl Offshoot {
    /// Builds a template and forks it, first with no pool; says where the template's root image is.
    pub fn measure(&self, engine: &str, table: &mut Table) -> Option<PathBuf> {
        if let Err(error) = self.build(engine) {
            table.failed(engine, 1, &*error);
            return None;
        }
        for (pool, name) in [(0, "no pool"), (CROWD, "pool")] {
            let what = format!("{engine}, {name}");
            for at_once in [1, CROWD] {
                match self.forks(engine, pool, at_once) {
                    Ok(figures) => table.add(&what, at_once, figures),
                    Err(error) => table.failed(&what, at_once, &*error),
                }
            }
        }
        // Machines that wait would be in the way of whoever is measured next.
        if let Err(error) = self.run(&["pool", engine, "0"]) {
            table.failed(&format!("{engine}: the pool's end"), 0, &*error);
        }
        Some(PathBuf::from(std::env::var_os("OFFSHOOT_DATA_DIR")?).join("templates").join(engine).join("root.img"))
    }

    fn build(&self, engine: &str) -> Outcome<()> {
        let memory = format!("{MEMORY_MIB}M");
        let build = ["build", "busybox", "--tag", engine, "--memory", &memory, "--engine", engine, "--accel", "kvm"];
        self.run(&build).map(drop)
    }

    fn forks(&self, tag: &str, pool: usize, at_once: usize) -> Outcome<Figures> {
        self.run(&["pool", tag, &pool.to_string()])?;
        let result = self.run(&["bench", tag, "-n", &at_once.to_string(), "--rounds", &self.rounds.to_string()])?;
        let row = &result["rows"][0];
        if row["failed"] != 0 {
            return Err(format!("{} forks failed", row["failed"]).into());
        }
        let figures = &row[if at_once == 1 { "acked_ms" } else { "all_acked_ms" }];
        let number = |field: &str| figures[field].as_f64().ok_or_else(|| format!("no {field} in {result}"));
        Ok(Figures { count: self.rounds, p50: number("p50")?, p99: number("p99")? })
    }

    fn run(&self, arguments: &[&str]) -> Outcome<Value> {
        // What hangs is one more thing that failed. SIGTERM, and it undoes what it has done.
        let mut command = Command::new("timeout");
        command.arg(LIMIT_SECONDS.to_string()).arg(&self.program).arg("--json").args(arguments);
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("offshoot {}: {}: {said}", arguments.join(" "), output.status).into());
        }
        Ok(if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout)? })
    }
}
