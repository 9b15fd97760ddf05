//! Where a name leads at this moment, for whoever asks thousands of times a second.
//!
//! What is on disk counts, at each look: a name may have another holder than a moment ago. Of a fork only its record is kept, as long as
//! the record's file is the same one, and a descriptor of its process.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use identity::{ForkId, ForkName};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
};

use crate::{
    Home,
    network::{self, NetworkState},
    operation,
    record::{self, ForkRecord, LOCK, NEW, RECORD},
};

/// A record that changes is looked at again; it changes a few times in a fork's life.
const LOOKS: usize = 4;

/// Where a name leads.
#[derive(Debug, Clone)]
pub enum Standing {
    /// Nowhere: no fork has it. Templates have no names here.
    Absent,
    /// To a fork that runs as itself.
    Runs(Arc<ForkRecord>),
    /// To a fork that does not, and may soon.
    NotYet(Waiting),
    /// To a fork whose machine has ended.
    Dead,
}

/// What a fork that does not run as itself waits for.
#[derive(Debug, Clone)]
pub enum Waiting {
    /// Its identity: it is being made.
    Identity,
    /// Its network: it was made without waiting for that.
    Network(Arc<ForkRecord>),
    /// Somebody who resumes it.
    Resume(Arc<ForkRecord>),
    /// Whoever captures or resumes it; if that one died, somebody who [settles](crate::standby::settle) what he has left.
    Operation(Arc<ForkRecord>),
}

impl Waiting {
    /// The fork, once it has a record.
    #[must_use]
    pub fn record(&self) -> Option<&Arc<ForkRecord>> {
        match self {
            Self::Identity => None,
            Self::Network(record) | Self::Resume(record) | Self::Operation(record) => Some(record),
        }
    }
}

/// Which content of a file it is: inode, and the time of the last change.
type Stamp = (u64, i64, i64);

#[derive(Debug, Clone)]
struct Known {
    stamp: Stamp,
    record: Arc<ForkRecord>,
    /// None if it had ended when it was looked for.
    process: Option<Arc<OwnedFd>>,
}

/// The forks of one home, by name.
#[derive(Debug)]
pub struct Standings {
    home: Home,
    known: Mutex<HashMap<ForkId, Known>>,
}

impl Standings {
    /// Of a home.
    #[must_use]
    pub fn new(home: &Home) -> Self {
        Self { home: home.clone(), known: Mutex::default() }
    }

    /// Where a name or an id leads. A name comes before an id, as everywhere; the beginning of an id is none.
    ///
    /// # Errors
    /// If the state can not be read.
    pub fn look(&self, wanted: &ForkName) -> io::Result<Standing> {
        for _ in 0..LOOKS {
            let Some(id) = self.holder(wanted)? else { return Ok(Standing::Absent) };
            if let Some(standing) = self.look_at(&id)? {
                return Ok(standing);
            }
        }
        // It changes faster than it can be looked at.
        Ok(Standing::NotYet(Waiting::Identity))
    }

    /// Forgets forks that are no more.
    pub fn sweep(&self) {
        let forks = self.home.forks();
        self.known().retain(|id, _| forks.join(id.as_str()).exists());
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ForkId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holder(&self, wanted: &ForkName) -> io::Result<Option<ForkId>> {
        match fs::read_link(self.home.names().join(wanted.as_str())) {
            Ok(id) => Ok(id.to_str().and_then(|id| ForkId::parse(id).ok())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ForkId::parse(wanted.as_str()).ok()),
            Err(error) => Err(error),
        }
    }

    /// None if it has changed meanwhile.
    fn look_at(&self, id: &ForkId) -> io::Result<Option<Standing>> {
        let dir = self.home.forks().join(id.as_str());
        let Some(stamp) = stamp(fs::metadata(dir.join(RECORD)))? else {
            self.known().remove(id);
            if is_being_made(&self.home, id) {
                return Ok(Some(Standing::NotYet(Waiting::Identity)));
            }
            // It may have been finished between the two looks.
            return Ok((!dir.join(RECORD).exists()).then_some(Standing::Absent));
        };
        let known = self.known().get(id).filter(|known| known.stamp == stamp).cloned();
        let known = match known {
            Some(known) => known,
            None => {
                let record = match record::read(&dir) {
                    Ok(record) if record.id == *id && record.format == ForkRecord::FORMAT => Arc::new(record),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "a record is another fork's")),
                    Err(error) => return Err(error),
                };
                let process = record.process.pidfd()?.map(Arc::new);
                let known = Known { stamp, record, process };
                self.known().insert(id.clone(), known.clone());
                known
            }
        };
        if known.record.standby.is_some() {
            return Ok(Some(Standing::NotYet(Waiting::Resume(known.record))));
        }
        // Whoever puts it into standby writes its record anew before its machine ends, and takes away what is under way after that.
        let lives = known.process.as_ref().is_some_and(|process| lives(process));
        if operation::is_under_way(&dir) {
            return Ok(Some(Standing::NotYet(Waiting::Operation(known.record))));
        }
        if !lives {
            let same = self::stamp(fs::metadata(dir.join(RECORD)))? == Some(stamp);
            return Ok(same.then_some(Standing::Dead));
        }
        let waits = known.record.network.as_ref().is_some_and(|network| network.state == NetworkState::Waiting)
            && network::now(&known.record, &dir).is_some_and(|network| network.state == NetworkState::Waiting);
        Ok(Some(if waits { Standing::NotYet(Waiting::Network(known.record)) } else { Standing::Runs(known.record) }))
    }
}

/// None if there is no such file.
fn stamp(found: io::Result<Metadata>) -> io::Result<Option<Stamp>> {
    match found {
        Ok(meta) => Ok(Some((meta.ino(), meta.mtime(), meta.mtime_nsec()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a process that makes this fork lives.
fn is_being_made(home: &Home, id: &ForkId) -> bool {
    let lock = File::open(home.forks().join(format!("{NEW}{id}")).join(LOCK));
    lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

/// A process' descriptor can be read from once the process has ended.
fn lives(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::{Child, Command};

    use engine::ProcessRef;

    use super::*;
    use crate::{
        record::NewFork,
        rig::{self, id},
    };

    fn name(text: &str) -> ForkName {
        ForkName::parse(text).unwrap()
    }

    fn sleeper() -> (Child, ProcessRef) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessRef::of(child.id()).unwrap();
        (child, process)
    }

    fn leads_to(standings: &Standings, wanted: &str) -> Option<ForkId> {
        match standings.look(&name(wanted)).unwrap() {
            Standing::Runs(record) => Some(record.id.clone()),
            _ => None,
        }
    }

    #[test]
    fn n4_a_name_leads_to_whoever_has_it_now_and_only_while_it_runs_as_itself() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::below(place.path()).make().unwrap();
        let standings = Standings::new(&home);
        let is = |wanted: &str, standing: fn(&Standing) -> bool| standing(&standings.look(&name(wanted)).unwrap());
        let (mut first, process) = sleeper();
        let (mut second, other) = sleeper();

        let mut new = NewFork::begin(&home, &id('a')).unwrap();
        assert!(is("web", |standing| matches!(standing, Standing::Absent)));
        assert!(new.take_name(&home, &name("web")).unwrap());
        for wanted in ["web", id('a').as_str()] {
            assert!(is(wanted, |standing| matches!(standing, Standing::NotYet(Waiting::Identity))), "{wanted}");
        }
        let record = rig::named(&id('a'), &name("web"), &process);
        let dir = new.publish(&home, &record).unwrap();
        let mut new = NewFork::begin(&home, &id('b')).unwrap();
        assert!(new.take_name(&home, &name("other")).unwrap());
        let _ = new.publish(&home, &rig::named(&id('b'), &name("other"), &other)).unwrap();
        for (wanted, holder) in [("web", 'a'), ("other", 'b'), (id('a').as_str(), 'a'), (id('b').as_str(), 'b')] {
            assert_eq!(leads_to(&standings, wanted), Some(id(holder)), "{wanted}");
        }
        // The beginning of an id is none.
        assert!(is("aaaaaaaa", |standing| matches!(standing, Standing::Absent)));

        // Somebody is at it; it is in standby; it is back.
        fs::write(dir.join("operation.json"), "{}").unwrap();
        assert!(is("web", |standing| matches!(standing, Standing::NotYet(Waiting::Operation(_)))));
        fs::remove_file(dir.join("operation.json")).unwrap();
        record::rewrite(&dir, &rig::in_standby(record.clone())).unwrap();
        assert!(is("web", |standing| matches!(standing, Standing::NotYet(Waiting::Resume(_)))));
        record::rewrite(&dir, &record).unwrap();
        assert_eq!(leads_to(&standings, "web"), Some(id('a')));

        first.kill().unwrap();
        first.wait().unwrap();
        assert!(is("web", |standing| matches!(standing, Standing::Dead)));
        assert_eq!(leads_to(&standings, "other"), Some(id('b')), "another's end is nothing to it");
        record::remove(&home, &dir, &id('a')).unwrap();
        for wanted in ["web", id('a').as_str()] {
            assert!(is(wanted, |standing| matches!(standing, Standing::Absent)), "{wanted}");
        }

        // The name goes to another fork.
        let mut new = NewFork::begin(&home, &id('c')).unwrap();
        assert!(new.take_name(&home, &name("web")).unwrap());
        let _ = new.publish(&home, &rig::named(&id('c'), &name("web"), &other)).unwrap();
        assert_eq!(leads_to(&standings, "web"), Some(id('c')));
        // A maker that failed leaves nothing.
        let mut new = NewFork::begin(&home, &id('d')).unwrap();
        assert!(new.take_name(&home, &name("lost")).unwrap());
        drop(new);
        assert!(is("lost", |standing| matches!(standing, Standing::Absent)));
        standings.sweep();
        assert_eq!(standings.known().len(), 2);
        second.kill().unwrap();
        second.wait().unwrap();
    }
}
