//! `fork` of a fork: children that begin where their source is, each with an identity of its own.
//!
//! The source is captured (see [`crate::source`]) and goes on at once; only then are children made, of its template, the pages it had for
//! itself and its devices. Memory and disk are of one moment, because the disk is in memory. What was captured is kept until the last
//! child has its copy. A source in standby is on disk already, and stays there.

use serde::Serialize;
use store::Store;

use crate::{
    fork::{self, ForkError, Origin, micros},
    home::Home,
    record::{ForkRecord, StepTime},
    request::ForkRequest,
    snapshot::{Draft, Snapshot},
    source::{self, Held, Source, SourceError},
    standby,
};

/// What became of a request to fork a fork.
#[derive(Debug)]
pub struct Branched {
    /// The children, in the order of the requests.
    pub forks: Vec<Result<ForkRecord, ForkError>>,
    /// How long the source was held up; none if it is in standby.
    pub pause: Option<Pause>,
}

/// How long a source was held up, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pause {
    /// From the request to its ack after the thaw, as the host sees it.
    pub asked_micros: u64,
    /// Of this, from the freeze of its workload (by the guest's clock) on: nothing of it ran.
    pub frozen_micros: u64,
    /// Of this, the time in which its virtual CPUs stood still.
    pub stopped_micros: u64,
    /// Bytes of memory that it had for itself.
    pub dirty_bytes: u64,
    /// Bytes that were written for its children.
    pub written_bytes: u64,
    /// What took how long.
    pub steps: Vec<StepTime>,
}

/// Makes the forks of `source` that the requests ask for; one result per fork, in order. A fork that fails does not undo the others.
///
/// # Errors
/// The number of the request (from 0) with which something is wrong, and what; for what concerns the source it is 0. No fork was made then,
/// and the source is as it was. Only what is wrong with a mailbox of the source's (that it has none of this name, another token, less room) is found
/// out once it was captured; everything else before it is touched.
pub fn fork_from(
    home: &Home,
    store: &Store,
    source: &ForkRecord,
    requests: &[ForkRequest],
) -> Result<Branched, (usize, ForkError)> {
    let first = |error: SourceError| (0, error.into());
    let operation = standby::begin(home, store, source).map_err(first)?;
    let record = source::record_of(home, source).map_err(first)?;
    let (template, engine) = source::base(store, &record).map_err(first)?;
    for (number, request) in requests.iter().enumerate() {
        fork::check_early(home, engine.as_ref(), &template, request).map_err(|error| (number, error))?;
    }
    let (draft, snapshot, pause);
    if record.standby.is_some() {
        // The operation is ours until the children have their copies: it is not resumed meanwhile.
        snapshot = Snapshot::of_standby(home, &record.id, &template).map_err(|error| first(error.into()))?;
        (draft, pause) = (None, None);
    } else {
        if !record.is_alive() {
            return Err(first(SourceError::Dead { name: record.name.to_string() }));
        }
        let new = Draft::begin(home, &record.id).map_err(|error| first(error.into()))?;
        let running = Source { record: &record, template: &template, engine: engine.as_ref(), operation: &operation };
        let captured = running.capture(&new).map_err(first)?;
        let size = captured.found.size;
        snapshot = new.for_children(template.manifest(), &captured.found);
        let Held { asked, frozen, stopped, steps } = captured.go_on().map_err(first)?;
        pause = Some(Pause {
            asked_micros: micros(asked),
            frozen_micros: micros(frozen),
            stopped_micros: micros(stopped),
            dirty_bytes: size.dirty,
            written_bytes: size.data,
            steps,
        });
        draft = Some(new);
    }
    let held = record.standby.is_some().then_some(operation);
    let mut manifest = template.manifest().clone();
    manifest.mailboxes.clone_from(&snapshot.manifest().mailboxes);
    manifest.ambiguous.clone_from(&snapshot.manifest().ambiguous);
    let origin = Origin { template: &template, manifest: &manifest, snapshot: Some(&snapshot) };
    let forks = fork::fork_all(home, engine.as_ref(), origin, requests)?;
    drop((draft, held));
    Ok(Branched { forks, pause })
}
