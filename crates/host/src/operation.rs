//! One thing at a time is done to a fork as a whole: standby, resume, being forked. Whoever does it holds the fork's lock, and notes
//! what the next one would need to bring the fork back, should he die in the middle.
//!
//! ```text
//! <state>/forks/<id>/operation.lock   held meanwhile
//! <state>/forks/<id>/operation.json   there as long as the fork is not as it should be: with a free lock, its maker is gone
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use engine::ProcessRef;
use identity::{AckKey, Secret, mailbox::Nonce};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{machines, record};

const LOCK: &str = "operation.lock";
const JOURNAL: &str = "operation.json";

/// What opens the secrets of a fork in standby. It lies with the state, not with what is on disk of the fork: who has only that has
/// no secret.
const UNSEAL: &str = "unseal.json";

/// What was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// It is quiesced, to be captured. Until its record says otherwise, it is a fork that runs.
    Capture,
    /// It is resumed. Until its record says otherwise, it is in standby.
    Resume,
}

/// What the next one has to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Journal {
    pub(crate) kind: Kind,
    /// Authenticates the ack of a fork that goes on.
    pub(crate) ack_key: AckKey,
    /// What opens the secrets that the guest has sealed.
    pub(crate) unseal: Option<Secret>,
    /// The nonce of the fork's own mailbox, once it is quiesced: what is written before it is paused.
    pub(crate) nonce: Option<Nonce>,
}

/// The right to do something to a fork as a whole.
#[derive(Debug)]
pub(crate) struct Operation {
    dir: PathBuf,
    _lock: File,
}

impl Operation {
    /// Takes the lock of the fork in `dir`; `None` if somebody holds it. With `wait`, that one is waited for.
    pub(crate) fn begin(dir: &Path, wait: bool) -> io::Result<Option<Self>> {
        let path = dir.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        let operation = if wait { FlockOperation::LockExclusive } else { FlockOperation::NonBlockingLockExclusive };
        loop {
            return match flock(&lock, operation) {
                Ok(()) => Ok(Some(Self { dir: dir.to_owned(), _lock: lock })),
                Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn note(&self, journal: &Journal) -> io::Result<()> {
        record::write_json(&self.dir, JOURNAL, journal)
    }

    /// Keeps what opens the fork's secrets, for as long as it is in standby. It is on disk afterwards.
    pub(crate) fn keep_unseal(&self, unseal: Option<&Secret>) -> io::Result<()> {
        record::write_json_flushed(&self.dir, UNSEAL, &unseal)
    }

    /// What was kept.
    pub(crate) fn unseal(&self) -> io::Result<Option<Secret>> {
        record::read_json(&self.dir.join(UNSEAL))
    }

    /// It is of no use any more.
    pub(crate) fn forget_unseal(&self) -> io::Result<()> {
        match fs::remove_file(self.dir.join(UNSEAL)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What was begun and not ended.
    pub(crate) fn journal(&self) -> io::Result<Option<Journal>> {
        match record::read_json(&self.dir.join(JOURNAL)) {
            Ok(journal) => Ok(Some(journal)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Machines of the fork that nobody has noted: whoever resumes it has started one before he can note it, and may die in between.
    pub(crate) fn unnoted(&self) -> io::Result<Vec<ProcessRef>> {
        match self.journal() {
            Ok(None | Some(Journal { kind: Kind::Capture, .. })) => Ok(Vec::new()),
            Ok(Some(Journal { kind: Kind::Resume, .. })) | Err(_) => machines::holders(&self.dir),
        }
    }

    /// The fork is as it should be.
    pub(crate) fn settle(&self) -> io::Result<()> {
        match fs::remove_file(self.dir.join(JOURNAL)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Whether something was begun with the fork in `dir`, by somebody who may still be at it.
pub(crate) fn is_under_way(dir: &Path) -> bool {
    dir.join(JOURNAL).exists()
}

/// Whether somebody holds the lock of the fork in `dir`.
pub(crate) fn is_held(dir: &Path) -> bool {
    File::open(dir.join(LOCK)).is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_operation_at_a_time_and_what_was_begun_outlives_who_began_it() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let begun = Operation::begin(one.path(), false).unwrap().unwrap();
        assert!(Operation::begin(one.path(), false).unwrap().is_none());
        assert!(is_held(one.path()) && !is_held(other.path()));
        let _elsewhere = Operation::begin(other.path(), false).unwrap().unwrap();
        let journal = Journal {
            kind: Kind::Capture,
            ack_key: AckKey::new([3; 32]),
            unseal: Some(Secret::new(vec![4; 32])),
            nonce: Some([5; 16]),
        };
        assert!(begun.journal().unwrap().is_none() && !is_under_way(one.path()));
        begun.note(&journal).unwrap();
        drop(begun);
        assert!(is_under_way(one.path()) && !is_held(one.path()) && !is_under_way(other.path()));
        let next = Operation::begin(one.path(), true).unwrap().unwrap();
        let found = next.journal().unwrap().unwrap();
        assert_eq!((found.kind, found.nonce), (Kind::Capture, Some([5; 16])));
        assert_eq!(found.unseal.unwrap().expose(), [4; 32]);
        next.settle().unwrap();
        next.settle().unwrap();
        assert!(!is_under_way(one.path()));
    }
}
