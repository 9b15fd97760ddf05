//! Forks that exist: list, find, kill.

use std::{fs, io, path::PathBuf, time::Duration};

use engine::ProcessRef;
use store::Store;
use thiserror::Error;

use crate::{
    home::Home,
    limits, network,
    operation::{self, Operation},
    record::{self, Entry, ForkRecord},
    snapshot,
    source::SourceError,
    standby,
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
    /// It is in standby.
    #[error("fork {name} is in standby; bring it back with `offshoot resume {name}`")]
    InStandby {
        /// Its name.
        name: String,
    },
    /// Somebody began something with it and died, and it could not be brought back.
    #[error("fork {name} was left in the middle of standby, resume or a fork of it, and could not be brought back")]
    Interrupted {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: Box<SourceError>,
    },
    /// Its network was not acknowledged in time, and whoever was to end it then has ended itself.
    #[error(
        "fork {name} has been ended: its network was not acknowledged in time (`--on-network-failure keep` leaves such a fork)"
    )]
    NoNetwork {
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
/// [`ForksError::NotFound`], [`ForksError::Dead`], [`ForksError::InStandby`]; [`ForksError::NoNetwork`] if it was to be ended, which it is now;
/// [`ForksError::Interrupted`] if somebody died in the middle of something that concerns it as a whole, and it can not be brought back.
pub fn get_alive(home: &Home, wanted: &str) -> Result<ForkRecord, ForksError> {
    let record = get(home, wanted)?;
    if network::is_to_be_ended(&record, &dir(home, &record)) {
        kill(home, &record)?;
        return Err(ForksError::NoNetwork { name: record.name.to_string() });
    }
    let name = || record.name.to_string();
    let settled = || standby::settle(home, &Store::open(&home.data)?, &record);
    let record = settled().map_err(|source| ForksError::Interrupted { name: name(), source: Box::new(source) })?;
    let name = record.name.to_string();
    match (&record.standby, record.is_alive()) {
        (Some(_), _) => Err(ForksError::InStandby { name }),
        (None, true) => Ok(record),
        (None, false) => Err(ForksError::Dead { name }),
    }
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
    let kill = |process: &ProcessRef| {
        process.kill(KILL_LIMIT).map_err(|source| ForksError::Kill { name: record.name.to_string(), source })
    };
    let own = dir(home, record);
    // Whoever is at it fails for want of a machine; then nobody is, and what there is by then is ended as well.
    let machines = || -> Vec<ProcessRef> {
        let noted = record::read_json::<ProcessRef>(&own.join(record::PROCESS)).ok();
        let now = record::read(&own).ok().map(|record| record.process);
        noted.into_iter().chain(now).chain([record.process.clone()]).collect()
    };
    let lock = |wait| match Operation::begin(&own, wait) {
        Ok(operation) => Ok(operation),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(state("locking the fork")(source)),
    };
    // Before its machine ends, so that whoever watches knows that it has not died.
    let mut operation = lock(false)?;
    machines().iter().try_for_each(kill)?;
    if operation.is_none() {
        operation = lock(true)?;
    }
    machines().iter().try_for_each(kill)?;
    if let Some(operation) = &operation {
        operation.unnoted().map_err(state("looking for the fork's machines"))?.iter().try_for_each(kill)?;
    }
    let now = record::read(&own).unwrap_or_else(|_| record.clone());
    let record = &now;
    limits::remove(&record.cgroups, &record.id).map_err(state("removing the fork's control groups"))?;
    network::end(home, record).map_err(state("removing the fork's network"))?;
    snapshot::remove_drafts(home, &record.id).map_err(state("removing what the fork was"))?;
    snapshot::remove(home, &record.id).map_err(state("removing what the fork was"))?;
    record::remove(home, &own, &record.id).map_err(state("removing the fork's directory"))
}

/// Whether somebody is doing something to it as a whole: it is being put into standby, resumed, forked or removed, or has just been.
#[must_use]
pub fn is_busy(home: &Home, record: &ForkRecord) -> bool {
    let dir = dir(home, record);
    operation::is_held(&dir) || !dir.exists()
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
