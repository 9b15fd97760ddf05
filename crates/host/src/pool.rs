//! Spare machines: started and loaded ahead of time, stopped and without identity, so that a fork need not wait for that. What an identity
//! takes they have [rehearsed](crate::rehearsal).
//!
//! ```text
//! <state>/pools/<tag>           how many spares a template is to have
//! <state>/forks/.spare-<id>/    a spare; it becomes the fork <id>, and nobody else's
//! ```
//!
//! A spare is a fork that is half made, and made so far for whoever asks next. Taking one is locking it and renaming its
//! directory; who loses the race takes the next. A pool is a convenience: a fork that finds no spare, or none that it can
//! use, starts a machine of its own.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    time::Duration,
};

use engine::{Confinement, Engine, EngineError, EngineInfo, NetworkEnd, ProcessRef, RestoreSpec};
use identity::{Network as Section, Tag};
use net::{ClosedLink, Dns, Egress, LinkError, Reach};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use store::{Manifest, Template};
use thiserror::Error;

use crate::{
    confine, fault,
    fork::{ForkError, new_id},
    forks,
    handoff::network::{NetworkError, TAP, tap_section},
    home::Home,
    network::{self, Mode},
    pages,
    record::{self, NewFork},
    rehearsal::{self, RehearsalError},
};

/// Most spares of one template: each holds some 20 MiB with QEMU, 30 with a network.
pub const MAX_SIZE: usize = 256;
/// Time for a spare to be gone once it is killed.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Why a pool could not be filled or changed.
#[derive(Debug, Error)]
pub enum PoolError {
    /// Too many.
    #[error("a pool has at most {MAX_SIZE} spare machines, not {0}")]
    TooMany(usize),
    /// Its socket would end with the process that made it.
    #[error("a pool serves forks with --network tap or none, not user")]
    UserNetwork,
    /// A spare could not be started.
    #[error("a spare machine could not be started")]
    Engine(#[from] EngineError),
    /// A spare ended right after it was loaded; trying for ever would be no help.
    #[error(
        "a spare machine ended right after it was started; see `offshoot doctor`, or do without: `offshoot pool TAG 0`"
    )]
    Ended,
    /// Its network could not be made.
    #[error("the network of a spare machine could not be made")]
    Network(#[from] LinkError),
    /// It did not rehearse.
    #[error("a spare machine could not rehearse")]
    Rehearsal(#[from] RehearsalError),
    /// What a fork's beginning can fail of.
    #[error(transparent)]
    Begin(#[from] ForkError),
    /// The state directory could not be read or written, or a spare could not be ended.
    #[error("{step} failed")]
    State {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What is known of a spare, in its directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spare {
    /// The template's tag.
    pub template: Tag,
    /// The template's id: a tag may be built anew.
    pub template_id: String,
    /// What runs it.
    pub engine: EngineInfo,
    /// Its process.
    pub process: ProcessRef,
    /// What its network card leads to.
    pub network: Mode,
    /// Whether it has rehearsed: not if its template or its engine is of a kind that does not.
    #[serde(default)]
    pub rehearsed: bool,
}

impl Spare {
    fn is_for(&self, manifest: &Manifest) -> bool {
        self.template == manifest.tag && self.template_id == manifest.id && self.engine == manifest.engine
    }
}

/// A template's pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// The template.
    pub template: Tag,
    /// How many spares it is to have.
    pub size: usize,
    /// What their network cards lead to.
    pub network: Mode,
    /// How many are ready.
    pub ready: usize,
    /// How many of these have rehearsed.
    pub rehearsed: usize,
    /// Bytes of memory that the spares have for themselves.
    pub private_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Setting {
    size: usize,
    network: Mode,
}

/// Every pool, by tag.
///
/// # Errors
/// [`PoolError::State`].
pub fn list(home: &Home) -> Result<Vec<Pool>, PoolError> {
    let state = |source| PoolError::State { step: "reading the pools", source };
    let spares: Vec<_> = record::spares(home).map_err(state)?.collect();
    let mut tags: Vec<Tag> = spares.iter().map(|(_, spare)| spare.template.clone()).collect();
    for entry in fs::read_dir(home.pools()).map_err(state)? {
        tags.extend(Tag::parse(&entry.map_err(state)?.file_name().to_string_lossy()));
    }
    tags.sort();
    tags.dedup();
    let pool = |template: Tag| {
        let own: Vec<_> =
            spares.iter().filter(|(_, spare)| spare.template == template && spare.process.is_alive()).collect();
        Pool {
            size: size(home, &template),
            network: setting(home, &template).map_or(Mode::None, |setting| setting.network),
            ready: own.len(),
            rehearsed: own.iter().filter(|(_, spare)| spare.rehearsed).count(),
            private_bytes: own.iter().filter_map(|(_, spare)| Some(forks::memory_of_process(&spare.process)?.0)).sum(),
            template,
        }
    };
    Ok(tags.into_iter().map(pool).collect())
}

/// How many spares a template is to have; 0 without a pool.
#[must_use]
pub fn size(home: &Home, tag: &Tag) -> usize {
    setting(home, tag).map_or(0, |setting| setting.size.min(MAX_SIZE))
}

fn setting(home: &Home, tag: &Tag) -> Option<Setting> {
    record::read_json(&home.pools().join(tag.as_str())).ok()
}

/// Says how many spares a template is to have, and what their network cards lead to; [`fill`] then makes it so. Only forks that ask for the
/// same network use them.
///
/// # Errors
/// [`PoolError`].
pub fn set_size(home: &Home, tag: &Tag, size: usize, network: Mode) -> Result<(), PoolError> {
    if size > MAX_SIZE {
        return Err(PoolError::TooMany(size));
    }
    if network == Mode::User {
        return Err(PoolError::UserNetwork);
    }
    let written = if size == 0 {
        match fs::remove_file(home.pools().join(tag.as_str())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    } else {
        record::write_json(&home.pools(), tag.as_str(), &Setting { size, network })
    };
    written.map_err(|source| PoolError::State { step: "noting the pool's size", source })
}

/// Starts the spares that a template lacks, and ends those that it has too many and those that nobody can use any more.
/// One at a time: who comes while another fills either waits for it or, with `wait` off, leaves it to that one.
///
/// # Errors
/// [`PoolError`]; the spares that are ready by then stay.
pub fn fill(home: &Home, engine: &dyn Engine, template: &Template, wait: bool) -> Result<(), PoolError> {
    let manifest = template.manifest();
    let Some(_lock) = lock(home, &manifest.tag, wait)? else { return Ok(()) };
    loop {
        let ready = trim(home, &manifest.tag, Some(manifest))?;
        if ready >= size(home, &manifest.tag) {
            return Ok(());
        }
        start_one(home, engine, template)?;
    }
}

/// Ends a template's spares and forgets its pool. The template may be gone already.
///
/// # Errors
/// [`PoolError`].
pub fn end(home: &Home, tag: &Tag) -> Result<(), PoolError> {
    set_size(home, tag, 0, Mode::None)?;
    let _lock = lock(home, tag, true)?;
    trim(home, tag, None).map(drop)
}

/// A spare for a fork of this template with this network, if there is one: it is the caller's now, with its link.
#[must_use]
pub fn take(home: &Home, manifest: &Manifest, network: Mode) -> Option<(NewFork, ProcessRef)> {
    if size(home, &manifest.tag) == 0 {
        return None;
    }
    record::spares(home)
        .ok()?
        .filter(|(_, spare)| spare.is_for(manifest) && spare.network == network && spare.process.is_alive())
        .find_map(|(id, spare)| Some((NewFork::from_spare(home, &id, &spare.process).ok()??, spare.process)))
}

/// What a template's spares are connected to: a template without a card has nothing to connect.
fn network_of(home: &Home, manifest: &Manifest) -> Mode {
    setting(home, &manifest.tag).filter(|_| manifest.machine.network).map_or(Mode::None, |setting| setting.network)
}

fn start_one(home: &Home, engine: &dyn Engine, template: &Template) -> Result<(), PoolError> {
    let state = |step| move |source| PoolError::State { step, source };
    let manifest = template.manifest();
    let id = new_id()?;
    let new = NewFork::begin(home, &id).map_err(state("making the spare's directory"))?;
    fault::point("pool.directory", None).map_err(state("making the spare's directory"))?;
    let network = network_of(home, manifest);
    let link = if network == Mode::Tap { Some(network::open(home)?.prepare(&id, TAP)?) } else { None };
    fault::point("pool.network", None).map_err(state("making the spare's network"))?;
    let tap = link.as_ref().map(ClosedLink::tap).transpose()?;
    let spare = engine.prepare(&RestoreSpec {
        dir: new.dir(),
        machine: manifest.machine,
        root_image: &template.root_image(),
        memory_file: &template.memory_file(),
        state_file: &template.state_file(),
        delta: None,
        pages_file: pages::file(home, template, network).as_deref(),
        network: tap.as_ref().map(|tap| NetworkEnd::Tap(tap.as_fd())),
        confinement: Confinement { cgroups: &[], ..confine::of_fork(&id, &manifest.id) },
    })?;
    let process = spare.process().clone();
    new.note_process(&process).map_err(state("noting the spare's process"))?;
    fault::point("pool.loaded", Some(&process)).map_err(state("loading the template"))?;
    if !process.is_alive() {
        return Err(PoolError::Ended);
    }
    let rehearsed = manifest.rehearses && engine.capabilities().rehearse;
    let spare = if rehearsed {
        let section = link.as_ref().map(section_of).transpose().map_err(ForkError::from)?;
        rehearsal::rehearse(spare, manifest, section)?
    } else {
        spare
    };
    fault::point("pool.rehearsed", Some(&process)).map_err(state("rehearsing"))?;
    if !process.is_alive() {
        return Err(PoolError::Ended);
    }
    let record = Spare {
        template: manifest.tag.clone(),
        template_id: manifest.id.clone(),
        engine: manifest.engine.clone(),
        process,
        network,
        rehearsed,
    };
    // Before the spare can be taken: whoever takes it finds its link free. (That its machine ends is tried at the point before.)
    let link = link.map(ClosedLink::keep);
    let noted = fault::point("pool.kept", None).and_then(|()| new.set_aside(home, &record));
    if let Err(source) = noted {
        drop(spare);
        // What can not be removed stays recorded, and `cleanup` finds it.
        let _ = link.map(|link| network::remove(home, &link.id));
        return Err(state("noting the spare")(source));
    }
    spare.release();
    Ok(())
}

/// Who the spare will be on the wire.
fn section_of(link: &ClosedLink) -> Result<Section, NetworkError> {
    let addresses = link.record().addresses;
    let egress = Egress::default();
    let reach = Reach { mode: Mode::Tap, egress: &egress, v4: true, v6: addresses.v6.is_some() };
    tap_section(&addresses, &Dns::of(reach, &[]).servers)
}

/// Ends the spares of `tag` that `template` can not use, and those above its pool's size; how many are left.
fn trim(home: &Home, tag: &Tag, template: Option<&Manifest>) -> Result<usize, PoolError> {
    let state = |source| PoolError::State { step: "ending a spare machine", source };
    let size = size(home, tag);
    let mut ready = 0;
    for (id, spare) in record::spares(home).map_err(state)?.filter(|(_, spare)| spare.template == *tag) {
        let is_for = |manifest: &Manifest| spare.is_for(manifest) && spare.network == network_of(home, manifest);
        if ready < size && spare.process.is_alive() && template.is_some_and(is_for) {
            ready += 1;
        } else if let Some(taken) = NewFork::from_spare(home, &id, &spare.process).map_err(state)? {
            spare.process.kill(KILL_LIMIT).map_err(state)?;
            if spare.network != Mode::None {
                network::remove(home, &id).map_err(state)?;
            }
            drop(taken);
        }
    }
    Ok(ready)
}

fn lock(home: &Home, tag: &Tag, wait: bool) -> Result<Option<File>, PoolError> {
    let state = |source| PoolError::State { step: "locking the pool", source };
    let path = home.pools().join(format!(".lock-{tag}"));
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(state)?;
    let operation = if wait { FlockOperation::LockExclusive } else { FlockOperation::NonBlockingLockExclusive };
    match flock(&lock, operation) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(state(error.into())),
    }
}
