//! Leases of addresses, on disk, for any number of processes.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use identity::ForkId;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    address::{Addresses, Pool},
    state::{self, Locked, State},
};

/// How long an address rests before it is given again. What talked to its last holder (a neighbour's cache, a connection in
/// `TIME_WAIT`, which is 60 s on Linux) has forgotten it by then.
pub const DEFAULT_PAUSE: Duration = Duration::from_secs(60);

/// How many addresses are looked at one by one before the whole directory is read.
const NEAR: u64 = 16;

/// Every so many leases, the files of addresses that have rested are removed.
const TIDY_EVERY: u64 = 256;

/// Why there is no lease.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// All addresses are held or rest.
    #[error(
        "the address pool {range} is exhausted: {held} addresses are held and {resting} rest for up to {pause:?}; \
         `offshoot cleanup` shows what no fork needs any more, or configure a larger pool"
    )]
    Exhausted {
        /// The pool.
        range: ipnet::Ipv4Net,
        /// How many addresses are held.
        held: u64,
        /// How many were given back and can not be given again yet.
        resting: u64,
        /// How long an address rests.
        pause: Duration,
    },
    /// The directory can not be used.
    #[error("{doing} {path}")]
    File {
        /// What was done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A lease as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    /// Who holds it.
    pub owner: ForkId,
    /// What it gives.
    pub addresses: Addresses,
}

/// What a lease's file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// The boot it was written in. Nothing of an earlier boot counts: its forks are gone.
    boot: String,
    /// The holder; none if it rests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<ForkId>,
    /// When it was given or given back, in milliseconds since the boot.
    since_ms: u64,
}

/// All leases of a state directory.
#[derive(Debug, Clone)]
pub struct Leases {
    dir: PathBuf,
    pause: Duration,
}

/// A lease that is given back on drop, unless it is [kept](Self::keep).
#[derive(Debug)]
pub struct Lease {
    leases: Leases,
    record: Option<LeaseRecord>,
}

/// Milliseconds since the boot.
fn now_ms() -> u64 {
    u64::try_from(state::since_boot().as_millis()).unwrap_or(u64::MAX)
}

fn file<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> LeaseError + use<'a> {
    move |source| LeaseError::File { doing, path: path.to_owned(), source }
}

impl Leases {
    /// The leases below a directory, which is made if absent. An address rests for `pause` after it was given back.
    ///
    /// # Errors
    /// [`LeaseError::File`].
    pub fn open(root: &Path, pause: Duration) -> Result<Self, LeaseError> {
        let state = State::open(root).map_err(file("making the directory", root))?;
        Ok(Self { dir: state.leases(), pause })
    }

    /// Leases the next free address of a pool.
    ///
    /// # Errors
    /// [`LeaseError`].
    pub fn lease(&self, pool: &Pool, owner: &ForkId) -> Result<Lease, LeaseError> {
        let _lock = self.lock()?;
        let boot = self.boot()?;
        let place = self.next_free(pool, &boot)?;
        let path = self.dir.join(place.to_string());
        let entry = Entry { boot, owner: Some(owner.clone()), since_ms: now_ms() };
        state::replace_json(&path, &entry).map_err(file("writing the lease", &path))?;
        let record = LeaseRecord { owner: owner.clone(), addresses: pool.addresses(place) };
        Ok(Lease { leases: self.clone(), record: Some(record) })
    }

    /// Gives a lease back, if its owner still has it. From then on its address rests.
    ///
    /// # Errors
    /// [`LeaseError::File`].
    pub fn give_back(&self, lease: &LeaseRecord) -> Result<(), LeaseError> {
        self.give_back_address(lease.addresses.v4, &lease.owner)
    }

    pub(crate) fn give_back_address(&self, address: Ipv4Addr, owner: &ForkId) -> Result<(), LeaseError> {
        let _lock = self.lock()?;
        let path = self.dir.join(address.to_string());
        let entry: Option<Entry> = state::read_json(&path).map_err(file("reading the lease", &path))?;
        let Some(entry) = entry.filter(|entry| entry.owner.as_ref() == Some(owner)) else { return Ok(()) };
        let resting = Entry { owner: None, since_ms: now_ms(), ..entry };
        state::replace_json(&path, &resting).map_err(file("giving back the lease", &path))
    }

    /// Who holds what, and since when (since the boot). A lease whose file can not be read is not in it, and is not given to anybody.
    ///
    /// # Errors
    /// [`LeaseError::File`].
    pub fn held(&self) -> Result<BTreeMap<Ipv4Addr, (ForkId, Duration)>, LeaseError> {
        let boot = self.boot()?;
        let held = |(address, entry): (Ipv4Addr, Option<Entry>)| {
            let entry = entry.filter(|entry| entry.boot == boot)?;
            Some((address, (entry.owner?, Duration::from_millis(entry.since_ms))))
        };
        Ok(self.entries()?.into_iter().filter_map(held).collect())
    }

    fn lock(&self) -> Result<Locked, LeaseError> {
        let path = self.dir.join(".lock");
        Locked::wait(&path).map_err(file("locking", &path))
    }

    fn boot(&self) -> Result<String, LeaseError> {
        state::boot_id().map_err(file("reading which boot this is, for", &self.dir))
    }

    /// All files; `None` for one that can not be read.
    fn entries(&self) -> Result<BTreeMap<Ipv4Addr, Option<Entry>>, LeaseError> {
        let names = state::entries(&self.dir).map_err(file("reading the directory", &self.dir))?;
        let entry = |name: String| {
            let address = name.parse().ok()?;
            // A file that was removed since the directory was read is free, which an entry of no boot is too.
            let gone = || Entry { boot: String::new(), owner: None, since_ms: 0 };
            let entry = state::read_json(&self.dir.join(name)).map(|entry| entry.unwrap_or_else(gone)).ok();
            Some((address, entry))
        };
        Ok(names.into_iter().filter_map(entry).collect())
    }

    fn is_free(&self, entry: &Entry, boot: &str) -> bool {
        let rested =
            now_ms().saturating_sub(entry.since_ms) >= u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX);
        entry.boot != boot || entry.owner.is_none() && rested
    }

    /// The first free address from where the last search ended, so that an address rests as long as the pool allows. The lock is held.
    fn next_free(&self, pool: &Pool, boot: &str) -> Result<Ipv4Addr, LeaseError> {
        let capacity = pool.capacity();
        let cursor = self.dir.join(".next");
        // One cursor for all pools: where it points is only a beginning.
        let start = state::read_json::<u64>(&cursor).ok().flatten().unwrap_or(0);
        if start.is_multiple_of(TIDY_EVERY) {
            self.tidy(boot)?;
        }
        let mut all = None;
        for step in 0..capacity {
            let index = start.wrapping_add(step) % capacity;
            let Some(address) = pool.nth(index) else { continue };
            let free = if step < NEAR {
                let path = self.dir.join(address.to_string());
                match state::read_json::<Entry>(&path) {
                    Ok(None) => true,
                    Ok(Some(entry)) => self.is_free(&entry, boot),
                    Err(_) => false,
                }
            } else {
                if all.is_none() {
                    all = Some(self.entries()?);
                }
                let entry = all.as_ref().and_then(|all| all.get(&address));
                entry.is_none_or(|entry| entry.as_ref().is_some_and(|entry| self.is_free(entry, boot)))
            };
            if free {
                let next = serde_json::to_vec(&(index + 1)).unwrap_or_default();
                // In place: torn it is only another beginning, and some file systems write data out at once when a file is replaced.
                std::fs::write(&cursor, next).map_err(file("writing", &cursor))?;
                return Ok(address);
            }
        }
        let all = match all {
            Some(all) => all,
            None => self.entries()?,
        };
        let mine = all.iter().filter(|(address, _)| pool.v4().contains(*address));
        let resting =
            mine.clone().filter(|(_, entry)| entry.as_ref().is_some_and(|entry| entry.owner.is_none())).count() as u64;
        let held = mine.count() as u64 - resting;
        Err(LeaseError::Exhausted { range: pool.v4(), held, resting, pause: self.pause })
    }

    /// Removes the files of addresses that are free. The lock is held.
    fn tidy(&self, boot: &str) -> Result<(), LeaseError> {
        for (address, entry) in self.entries()? {
            if entry.is_some_and(|entry| self.is_free(&entry, boot)) {
                let path = self.dir.join(address.to_string());
                state::remove(&path).map_err(file("removing", &path))?;
            }
        }
        Ok(())
    }
}

impl Lease {
    /// What it gives.
    ///
    /// # Panics
    /// Never: it is there until [`keep`](Self::keep) takes the lease.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn record(&self) -> &LeaseRecord {
        self.record.as_ref().expect("a lease has a record until it is kept")
    }

    /// Lets it outlive this value. From now on somebody else gives it back.
    #[must_use = "what is kept must be recorded, or nobody gives it back"]
    #[allow(clippy::missing_panics_doc, clippy::expect_used)]
    pub fn keep(mut self) -> LeaseRecord {
        self.record.take().expect("a lease has a record until it is kept")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            // It stays held by its owner; `cleanup` finds it.
            let _ = self.leases.give_back(record);
        }
    }
}

impl fmt::Display for LeaseRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of fork {}", self.addresses.v4, self.owner)
    }
}
