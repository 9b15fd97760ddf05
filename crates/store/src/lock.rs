//! The lock of a tag: one builder or remover, or any number of readers; who is refused is told who holds it.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use engine::ProcessRef;
use identity::Tag;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{StoreError, file};

/// Who holds a tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process.
    pub process: Option<ProcessRef>,
    /// What it does.
    pub doing: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some(process) => write!(f, "process {} ({})", process.pid, self.doing),
            None => f.write_str("another process"),
        }
    }
}

/// A held lock; released on drop, and by the kernel when its process ends.
#[derive(Debug)]
pub(crate) struct TagLock(File);

impl TagLock {
    pub(crate) fn exclusive(dir: &Path, tag: &Tag) -> Result<Self, StoreError> {
        let mut lock = Self::take(dir, tag, FlockOperation::NonBlockingLockExclusive)?;
        // For whoever is refused; that it can not be written is no reason to fail.
        let holder = Holder { process: ProcessRef::myself().ok(), doing: "building or removing it".into() };
        let _ = lock.0.set_len(0).and_then(|()| lock.0.write_all(&serde_json::to_vec(&holder)?));
        Ok(lock)
    }

    pub(crate) fn shared(dir: &Path, tag: &Tag) -> Result<Self, StoreError> {
        Self::take(dir, tag, FlockOperation::NonBlockingLockShared)
    }

    fn take(dir: &Path, tag: &Tag, operation: FlockOperation) -> Result<Self, StoreError> {
        let path = dir.join(tag.as_str());
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(file("opening the lock", &path))?;
        match flock(&lock, operation) {
            Ok(()) => Ok(Self(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked { tag: tag.clone(), holder: holder(lock) }),
            Err(error) => Err(file("taking the lock", &path)(error.into())),
        }
    }
}

impl Drop for TagLock {
    /// Closing alone would not do: a process that another thread has just forked holds the file as well, until it executes its program.
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

fn holder(mut lock: File) -> Holder {
    let mut text = Vec::new();
    let _ = lock.seek(SeekFrom::Start(0)).and_then(|_| lock.take(4096).read_to_end(&mut text));
    let written: Option<Holder> = serde_json::from_slice(&text).ok();
    // Readers do not write their names; what an earlier builder left does not count.
    match written {
        Some(holder) if holder.process.as_ref().is_some_and(ProcessRef::is_alive) => holder,
        _ => Holder { process: None, doing: "forking it".into() },
    }
}
