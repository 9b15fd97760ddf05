//! What the audit of a template has found (docs/audit.md).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Something in a template that all its forks would share, or that none of them has. It never holds the value of a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Snake case, stable: `tcp_connection`, `secret_in_environment`…
    pub kind: String,
    /// Whose it is; `None` where it is about no process.
    pub process: Option<FoundProcess>,
    /// What the process does, to be read behind its name.
    pub reason: String,
    /// What to do about it.
    pub cure: String,
}

/// A process of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundProcess {
    /// Its id in the guest.
    pub pid: u32,
    /// Its command's name, as it chose it.
    pub name: String,
    /// The recipe's service that it belongs to, or `runtime`; `None` for what neither is.
    pub service: Option<String>,
}

impl fmt::Display for FoundProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, name, service } = self;
        match service.as_deref() {
            None => write!(f, "{name} (process {pid})"),
            Some("runtime") => write!(f, "{name} (process {pid} of the runtime)"),
            Some(service) => write!(f, "{name} (process {pid} of service {service})"),
        }
    }
}

/// On one line: kind, process, reason.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some(process) => write!(f, "{}: {process} {}", self.kind, self.reason),
            None => write!(f, "{}: {}", self.kind, self.reason),
        }
    }
}
