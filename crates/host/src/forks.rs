//! Forks that exist: list, find, kill.

use std::{fs, io, path::PathBuf, time::Duration};

use engine::ProcessRef;
use thiserror::Error;

use crate::{
    home::Home,
    limits, network,
    record::{self, Entry, ForkRecord},
};

/// Time for a killed process to be gone; the kernel has to free its memory first.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Why something could not be done to a fork.
#[derive(Debug, Error)]
pub enum ForksError {
    /// There is no such fork.
    #[error("there is no fork {0:?}; see `offshoot ls`")]
    NotFound(String),
    /// It exists, but its machine has ended.
    #[error("fork {name} is dead: its machine has ended; remove it with `offshoot kill {name}`")]
    Dead {
        /// Its name.
        name: String,
    },
    /// Its machine could not be ended.
    #[error("the machine of fork {name} could not be ended")]
    Kill {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The state directory could not be read or written.
    #[error("{step} failed")]
    State {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// All forks, alive or dead, oldest first.
///
/// # Errors
/// If the state directory can not be read.
pub fn list(home: &Home) -> Result<Vec<ForkRecord>, ForksError> {
    let entries = record::entries(home).map_err(|source| ForksError::State { step: "reading the forks", source })?;
    let mut forks: Vec<ForkRecord> = entries
        .into_iter()
        .filter_map(|entry| match entry {
            Entry::Fork(record) => Some(*record),
            _ => None,
        })
        .collect();
    forks.sort_by(|a, b| (a.created_ms, &a.name).cmp(&(b.created_ms, &b.name)));
    Ok(forks)
}

/// A fork by name, id, or unique beginning of its id.
///
/// # Errors
/// [`ForksError::NotFound`].
pub fn get(home: &Home, wanted: &str) -> Result<ForkRecord, ForksError> {
    record::find(home, wanted)
        .map_err(|source| ForksError::State { step: "reading the forks", source })?
        .ok_or_else(|| ForksError::NotFound(wanted.chars().take(80).collect()))
}

/// A fork whose machine is alive.
///
/// # Errors
/// [`ForksError::NotFound`], [`ForksError::Dead`].
pub fn get_alive(home: &Home, wanted: &str) -> Result<ForkRecord, ForksError> {
    let record = get(home, wanted)?;
    if record.is_alive() { Ok(record) } else { Err(ForksError::Dead { name: record.name.to_string() }) }
}

/// The directory of a fork: its sockets and logs.
#[must_use]
pub fn dir(home: &Home, record: &ForkRecord) -> PathBuf {
    home.forks().join(record.id.as_str())
}

/// Ends a fork and removes everything it had. It is no error if its machine is gone already.
///
/// # Errors
/// [`ForksError`]; what is left can be removed by another try.
pub fn kill(home: &Home, record: &ForkRecord) -> Result<(), ForksError> {
    let state = |step| move |source| ForksError::State { step, source };
    record.process.kill(KILL_LIMIT).map_err(|source| ForksError::Kill { name: record.name.to_string(), source })?;
    limits::remove(&record.cgroups, &record.id).map_err(state("removing the fork's control groups"))?;
    network::end(home, record).map_err(state("removing the fork's network"))?;
    record::remove(home, &dir(home, record), &record.id).map_err(state("removing the fork's directory"))
}

/// Bytes of memory that this fork has for itself, and of the rest of what it maps. Pages of files, those of its template's
/// memory above all, are the page cache's even while only one fork maps them, so they count as shared.
#[must_use]
pub fn memory_of(record: &ForkRecord) -> Option<(u64, u64)> {
    memory_of_process(&record.process)
}

pub(crate) fn memory_of_process(process: &ProcessRef) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).ok()?;
    let field = |wanted: &str| -> Option<u64> {
        let (_, rest) = text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| *name == wanted)?;
        Some(rest.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    // What it copied or made itself. A page of a file that has not reached the disk yet would count as private and dirty.
    let own = field("Anonymous")?;
    Some((own + field("Swap").unwrap_or(0), field("Rss")?.saturating_sub(own)))
}
