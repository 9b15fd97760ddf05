//! `standby` and `resume`: a fork leaves memory for disk, and comes back as the same fork.
//!
//! ```text
//! standby  captured (see [`crate::source`]) ─► on disk ─► the record says so ─► the machine ends
//! resume   a machine with the template, the pages and the devices ─► told to go on ─► ack ─► the record says so ─► off the disk
//! ```
//!
//! The record decides: until it says that the fork is in standby it is one that runs, and the other way round. Name, id, addresses and
//! ports stay the fork's own throughout; control groups are those of a process, and made anew.

use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime},
};

use engine::{Confinement, NetworkEnd, ProcessRef, RestoreSpec};
use identity::{AckKey, MailboxName, Tag};
use memory::DeltaSize;
use net::{RunAs, UserAddresses, UserLink};
use std::os::fd::{AsFd, OwnedFd};
use store::{Store, StoreError};
use thiserror::Error;

use crate::{
    confine, fault,
    fork::{Running, micros, random},
    forks,
    handoff::network::NetworkError,
    home::Home,
    limits::{self, ForkCgroups, LimitError},
    network::{self, Mode, NetworkState},
    operation::{self, Journal, Kind, Operation},
    pages,
    record::{self, ForkRecord, StandbyReport},
    request::LimitRequest,
    snapshot::{self, Draft, Snapshot},
    source::{self, Source, SourceError, base, state},
};

/// Time for a killed process to be gone; the kernel has to free its memory first.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Why a fork was not put into standby (it runs on then), or not resumed (it is in standby still).
#[derive(Debug, Error)]
pub enum StandbyError {
    /// It is there already.
    #[error("fork {name} is in standby already; bring it back with `offshoot resume {name}`")]
    InStandby {
        /// Its name.
        name: String,
    },
    /// It is not in standby.
    #[error("fork {name} is not in standby; it runs")]
    Runs {
        /// Its name.
        name: String,
    },
    /// Whoever waits for its network would find no machine.
    #[error(
        "the network of fork {name} is not acknowledged yet; put it into standby when `offshoot inspect {name}` shows that it is, or that it failed"
    )]
    NetworkPending {
        /// Its name.
        name: String,
    },
    /// Capturing it, or what it was captured as.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A limit can not be applied again.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Its network can not be connected again.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

impl<T> From<T> for StandbyError
where
    SourceError: From<T>,
    T: Deeper,
{
    fn from(error: T) -> Self {
        Self::Source(error.into())
    }
}

/// Errors that are a [`SourceError`]'s.
trait Deeper {}
impl Deeper for engine::EngineError {}
impl Deeper for engine::DeliverError {}
impl Deeper for snapshot::SnapshotError {}
impl Deeper for crate::acks::AckWaitError {}

/// A fork that has been put into standby or resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// The fork, as it is now.
    pub record: ForkRecord,
    /// From the request to the end, in microseconds.
    pub micros: u64,
    /// What it had for itself; only known of standby.
    pub size: Option<DeltaSize>,
}

/// Puts a fork that runs into standby.
///
/// # Errors
/// [`StandbyError`]; the fork runs on.
pub fn standby(home: &Home, store: &Store, fork: &ForkRecord) -> Result<Moved, StandbyError> {
    let begun = Instant::now();
    let operation = begin(home, store, fork)?;
    let mut record = source::record_of(home, fork)?;
    let name = record.name.to_string();
    if record.standby.is_some() {
        return Err(StandbyError::InStandby { name });
    }
    if !record.is_alive() {
        return Err(SourceError::Dead { name }.into());
    }
    if network::now(&record, operation.dir()).is_some_and(|network| network.state == NetworkState::Waiting) {
        return Err(StandbyError::NetworkPending { name });
    }
    let (template, engine) = base(store, &record)?;
    let draft = Draft::begin(home, &record.id)?;
    let running = record.clone();
    let source = Source { record: &running, template: &template, engine: engine.as_ref(), operation: &operation };
    let captured = source.capture(&draft)?;
    draft.finish(template.manifest(), &captured.found)?;
    fault::point("standby.flushed", Some(&running.process)).map_err(state("flushing to disk"))?;
    let published = draft.publish(home)?;
    fault::point("standby.published", Some(&running.process)).map_err(state("naming what the fork was"))?;
    let size = captured.found.size;
    operation.keep_unseal(captured.journal.unseal.as_ref()).map_err(state("keeping the key of the fork's secrets"))?;
    record.standby = Some(StandbyReport {
        since_ms: millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
        dirty_bytes: size.dirty,
        disk_bytes: disk_bytes(&snapshot::place(home, &record.id)),
        captured_micros: micros(captured.since()),
    });
    record::rewrite_flushed(home, operation.dir(), &running, &record).map_err(state("writing the fork's record"))?;
    // From here on it is in standby, whatever happens.
    published.keep();
    captured.never_mind();
    fault::point("standby.committed", Some(&running.process)).map_err(state("ending the machine"))?;
    finish(&operation, &record)?;
    Ok(Moved { record, micros: micros(begun.elapsed()), size: Some(size) })
}

/// Brings a fork back from standby.
///
/// # Errors
/// [`StandbyError`]; the fork is in standby still.
pub fn resume(home: &Home, store: &Store, fork: &ForkRecord) -> Result<Moved, StandbyError> {
    let begun = Instant::now();
    let operation = begin(home, store, fork)?;
    let mut record = source::record_of(home, fork)?;
    let name = record.name.to_string();
    if record.standby.is_none() {
        return Err(if record.is_alive() { StandbyError::Runs { name } } else { SourceError::Dead { name }.into() });
    }
    let (template, engine) = base(store, &record)?;
    let snapshot = Snapshot::of_standby(home, &record.id, &template)?;
    let manifest = template.manifest();
    fault::point("resume.checked", None).map_err(state("checking what the fork was"))?;

    let ack_key = AckKey::new(random().map_err(source::begin("drawing a key"))?);
    let unseal = operation.unseal().map_err(state("reading the key of the fork's secrets"))?;
    let journal = Journal { kind: Kind::Resume, ack_key, unseal, nonce: None };
    operation.note(&journal).map_err(state("noting what is begun"))?;
    let mut undo = Undo { operation: &operation, record: &record, done: false };
    fault::point("resume.noted", None).map_err(state("noting what is begun"))?;

    let cgroups = ForkCgroups::make(&record.id, &limits_of(&record))?;
    let procs = cgroups.procs();
    let mut wire = Wire::connect(home, &record)?;
    fault::point("resume.connected", None).map_err(state("connecting the fork's network"))?;
    let spec = RestoreSpec {
        dir: operation.dir(),
        machine: manifest.machine,
        root_image: &template.root_image(),
        memory_file: &template.memory_file(),
        state_file: &snapshot.state(),
        delta: Some((&snapshot.delta(), &manifest.id)),
        pages_file: None,
        network: wire.end(),
        confinement: Confinement { cgroups: &procs, ..confine::of_fork(&record.id, &manifest.id) },
    };
    let paused = engine.restore(&spec)?;
    let process = paused.process().clone();
    // Until it is noted, only its directory leads to it.
    fault::point("resume.started", Some(&process)).map_err(state("starting the fork's machine"))?;
    record::write_json(operation.dir(), record::PROCESS, &process).map_err(state("noting the fork's process"))?;
    fault::point("resume.loaded", Some(&process)).map_err(state("loading the fork"))?;

    let own = MailboxName::identity();
    let mailbox = snapshot.manifest().mailboxes.iter().find(|mailbox| mailbox.name == own);
    let mailbox = mailbox.ok_or(SourceError::NotArmed)?;
    let document = source::continue_document(&record, &journal)?;
    let letter = source::letter_of(mailbox, &document, &journal);
    let sealed = paused.deliver(letter, Vec::new())?;
    fault::point("resume.delivered", Some(&process)).map_err(state("telling the fork to go on"))?;
    let mut running = Running(Some(sealed.resume()?));
    fault::point("resume.resumed", Some(&process)).map_err(state("letting the fork go on"))?;
    let mut waiter = source::continue_waiter(&record, manifest, &journal.ack_key);
    waiter.start();
    if let Some(vm) = &running.0 {
        waiter.wait_for(&own, &vm.ack_stream)?;
    }
    fault::point("resume.acked", Some(&process)).map_err(state("the ack"))?;
    let mut now = record.clone();
    now.process = process.clone();
    now.standby = None;
    wire.open(&mut now)?;
    drop(procs);
    now.cgroups = cgroups.keep();
    record::rewrite(operation.dir(), &now).map_err(state("writing the fork's record"))?;
    // From here on it runs, whatever happens.
    undo.done = true;
    drop(undo);
    drop(running.0.take());
    wire.keep();
    record = now;
    fault::point("resume.committed", Some(&process)).map_err(state("removing what the fork was"))?;
    settle_resumed(home, &operation, &record)?;
    Ok(Moved { record, micros: micros(begun.elapsed()), size: None })
}

/// Takes the fork's operation, once it is as its record says.
pub(crate) fn begin(home: &Home, store: &Store, fork: &ForkRecord) -> Result<Operation, SourceError> {
    let dir = forks::dir(home, fork);
    let operation = Operation::begin(&dir, false).map_err(state("locking the fork"))?;
    let operation = operation.ok_or_else(|| SourceError::Busy { name: fork.name.to_string() })?;
    recover(home, store, &operation)?;
    Ok(operation)
}

/// Brings a fork that somebody began something with, and died, to what its record says; or leaves it to whoever is at it.
///
/// # Errors
/// [`SourceError`]; another try may do it.
pub fn settle(home: &Home, store: &Store, fork: &ForkRecord) -> Result<ForkRecord, SourceError> {
    let dir = forks::dir(home, fork);
    if operation::is_under_way(&dir)
        && let Some(operation) = Operation::begin(&dir, false).map_err(state("locking the fork"))?
    {
        // Whoever asks may do so on a thread that runs futures, and this one has some of its own.
        thread::scope(|scope| {
            let settling = scope.spawn(|| recover(home, store, &operation));
            settling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        return record::read(&dir).map_err(state("reading the fork's record"));
    }
    Ok(fork.clone())
}

/// Removes a template, unless a fork in standby needs it.
///
/// # Errors
/// [`StoreError`].
pub fn remove_template(home: &Home, store: &Store, tag: &Tag) -> Result<(), StoreError> {
    let mut removed = None;
    store.remove_unless(tag, |id| {
        let forks: Vec<String> = snapshot::above(home, id).ok()?.iter().map(|fork| format!("fork {fork}")).collect();
        removed = Some(id.to_owned());
        (!forks.is_empty()).then(|| forks.join(", "))
    })?;
    if let Some(id) = removed {
        pages::remove(home, &id);
    }
    Ok(())
}

/// Whether somebody began something with a fork and died.
pub(crate) fn is_interrupted(home: &Home, fork: &ForkRecord) -> bool {
    let dir = forks::dir(home, fork);
    operation::is_under_way(&dir) && !operation::is_held(&dir)
}

fn recover(home: &Home, store: &Store, operation: &Operation) -> Result<(), SourceError> {
    if operation.journal().map_err(state("reading what was begun"))?.is_none() {
        return Ok(());
    }
    let record = record::read(operation.dir()).map_err(state("reading the fork's record"))?;
    snapshot::remove_drafts(home, &record.id).map_err(state("removing what was half made"))?;
    if record.standby.is_some() {
        return finish(operation, &record);
    }
    source::recover(store, operation, &record)?;
    settle_resumed(home, operation, &record)
}

/// Ends everything of a fork in standby that is not its record and what is on disk: the machine that ran, or one that was to.
fn finish(operation: &Operation, record: &ForkRecord) -> Result<(), SourceError> {
    let dir = operation.dir();
    let noted = record::read_json::<ProcessRef>(&dir.join(record::PROCESS)).ok();
    let unnoted = operation.unnoted().map_err(state("looking for machines that were not noted"))?;
    for process in noted.iter().chain([&record.process]).chain(&unnoted) {
        process.kill(KILL_LIMIT).map_err(state("ending the machine"))?;
    }
    limits::remove(&record.cgroups, &record.id).map_err(state("removing the fork's control groups"))?;
    if let Some(process) = record.network.as_ref().and_then(|network| network.process.as_ref()) {
        network::end_user(process).map_err(state("ending the fork's network"))?;
    }
    clear(dir).map_err(state("removing the machine's sockets"))?;
    operation.settle().map_err(state("noting that the fork is in standby"))
}

/// Removes what only a machine needs: its sockets, its pipe, and the note of its process.
fn clear(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let socket = path.extension().is_some_and(|extension| extension == "sock" || extension == "pipe");
        if socket || path.file_name().is_some_and(|name| name == record::PROCESS) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Removes what a fork that runs was on disk.
fn settle_resumed(home: &Home, operation: &Operation, record: &ForkRecord) -> Result<(), SourceError> {
    snapshot::remove(home, &record.id).map_err(state("removing what the fork was"))?;
    operation.forget_unseal().map_err(state("removing the key of the fork's secrets"))?;
    match fs::remove_file(operation.dir().join(record::PROCESS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(state("settling the fork")(error)),
        _ => {}
    }
    operation.settle().map_err(state("noting that the fork runs"))
}

/// A resume that fails leaves the fork as it was.
struct Undo<'a> {
    operation: &'a Operation,
    record: &'a ForkRecord,
    done: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if !self.done {
            // What is noted stays noted if this fails: the next command tries again.
            let _ = finish(self.operation, self.record);
        }
    }
}

/// What the card of a resumed fork is connected to.
#[derive(Debug)]
enum Wire {
    None,
    Tap(OwnedFd),
    User { link: Option<UserLink>, machine: OwnedFd, process: Option<net::UserProcess> },
}

impl Wire {
    fn connect(home: &Home, record: &ForkRecord) -> Result<Self, NetworkError> {
        Ok(match record.network.as_ref().map(|network| network.mode) {
            None | Some(Mode::None) => Self::None,
            // The link has stayed, with its addresses, its policy and its ports.
            Some(Mode::Tap) => Self::Tap(network::open(home)?.tap(&record.id)?),
            Some(Mode::User) => {
                let (link, machine) = UserLink::new(UserAddresses::of(&record.id))?;
                Self::User { link: Some(link), machine, process: None }
            }
        })
    }

    fn end(&self) -> Option<NetworkEnd<'_>> {
        match self {
            Self::None => None,
            Self::Tap(tap) => Some(NetworkEnd::Tap(tap.as_fd())),
            Self::User { machine, .. } => Some(NetworkEnd::Stream(machine.as_fd())),
        }
    }

    /// The fork is itself again: what is at the other end may be started.
    fn open(&mut self, record: &mut ForkRecord) -> Result<(), NetworkError> {
        if let (Self::User { link, process, .. }, Some(report)) = (self, &mut record.network)
            && let Some(link) = link.take()
        {
            let started = link.start(&report.policy, RunAs::default())?;
            *process = Some(started);
            report.process = Some(started);
        }
        Ok(())
    }

    fn keep(mut self) {
        if let Self::User { process, .. } = &mut self {
            *process = None;
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Self::User { process: Some(process), .. } = self {
            let _ = network::end_user(process);
        }
    }
}

fn limits_of(record: &ForkRecord) -> LimitRequest {
    let limit = |name: &str| record.limits.get(name).copied();
    LimitRequest { memory: limit("memory"), cpu_millis: limit("cpu_millis"), pids: limit("pids") }
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use identity::ForkId;

    use super::*;
    use crate::rig::{self, Machine};

    /// A fork in standby whose resume ended right after its machine was started.
    fn half_resumed(home: &Home, id: &ForkId) -> (ForkRecord, Machine) {
        let mut gone = ProcessRef::myself().unwrap();
        gone.start_time += 1;
        let record = rig::in_standby(rig::record(id, &gone));
        let machine = Machine::of_fork(home, id);
        let dir = forks::dir(home, &record);
        record::write_json(&dir, record::RECORD, &record).unwrap();
        let operation = Operation::begin(&dir, false).unwrap().unwrap();
        let journal = Journal { kind: Kind::Resume, ack_key: AckKey::new([1; 32]), unseal: None, nonce: None };
        operation.note(&journal).unwrap();
        (record, machine)
    }

    #[test]
    fn o2_a_machine_that_a_resume_started_and_did_not_note_is_ended() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::below(place.path()).make().unwrap();
        let store = Store::open(&home.data).unwrap();
        let neighbour = Machine::of_fork(&home, &rig::id('0'));
        let running = rig::record(&rig::id('0'), &neighbour.process);
        record::write_json(&forks::dir(&home, &running), record::RECORD, &running).unwrap();

        let (settled, machine) = half_resumed(&home, &rig::id('a'));
        assert!(machine.process.is_alive() && is_interrupted(&home, &settled));
        assert_eq!(settle(&home, &store, &settled).unwrap(), settled, "it is in standby still");
        assert!(!machine.process.is_alive() && !is_interrupted(&home, &settled));

        let (killed, machine) = half_resumed(&home, &rig::id('b'));
        forks::kill(&home, &killed).unwrap();
        assert!(!machine.process.is_alive() && !forks::dir(&home, &killed).exists());
        assert!(neighbour.process.is_alive(), "another fork's");
    }
}
