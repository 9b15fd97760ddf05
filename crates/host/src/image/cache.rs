//! One entry of the cache: locked while it is made, published by a rename, never seen half made.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{fs::FlockOperation, io::Errno};
use tempfile::TempDir;
use thiserror::Error;

use crate::{progress::Progress, stop};

/// How often an entry that another process makes is asked for.
const RETRY: Duration = Duration::from_millis(100);

/// Why something could not be kept in the cache.
#[derive(Debug, Error)]
pub enum CacheError {
    /// The disk has no room.
    #[error("the disk of {} is full; free some space there, or set OFFSHOOT_CACHE_DIR to another disk", path.display())]
    Full {
        /// Where it was to be written.
        path: PathBuf,
    },
    /// Something else about a file.
    #[error("{} could not be {what}: {source}", path.display())]
    Io {
        /// What was being done: "written", "read"…
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl CacheError {
    /// For `map_err`: a full disk is told from the rest.
    pub(crate) fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path },
            _ => Self::Io { what, path, source },
        }
    }
}

/// The sole right to make one entry. Released when dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct Entry {
    shelf: PathBuf,
    name: String,
    _lock: File,
}

impl Entry {
    /// Waits for the right to make `cache/shelf/name` and clears what a dead maker of the same entry left. Look for the
    /// entry again afterwards: the one waited for may have made it.
    pub(crate) fn lock(
        cache: &Path,
        shelf: &str,
        name: &str,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, CacheError> {
        let shelf = cache.join(shelf);
        fs::create_dir_all(&shelf).map_err(CacheError::at("made", &shelf))?;
        let path = shelf.join(format!(".{name}.lock"));
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(CacheError::at("opened", &path))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress(Progress::step(format!("Waiting for another offshoot that makes {name}")));
            wait_for(&lock).map_err(CacheError::at("locked", &path))?;
        }
        let entry = Self { shelf, name: name.to_owned(), _lock: lock };
        entry.clear_stale();
        Ok(entry)
    }

    fn temporary_prefix(&self) -> String {
        format!(".{}.tmp-", self.name)
    }

    // We hold the lock, so whoever made these is dead.
    fn clear_stale(&self) {
        let prefix = self.temporary_prefix();
        let Ok(entries) = fs::read_dir(&self.shelf) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                remove_tree(&entry.path());
            }
        }
    }

    /// A place to work in, on the same file system as the entry; gone when dropped.
    pub(crate) fn workspace(&self) -> Result<Workspace, CacheError> {
        tempfile::Builder::new()
            .prefix(&self.temporary_prefix())
            .tempdir_in(&self.shelf)
            .map(|dir| Workspace { dir })
            .map_err(CacheError::at("made", &self.shelf))
    }

    /// Where the finished entry is.
    pub(crate) fn path(&self) -> PathBuf {
        self.shelf.join(&self.name)
    }

    /// Makes `finished` (inside a workspace of this entry) the entry, for all to read.
    pub(crate) fn publish(&self, finished: &Path) -> Result<PathBuf, CacheError> {
        let path = self.path();
        let mode = if finished.is_dir() { 0o755 } else { 0o444 };
        let file = File::open(finished).map_err(CacheError::at("opened", finished))?;
        file.set_permissions(fs::Permissions::from_mode(mode)).map_err(CacheError::at("changed", finished))?;
        file.sync_all().map_err(CacheError::at("written", finished))?;
        fs::rename(finished, &path).map_err(CacheError::at("put in place", &path))?;
        Ok(path)
    }
}

/// Waits for a lock until we are asked to stop. The system only waits for it without an end, so it is tried again.
fn wait_for(lock: &File) -> io::Result<()> {
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
        stop::check()?;
        thread::sleep(RETRY);
    }
}

/// A directory that is removed when dropped, whatever modes were unpacked into it.
#[derive(Debug)]
pub(crate) struct Workspace {
    dir: TempDir,
}

impl Workspace {
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        open_up(self.dir.path());
    }
}

/// Removes a tree as far as we may, including directories whose modes keep even their owner out.
fn remove_tree(path: &Path) {
    open_up(path);
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

// Root needs none of this; an ordinary user cannot empty a directory unpacked with mode 0555.
fn open_up(path: &Path) {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if !meta.is_dir() {
        return;
    }
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_maker_left_is_cleared_and_what_is_published_stays() {
        let cache = tempfile::tempdir().unwrap();
        let shelf = cache.path().join("rootfs");
        fs::create_dir_all(shelf.join(".one.tmp-dead/sub")).unwrap();
        fs::create_dir_all(shelf.join(".two.tmp-alive")).unwrap();
        let entry = Entry::lock(cache.path(), "rootfs", "one", &mut |_| ()).unwrap();
        assert!(!shelf.join(".one.tmp-dead").exists());
        assert!(shelf.join(".two.tmp-alive").exists(), "another entry's maker may be alive");
        let work = entry.workspace().unwrap();
        fs::write(work.path().join("image"), "x").unwrap();
        let path = entry.publish(&work.path().join("image")).unwrap();
        let left = work.path().to_owned();
        drop(work);
        assert!(!left.exists());
        assert_eq!(fs::read_to_string(path).unwrap(), "x");
    }

    #[test]
    fn two_makers_of_one_entry_take_turns() {
        let cache = tempfile::tempdir().unwrap();
        let first = Entry::lock(cache.path(), "s", "n", &mut |_| ()).unwrap();
        let path = cache.path().to_owned();
        let (say, hear) = std::sync::mpsc::channel();
        let second = thread::spawn(move || {
            Entry::lock(&path, "s", "n", &mut |progress| say.send(progress).unwrap()).map(|_| ()).unwrap();
        });
        assert!(hear.recv().unwrap().step.starts_with("Waiting"));
        drop(first);
        second.join().unwrap();
    }
}
