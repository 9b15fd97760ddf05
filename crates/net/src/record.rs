//! What was made for a fork, by exact name.

use std::{
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use identity::ForkId;
use serde::{Deserialize, Serialize};

use crate::{
    address::Addresses,
    lease::LeaseRecord,
    policy::Policy,
    state::{self, Locked, State},
    tap::TapOptions,
};

/// How long whoever works on a link is waited for. A link that is taken up, opened or removed is held for milliseconds; only the one of a
/// fork that is being made is held for longer, and that is nobody else's.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// How often a lock that is held is tried again: locks of other processes can not be waited for with a deadline in any other way.
const RETRY: Duration = Duration::from_millis(2);

/// How a link is written down. It is written before anything is made, so what is made is always in it; what is in it may be
/// not made yet, or removed already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkRecord {
    /// The fork.
    pub id: ForkId,
    /// Its addresses.
    pub addresses: Addresses,
    /// Its tap.
    pub tap: TapOptions,
    /// For whom it was made: the directory that says which forks there are. Nobody else judges whether it is still needed.
    #[serde(default)]
    pub home: PathBuf,
    /// The policy it was opened with; none as long as it is closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
}

impl LinkRecord {
    /// The name of the wire's end in the host's namespace: at most 15 characters are allowed, so it has 48 of the id's random bits.
    #[must_use]
    pub fn wire(&self) -> String {
        wire(&self.id)
    }

    /// The lease.
    #[must_use]
    pub fn lease(&self) -> LeaseRecord {
        LeaseRecord { owner: self.id.clone(), addresses: self.addresses }
    }

    pub(crate) fn namespace(&self, state: &State) -> PathBuf {
        namespace(state, &self.id)
    }

    pub(crate) fn write(&self, state: &State) -> io::Result<()> {
        state::replace_json(&path(state, &self.id), self)
    }

    pub(crate) fn read(state: &State, id: &ForkId) -> io::Result<Option<Self>> {
        state::read_json(&path(state, id))
    }
}

/// The wire's name of a fork.
pub(crate) fn wire(id: &ForkId) -> String {
    format!("ofs{}", id.as_str().get(..12).unwrap_or_default())
}

/// Where a fork's namespace is mounted.
pub(crate) fn namespace(state: &State, id: &ForkId) -> PathBuf {
    state.namespaces().join(id.as_str())
}

/// Where a fork's record is.
pub(crate) fn path(state: &State, id: &ForkId) -> PathBuf {
    state.links().join(format!("{id}.json"))
}

/// The lock of a fork's link: held while it is made, changed or removed. Whoever has it is waited for as long as `patience` says; `None`
/// if it is still held then.
pub(crate) fn lock(state: &State, id: &ForkId, patience: Duration) -> io::Result<Option<Locked>> {
    let path = lock_path(state, id);
    let deadline = Instant::now() + patience;
    loop {
        // Who removed the link removed the file too. Its lock is nobody's then, and another process may hold that of a new file.
        if let Some(lock) = Locked::unless_held(&path)?
            && lock.is_still(&path)?
        {
            return Ok(Some(lock));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(RETRY);
    }
}

pub(crate) fn lock_path(state: &State, id: &ForkId) -> PathBuf {
    state.links().join(format!(".lock-{id}"))
}

/// The forks that have a record. One whose record can not be read is among them.
pub(crate) fn all(state: &State) -> io::Result<Vec<ForkId>> {
    let id = |name: String| ForkId::parse(Path::new(&name).file_stem()?.to_str()?).ok();
    Ok(state::entries(&state.links())?.into_iter().filter_map(id).collect())
}
