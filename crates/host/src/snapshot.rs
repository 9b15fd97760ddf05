//! What a fork was captured as: the pages it had for itself, and its devices, above its template.
//!
//! ```text
//! <data>/snapshots/.new-<fork>-<random>/   being made, or what children are being made of; its `lock` is held meanwhile
//! <data>/snapshots/<fork>/                 a fork in standby
//!     delta.bin      pages            state.bin      devices            snapshot.json  what they are, with their hashes
//!     owner.json     the state directory that knows the fork: several may share one data directory
//! ```
//!
//! One is always one layer above a template: see [`memory::delta`]. They lie with the data: the state directory may be in memory.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use engine::EngineInfo;
use identity::{ForkId, Tag};
use memory::{Ambiguous, DeltaSize, Mailbox};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use store::{Manifest, Template};
use thiserror::Error;

use crate::{home::Home, record};

const NEW: &str = ".new-";
const LOCK: &str = "lock";
const OWNER: &str = "owner.json";
const MANIFEST: &str = "snapshot.json";
const DELTA: &str = "delta.bin";
const STATE: &str = "state.bin";

/// Why a snapshot can not be used.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// A file can not be read or written.
    #[error("{step} failed ({path})")]
    File {
        /// The step.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("what is on disk of the fork is not what was written: {0}")]
    Tampered(&'static str),
    /// It was made by another engine, or above another template.
    #[error("what is on disk of the fork can not be used here: {0}")]
    Incompatible(&'static str),
}

/// What is known of a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotManifest {
    /// [`SnapshotManifest::FORMAT`].
    pub format: u32,
    /// The fork.
    pub fork: ForkId,
    /// Its template.
    pub template: Tag,
    /// That template's id.
    pub template_id: String,
    /// What made it.
    pub engine: EngineInfo,
    /// Mailboxes and where they are.
    pub mailboxes: Vec<Mailbox>,
    /// Names of mailboxes that can not be addressed.
    pub ambiguous: Vec<Ambiguous>,
    /// BLAKE3 of the pages' file.
    pub delta_hash: String,
    /// BLAKE3 of the devices' file.
    pub state_hash: String,
}

impl SnapshotManifest {
    /// The format this build writes and reads.
    pub const FORMAT: u32 = 1;
}

fn file<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::File { step, path: path.to_owned(), source }
}

/// The directory of a snapshot that is being made. It is removed on drop, unless it is [published](Self::publish).
#[derive(Debug)]
pub(crate) struct Draft {
    dir: PathBuf,
    fork: ForkId,
    _lock: File,
    published: bool,
}

/// What a capture found, for the manifest.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) mailboxes: Vec<Mailbox>,
    pub(crate) ambiguous: Vec<Ambiguous>,
    pub(crate) size: DeltaSize,
}

impl Draft {
    /// Makes the directory, locked.
    pub(crate) fn begin(home: &Home, fork: &ForkId) -> Result<Self, SnapshotError> {
        let mut random = [0; 4];
        let bytes = getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()));
        let dir = home.snapshots().join(format!("{NEW}{fork}-{:08x}", u32::from_le_bytes(random)));
        let failed = |error| file("making the directory", &dir)(error);
        bytes.map_err(failed)?;
        DirBuilder::new().mode(0o700).create(&dir).map_err(failed)?;
        let lock = || -> io::Result<File> {
            let lock = OpenOptions::new().create_new(true).write(true).mode(0o600).open(dir.join(LOCK))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            record::write_json(&dir, OWNER, &home_of(home))?;
            Ok(lock)
        };
        match lock() {
            Ok(lock) => Ok(Self { fork: fork.clone(), _lock: lock, published: false, dir }),
            Err(error) => {
                let error = failed(error);
                let _ = fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    pub(crate) fn delta(&self) -> PathBuf {
        self.dir.join(DELTA)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// What was captured, for children that are made while this value lives. Nobody else ever looks at it, so it has no hashes.
    pub(crate) fn for_children(&self, template: &Manifest, found: &Found) -> Snapshot {
        let manifest = self.manifest(template, found, [String::new(), String::new()]);
        Snapshot { dir: self.dir.clone(), manifest }
    }

    /// Writes the manifest, when the files are complete. All of it is on disk afterwards.
    pub(crate) fn finish(&self, template: &Manifest, found: &Found) -> Result<(), SnapshotError> {
        let manifest = self.manifest(template, found, [hash(&self.delta())?, hash(&self.state())?]);
        record::write_json(&self.dir, MANIFEST, &manifest).map_err(file("writing what the fork was", &self.dir))?;
        let files = [DELTA, STATE, MANIFEST, OWNER].map(|name| self.dir.join(name));
        for path in files.into_iter().chain([self.dir.clone()]) {
            File::open(&path).and_then(|file| file.sync_all()).map_err(file("flushing to disk", &path))?;
        }
        Ok(())
    }

    fn manifest(&self, template: &Manifest, found: &Found, hashes: [String; 2]) -> SnapshotManifest {
        let [delta_hash, state_hash] = hashes;
        SnapshotManifest {
            format: SnapshotManifest::FORMAT,
            fork: self.fork.clone(),
            template: template.tag.clone(),
            template_id: template.id.clone(),
            engine: template.engine.clone(),
            mailboxes: found.mailboxes.clone(),
            ambiguous: found.ambiguous.clone(),
            delta_hash,
            state_hash,
        }
    }

    /// Gives it its final name: the fork is in standby as soon as its record says so.
    pub(crate) fn publish(mut self, home: &Home) -> Result<Published, SnapshotError> {
        let place = place(home, &self.fork);
        fs::rename(&self.dir, &place).map_err(file("naming what the fork was", &place))?;
        self.published = true;
        let published = Published { place, kept: false };
        let parent = home.snapshots();
        File::open(&parent).and_then(|dir| dir.sync_all()).map_err(file("flushing to disk", &parent))?;
        Ok(published)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// A snapshot that has its final name, and is removed on drop unless it is kept.
#[derive(Debug)]
pub(crate) struct Published {
    place: PathBuf,
    kept: bool,
}

impl Published {
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_dir_all(&self.place);
        }
    }
}

/// A snapshot that can be restored.
#[derive(Debug)]
pub(crate) struct Snapshot {
    dir: PathBuf,
    manifest: SnapshotManifest,
}

impl Snapshot {
    /// That of a fork in standby; every byte is checked.
    pub(crate) fn of_standby(home: &Home, fork: &ForkId, template: &Template) -> Result<Self, SnapshotError> {
        let dir = place(home, fork);
        let path = dir.join(MANIFEST);
        let manifest: SnapshotManifest = record::read_json(&path).map_err(file("reading what the fork was", &path))?;
        if manifest.format != SnapshotManifest::FORMAT {
            return Err(SnapshotError::Incompatible("it has another format"));
        }
        if manifest.fork != *fork {
            return Err(SnapshotError::Tampered("it is another fork's"));
        }
        let base = template.manifest();
        if (&manifest.template_id, &manifest.engine) != (&base.id, &base.engine) {
            return Err(SnapshotError::Incompatible("it is above another template, or of another engine"));
        }
        if hash(&dir.join(DELTA))? != manifest.delta_hash {
            return Err(SnapshotError::Tampered("its pages have changed"));
        }
        if hash(&dir.join(STATE))? != manifest.state_hash {
            return Err(SnapshotError::Tampered("its devices have changed"));
        }
        Ok(Self { dir, manifest })
    }

    pub(crate) fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }

    pub(crate) fn delta(&self) -> PathBuf {
        self.dir.join(DELTA)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }
}

/// Where a fork in standby is.
pub(crate) fn place(home: &Home, fork: &ForkId) -> PathBuf {
    home.snapshots().join(fork.as_str())
}

/// Removes what a fork in standby was. That there is nothing is fine.
pub(crate) fn remove(home: &Home, fork: &ForkId) -> io::Result<()> {
    let place = place(home, fork);
    // Out of sight in one step: who reads it sees all or nothing.
    let removing = home.snapshots().join(format!("{NEW}{fork}-removing"));
    match fs::rename(&place, &removing) {
        Ok(()) => fs::remove_dir_all(&removing),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what is half made of a fork whose maker is gone, or holds the fork's operation.
pub(crate) fn remove_drafts(home: &Home, fork: &ForkId) -> io::Result<()> {
    for path in entries(home)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(&format!("{NEW}{fork}-")) && is_abandoned(&path) {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

/// Snapshots that nobody will want: those half made whose maker is gone, and those of this home's forks that `is_wanted` does not
/// want. Those of other homes are theirs to judge.
pub(crate) fn leftovers(home: &Home, is_wanted: impl Fn(&ForkId) -> bool) -> io::Result<Vec<PathBuf>> {
    let own = home_of(home);
    let left = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let half_made = name.strip_prefix(NEW).map(|rest| rest.split_once('-').map_or("", |(id, _)| id));
        let Ok(id) = ForkId::parse(half_made.unwrap_or(&name)) else { return false };
        let owner = record::read_json::<PathBuf>(&path.join(OWNER));
        // One whose home is gone is nobody's; so is one that was not even named.
        let ours = owner.map_or(true, |owner| owner == own || !owner.exists());
        ours && if half_made.is_some() { is_abandoned(path) } else { !is_wanted(&id) }
    };
    Ok(entries(home)?.into_iter().filter(left).collect())
}

/// Forks in standby above a template, of whichever home.
///
/// # Errors
/// If the directory can not be read.
pub fn above(home: &Home, template_id: &str) -> io::Result<Vec<ForkId>> {
    let manifests = entries(home)?.into_iter().filter_map(|path| record::read_json(&path.join(MANIFEST)).ok());
    let above = |manifest: SnapshotManifest| (manifest.template_id == template_id).then_some(manifest.fork);
    Ok(manifests.filter_map(above).collect())
}

fn entries(home: &Home) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(home.snapshots()) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether nobody holds its lock.
fn is_abandoned(dir: &Path) -> bool {
    match File::open(dir.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockShared).is_ok(),
        // What can not be looked at may be somebody's.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn home_of(home: &Home) -> PathBuf {
    home.state.canonicalize().unwrap_or_else(|_| home.state.clone())
}

fn hash(path: &Path) -> Result<String, SnapshotError> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finalize().to_hex().to_string()),
                count => hasher.update(&buffer[..count]),
            };
        }
    };
    read().map_err(file("reading", path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn fork(digit: char) -> ForkId {
        ForkId::parse(&digit.to_string().repeat(20)).unwrap()
    }

    #[test]
    fn o2_what_nobody_wants_is_found_and_what_somebody_makes_or_another_home_has_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path()).make().unwrap();
        let neighbour = Home { state: dir.path().join("elsewhere"), ..home.clone() }.make().unwrap();
        let left = |home: &Home, wanted: char| leftovers(home, |id| *id == fork(wanted)).unwrap();
        let making = Draft::begin(&home, &fork('a')).unwrap();
        assert_eq!(left(&home, 'e'), Vec::<PathBuf>::new(), "it is being made");
        // As after a crash: nobody holds the lock, and nothing was removed.
        let crashed = Draft::begin(&home, &fork('b')).unwrap();
        let path = crashed.dir.clone();
        let kept = path.with_extension("kept");
        fs::rename(&path, &kept).unwrap();
        drop(crashed);
        fs::rename(kept, &path).unwrap();
        assert_eq!(left(&home, 'e'), std::slice::from_ref(&path));
        assert_eq!(left(&neighbour, 'e'), Vec::<PathBuf>::new(), "it is another home's to judge");
        remove_drafts(&home, &fork('a')).unwrap();
        remove_drafts(&home, &fork('b')).unwrap();
        assert!(!path.exists() && making.dir.exists());

        let published = making.publish(&home).unwrap();
        assert_eq!(left(&home, 'a'), Vec::<PathBuf>::new());
        assert_eq!(left(&home, 'e'), [place(&home, &fork('a'))]);
        assert_eq!(left(&neighbour, 'e'), Vec::<PathBuf>::new());
        published.keep();
        let undone = Draft::begin(&home, &fork('c')).unwrap().publish(&home).unwrap();
        assert!(place(&home, &fork('c')).exists());
        drop(undone);
        assert!(!place(&home, &fork('c')).exists());
        remove(&home, &fork('a')).unwrap();
        remove(&home, &fork('a')).unwrap();
        assert_eq!(entries(&home).unwrap(), Vec::<PathBuf>::new());
        drop(Draft::begin(&home, &fork('d')).unwrap());
        assert_eq!(entries(&home).unwrap(), Vec::<PathBuf>::new());
    }
}
