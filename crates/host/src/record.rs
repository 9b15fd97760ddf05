//! What is on disk of a fork. There is no truth in memory only.
//!
//! ```text
//! <state>/forks/.new-<id>/   being made; its `lock` is held by the process that makes it
//! <state>/forks/.spare-<id>/ half made, for whoever asks next: see [`crate::pool`]
//! <state>/forks/<id>/        made; `fork.json` says what it is
//! <state>/names/<name>       a link to the id that has the name: made exclusively, so two forks never share one
//! ```
//!
//! Nothing here is flushed to the disk, but what a fork in standby needs ([`rewrite_flushed`]): a host that loses its power loses its forks that run
//! as well.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    num::NonZeroU16,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
};

use engine::{EngineInfo, ProcessRef};
use identity::{ForkId, ForkName, Tag};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{home::Home, network::NetworkReport, pool::Spare, stop};

/// The record in a fork's directory.
pub const RECORD: &str = "fork.json";
/// The machine's process in the directory of a fork that is being made.
pub const PROCESS: &str = "process.json";
pub(crate) const LOCK: &str = "lock";
pub(crate) const NEW: &str = ".new-";
pub(crate) const SPARE: &str = ".spare-";
const SPARE_RECORD: &str = "spare.json";
/// A record is a few kilobytes; 256 labels of 512 bytes are the most it can hold.
const MAX_RECORD: u64 = 1 << 20;

/// One step and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTime {
    /// The step.
    pub step: String,
    /// What was really done, where that can differ.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub outcome: String,
    /// Microseconds.
    pub micros: u64,
}

/// A mailbox's fate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxReport {
    /// The mailbox.
    pub name: String,
    /// Whether it acknowledged (only known if that was asked for).
    pub acknowledged: Option<bool>,
}

/// A fork that is on disk, and not in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyReport {
    /// Since when, in milliseconds since the epoch.
    pub since_ms: u64,
    /// Bytes of memory that it had for itself.
    pub dirty_bytes: u64,
    /// Bytes that are on disk for it.
    pub disk_bytes: u64,
    /// How long nothing of it ran before it was on disk, in microseconds: from its freeze to the last byte.
    pub captured_micros: u64,
}

/// What is known of a fork. It holds no secret, and of the environment only the names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkRecord {
    /// [`ForkRecord::FORMAT`].
    pub format: u32,
    /// Its id.
    pub id: ForkId,
    /// Its name.
    pub name: ForkName,
    /// Its host name.
    pub hostname: ForkName,
    /// The fork that it was made of; none if it was made of the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ForkId>,
    /// What is known of its standby; none of a fork that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<StandbyReport>,
    /// The template it came from.
    pub template: Tag,
    /// That template's id: the tag may be built anew while the fork lives.
    pub template_id: String,
    /// What runs it.
    pub engine: EngineInfo,
    /// Its process.
    pub process: ProcessRef,
    /// When its identity was acknowledged, in milliseconds since the epoch.
    pub created_ms: u64,
    /// `/etc/machine-id` of the fork.
    pub machine_id: String,
    /// Kernel boot id that the fork shows.
    pub boot_id: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Names of the variables given.
    pub env: Vec<String>,
    /// Names of the secrets given.
    pub secrets: Vec<String>,
    /// Paths of the files given.
    pub files: Vec<String>,
    /// Mailboxes written to.
    pub mailboxes: Vec<MailboxReport>,
    /// Its network; none without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkReport>,
    /// What asked for it, where that must be found out again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The port of its browser's DevTools, if its recipe names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devtools_port: Option<NonZeroU16>,
    /// Limits that hold, as they were asked for.
    pub limits: BTreeMap<String, u64>,
    /// Control groups of the host made for it.
    pub cgroups: Vec<PathBuf>,
    /// From the request to the acknowledged identity, its network included where that was awaited, in microseconds.
    pub acked_micros: u64,
    /// The host's steps.
    pub host_steps: Vec<StepTime>,
    /// The guest's steps, as it reported them.
    pub guest_steps: Vec<StepTime>,
}

impl ForkRecord {
    /// The format this build writes and reads.
    pub const FORMAT: u32 = 1;

    /// Whether its machine is alive. That of a fork in standby is not, and the fork is not dead.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.standby.is_none() && self.process.is_alive()
    }

    /// Whether it has ended without having been put into standby.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.standby.is_none() && !self.process.is_alive()
    }
}

/// A fork's directory while the fork is being made. Dropped before [`NewFork::publish`], it is removed with its name.
#[derive(Debug)]
pub struct NewFork {
    dir: PathBuf,
    id: ForkId,
    /// Held as long as the fork is being made: who finds it free knows that the maker is gone.
    lock: File,
    name: Option<PathBuf>,
    published: bool,
}

impl NewFork {
    /// Makes the directory, locked.
    ///
    /// # Errors
    /// If the state directory can not be written, or somebody asked this process to [stop](crate::stop).
    pub fn begin(home: &Home, id: &ForkId) -> io::Result<Self> {
        stop::check()?;
        let dir = home.forks().join(format!("{NEW}{id}"));
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        // From here on the directory is removed if anything fails.
        let made = || -> io::Result<File> {
            let lock = OpenOptions::new().create_new(true).write(true).mode(0o600).open(dir.join(LOCK))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        };
        match made() {
            Ok(lock) => Ok(Self { dir, id: id.clone(), lock, name: None, published: false }),
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    /// Leaves it for whoever takes it with [`NewFork::from_spare`].
    ///
    /// # Errors
    /// As [`NewFork::publish`].
    pub fn set_aside(mut self, home: &Home, spare: &Spare) -> io::Result<()> {
        write_json(&self.dir, SPARE_RECORD, spare)?;
        let _publishing = stop::publishing()?;
        fs::rename(&self.dir, home.forks().join(format!("{SPARE}{}", self.id)))?;
        self.published = true;
        Ok(())
    }

    /// Takes what was set aside; `None` if somebody else did.
    ///
    /// # Errors
    /// If the state directory can not be written, or somebody asked this process to [stop](crate::stop).
    pub fn from_spare(home: &Home, id: &ForkId, process: &ProcessRef) -> io::Result<Option<Self>> {
        stop::check()?;
        let gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) };
        let from = home.forks().join(format!("{SPARE}{id}"));
        let lock = match OpenOptions::new().write(true).open(from.join(LOCK)) {
            Ok(lock) => lock,
            Err(error) => return gone(error),
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        stop::adopt(home, process);
        let dir = home.forks().join(format!("{NEW}{id}"));
        match fs::rename(from, &dir) {
            Ok(()) => Ok(Some(Self { dir, id: id.clone(), lock, name: None, published: false })),
            Err(error) => gone(error),
        }
    }

    /// Removes what a machine that could not be used has left.
    ///
    /// # Errors
    /// If something can not be removed.
    pub fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name() != LOCK {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &ForkId {
        &self.id
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes the name; false if another fork has it.
    ///
    /// # Errors
    /// If the state directory can not be written.
    pub fn take_name(&mut self, home: &Home, name: &ForkName) -> io::Result<bool> {
        let path = home.names().join(name.as_str());
        match symlink(self.id.as_str(), &path) {
            Ok(()) => {
                self.name = Some(path);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Notes the machine's process, so that a clean-up after a crash finds it.
    ///
    /// # Errors
    /// If the file can not be written.
    pub fn note_process(&self, process: &ProcessRef) -> io::Result<()> {
        write_json(&self.dir, PROCESS, process)
    }

    /// Writes the record and gives the directory its final name.
    ///
    /// # Errors
    /// If it can not be written, or somebody asked this process to [stop](crate::stop); the directory is removed on drop
    /// then.
    pub fn publish(mut self, home: &Home, record: &ForkRecord) -> io::Result<PathBuf> {
        write_json(&self.dir, RECORD, record)?;
        let final_dir = home.forks().join(self.id.as_str());
        {
            let _publishing = stop::publishing()?;
            fs::rename(&self.dir, &final_dir)?;
            self.published = true;
        }
        let _ = fs::remove_file(final_dir.join(PROCESS));
        let _ = fs::remove_file(final_dir.join(SPARE_RECORD));
        Ok(final_dir)
    }
}

impl Drop for NewFork {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        // The name last: as long as it is taken, nobody else uses it.
        let _ = fs::remove_dir_all(&self.dir);
        if let Some(name) = &self.name {
            let _ = fs::remove_file(name);
        }
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

/// Writes the record of a fork anew, whole.
///
/// # Errors
/// If it can not be written, or somebody asked this process to [stop](crate::stop); the old one stays.
pub(crate) fn rewrite(dir: &Path, record: &ForkRecord) -> io::Result<()> {
    let _publishing = stop::publishing()?;
    write_json(dir, RECORD, record)
}

/// The same, and all that leads to the record is on disk afterwards: a fork in standby has nothing but that.
///
/// # Errors
/// As [`rewrite`], or if it can not be flushed; then too the record is as it was `before`.
pub(crate) fn rewrite_flushed(home: &Home, dir: &Path, before: &ForkRecord, record: &ForkRecord) -> io::Result<()> {
    // Its directory and its name were made when it was, and not flushed.
    for parent in [home.forks(), home.names()] {
        File::open(parent)?.sync_all()?;
    }
    let _publishing = stop::publishing()?;
    write_json_flushed(dir, RECORD, record).inspect_err(|_| {
        // It may have its name already.
        let _ = write_json(dir, RECORD, before);
    })
}

/// Reads the record in a fork's directory.
///
/// # Errors
/// If it can not be read.
pub(crate) fn read(dir: &Path) -> io::Result<ForkRecord> {
    read_json(&dir.join(RECORD))
}

/// An entry of the directory of forks.
#[derive(Debug)]
pub enum Entry {
    /// A fork.
    Fork(Box<ForkRecord>),
    /// Set aside for a fork to come. Its machine may have ended.
    Spare {
        /// The directory.
        dir: PathBuf,
        /// The id of the fork that it becomes.
        id: ForkId,
        /// What is known of it.
        spare: Box<Spare>,
    },
    /// Being made by a living process.
    BeingMade(PathBuf),
    /// Left behind: never finished, or a spare that can not be read.
    Leftover {
        /// The directory.
        dir: PathBuf,
        /// Its id.
        id: ForkId,
        /// The machine's process, if one was noted.
        process: Option<ProcessRef>,
        /// Why it is no fork.
        reason: String,
    },
    /// A fork, as it seems, whose record can not be read, or is another version's. It may well live, or be in standby.
    Unreadable {
        /// The directory.
        dir: PathBuf,
        /// Its id.
        id: ForkId,
        /// Why its record can not be read.
        error: io::Error,
    },
    /// Not offshoot's: never touched.
    Foreign(PathBuf),
}

/// All entries, in the order of their ids.
///
/// # Errors
/// If the directory can not be read.
pub fn entries(home: &Home) -> io::Result<Vec<Entry>> {
    Ok(named(home)?.iter().filter_map(|name| entry(home, name)).collect())
}

/// The spares among them, each read when it is asked for: there may be thousands of forks beside them.
///
/// # Errors
/// If the state can not be read.
pub(crate) fn spares(home: &Home) -> io::Result<impl Iterator<Item = (ForkId, Spare)>> {
    let names = named(home)?.into_iter().filter(|name| name.starts_with(SPARE));
    Ok(names.filter_map(|name| match entry(home, &name) {
        Some(Entry::Spare { id, spare, .. }) => Some((id, *spare)),
        _ => None,
    }))
}

/// The ids of all of them, made, half made or being made.
///
/// # Errors
/// If the directory can not be read.
pub(crate) fn ids(home: &Home) -> io::Result<Vec<ForkId>> {
    let id = |name: String| {
        let id = [NEW, SPARE].iter().find_map(|kind| name.strip_prefix(kind)).unwrap_or(&name);
        ForkId::parse(id).ok()
    };
    Ok(named(home)?.into_iter().filter_map(id).collect())
}

fn named(home: &Home) -> io::Result<Vec<String>> {
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = fs::read_dir(home.forks())?.map(name).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn entry(home: &Home, name: &str) -> Option<Entry> {
    let dir = home.forks().join(name);
    let (id, is_new) = match name.strip_prefix(NEW) {
        Some(id) => (id, true),
        None => (name.strip_prefix(SPARE).unwrap_or(name), false),
    };
    let Ok(id) = ForkId::parse(id) else { return Some(Entry::Foreign(dir)) };
    if name.starts_with(SPARE) {
        return match read_json::<Spare>(&dir.join(SPARE_RECORD)) {
            Ok(spare) => Some(Entry::Spare { dir, id, spare: Box::new(spare) }),
            Err(_) if !dir.exists() => None,
            Err(error) => {
                Some(Entry::Leftover { dir, id, process: None, reason: format!("its record can not be read: {error}") })
            }
        };
    }
    if is_new {
        // Finished or undone in the meantime: no entry.
        let lock = match File::open(dir.join(LOCK)) {
            Ok(lock) => Some(lock),
            Err(_) if !dir.exists() => return None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Whether somebody holds it is not known: he is left alone.
            Err(_) => return Some(Entry::BeingMade(dir)),
        };
        if lock.as_ref().is_some_and(|lock| flock(lock, FlockOperation::NonBlockingLockShared).is_err()) {
            return Some(Entry::BeingMade(dir));
        }
        if !dir.exists() {
            return None;
        }
        let process = read_json(&dir.join(PROCESS)).ok();
        return Some(Entry::Leftover { dir, id, process, reason: "its maker ended before it was finished".into() });
    }
    match read_json::<ForkRecord>(&dir.join(RECORD)) {
        Ok(record) if record.id == id && record.format == ForkRecord::FORMAT => Some(Entry::Fork(Box::new(record))),
        Ok(_) => {
            let error = io::Error::new(io::ErrorKind::InvalidData, "it is another fork's or format's");
            Some(Entry::Unreadable { dir, id, error })
        }
        Err(_) if !dir.exists() => None,
        Err(error) => Some(Entry::Unreadable { dir, id, error }),
    }
}

/// Finds a fork by name, id or the unique beginning (6 characters or more) of its id.
///
/// # Errors
/// If the state can not be read.
pub fn find(home: &Home, wanted: &str) -> io::Result<Option<ForkRecord>> {
    let is_ours = |record: &ForkRecord| record.format == ForkRecord::FORMAT;
    let by_id = |id: &str| read_json::<ForkRecord>(&home.forks().join(id).join(RECORD)).ok().filter(is_ours);
    if let Ok(name) = ForkName::parse(wanted)
        && let Ok(id) = fs::read_link(home.names().join(name.as_str()))
        && let Some(record) = id.to_str().and_then(|id| ForkId::parse(id).ok()).and_then(|id| by_id(id.as_str()))
    {
        return Ok(Some(record));
    }
    if ForkId::parse(wanted).is_ok() {
        return Ok(by_id(wanted));
    }
    if wanted.len() < 6 || !wanted.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut found = entries(home)?.into_iter().filter_map(|entry| match entry {
        Entry::Fork(record) if record.id.as_str().starts_with(wanted) => Some(*record),
        _ => None,
    });
    let first = found.next();
    Ok(if found.next().is_some() { None } else { first })
}

/// Removes a fork's directory and its name. Its machine must be gone.
///
/// # Errors
/// If something can not be removed.
pub fn remove(home: &Home, dir: &Path, id: &ForkId) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for name in names_of(home, id)? {
        fs::remove_file(name)?;
    }
    Ok(())
}

/// Names that point to `id`.
///
/// # Errors
/// If the directory of names can not be read.
pub fn names_of(home: &Home, id: &ForkId) -> io::Result<Vec<PathBuf>> {
    Ok(names(home)?.into_iter().filter(|(_, holder)| holder.as_ref() == Some(id)).map(|(path, _)| path).collect())
}

/// All names with the ids they point to.
///
/// # Errors
/// If the directory of names can not be read.
pub fn names(home: &Home) -> io::Result<Vec<(PathBuf, Option<ForkId>)>> {
    fs::read_dir(home.names())?
        .map(|entry| {
            let path = entry?.path();
            let id = fs::read_link(&path).ok().and_then(|id| ForkId::parse(id.to_str()?).ok());
            Ok((path, id))
        })
        .collect()
}

pub(crate) fn write_json<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    let (_, temporary) = write_beside(dir, name, value)?;
    fs::rename(temporary, dir.join(name))
}

/// The same; it is on disk afterwards, under its name.
pub(crate) fn write_json_flushed<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    let (file, temporary) = write_beside(dir, name, value)?;
    file.sync_all()?;
    fs::rename(temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}

fn write_beside<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<(File, PathBuf)> {
    let temporary = dir.join(format!(".{name}.tmp"));
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    Ok((file, temporary))
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<T> {
    let file = File::open(path)?;
    if file.metadata()?.len() > MAX_RECORD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than any record"));
    }
    serde_json::from_reader(io::BufReader::new(file)).map_err(Into::into)
}
