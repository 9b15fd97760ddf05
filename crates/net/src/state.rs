//! The directory that holds what this crate remembers.
//!
//! ```text
//! links/<fork id>.json   what was made for a fork, written before it is made; locked while its maker is at it
//! ns/<fork id>           its network namespace, mounted
//! leases/<address>       who holds an address, or from when it can be given again
//! nets/<name>.json       the number of a named net         ports/<protocol>-<port>.json   who has a port of the host
//! ```
//!
//! Each file is replaced by a rename. Nothing is flushed: what is made here does not outlive the host's boot, and every lease
//! says in which boot it was made.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    time::{ClockId, clock_gettime},
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest file that is read, in bytes. The longest that is written is a fork's record with all its ports.
const MAX_FILE: u64 = 64 * 1024;

/// The directory.
#[derive(Debug, Clone)]
pub(crate) struct State {
    root: PathBuf,
}

impl State {
    /// Opens it, making what is absent.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let state = Self { root: root.to_owned() };
        for dir in [state.root.clone(), state.links(), state.namespaces(), state.leases(), state.nets(), state.ports()]
        {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        Ok(state)
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(crate) fn namespaces(&self) -> PathBuf {
        self.root.join("ns")
    }

    pub(crate) fn leases(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub(crate) fn nets(&self) -> PathBuf {
        self.root.join("nets")
    }

    pub(crate) fn ports(&self) -> PathBuf {
        self.root.join("ports")
    }

    /// The lock of what all forks share: the host's table, the named nets, the host's ports. Who holds it does bounded work.
    pub(crate) fn lock_shared_parts(&self) -> io::Result<Locked> {
        Locked::wait(&self.root.join("lock"))
    }
}

/// A file that is locked by this process; free when dropped, and when the process ends.
#[derive(Debug)]
pub(crate) struct Locked(File);

impl Locked {
    /// Locks it, and waits for whoever has it.
    pub(crate) fn wait(path: &Path) -> io::Result<Self> {
        let file = lock_file(path)?;
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether the file that is locked is the one at `path`.
    pub(crate) fn is_still(&self, path: &Path) -> io::Result<bool> {
        let mine = self.0.metadata()?;
        match fs::metadata(path) {
            Ok(there) => Ok((mine.dev(), mine.ino()) == (there.dev(), there.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Locks it unless somebody has it.
    pub(crate) fn unless_held(path: &Path) -> io::Result<Option<Self>> {
        let file = lock_file(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Locked {
    /// Closing alone would not do: a process that another thread has just forked holds the file as well, until it executes its program.
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// The numbers (inodes) of the files that are locked, by anybody. Looking at the kernel's list holds nobody up, as trying to lock would.
/// Devices are left out: not every file system shows there the one it shows elsewhere, and who finds a lock too many does no harm.
pub(crate) fn locked_files() -> io::Result<BTreeSet<u64>> {
    let list = fs::read_to_string("/proc/locks")?;
    // 1: FLOCK  ADVISORY  WRITE 1234 00:1a:5678 0 EOF
    let held = list.lines().filter(|line| !line.contains("->"));
    Ok(held.filter_map(|line| line.split_whitespace().nth(5)?.rsplit(':').next()?.parse().ok()).collect())
}

/// The number of the file at `path`; `None` if there is none.
pub(crate) fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|file| file.ino())
}

fn lock_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Replaces a file at once: whoever reads it finds the old content or the new.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // Names that begin with a dot are nobody's (see `entries`); a crash may leave one.
    let name = format!(".new-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let new = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

/// As [`replace`], as JSON.
pub(crate) fn replace_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    replace(path, &serde_json::to_vec(value)?)
}

/// Reads a file; `None` if there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MAX_FILE), &mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

/// Removes a file; that there is none is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names in a directory, without those that are being written.
pub(crate) fn entries(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        if let Ok(name) = entry?.file_name().into_string()
            && !name.starts_with('.')
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Time since the host's boot, sleep included. It is never set back.
#[must_use]
pub fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Which boot of the host this is.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
