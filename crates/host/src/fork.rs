//! `fork`: clones of a template, each with an identity of its own before it runs.
//!
//! One fork is a list of steps. Whatever a step makes is a guard that undoes it: the directory and the name
//! ([`NewFork`]), the control groups ([`ForkCgroups`]), the machine ([`engine::PausedVm`], [`engine::SealedVm`], and
//! [`Running`] below). They are released in reverse order, and kept only when every ack is there.

use std::{
    collections::BTreeMap,
    io,
    num::NonZero,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use engine::{Confinement, DeliverError, Engine, EngineError, Letter, ProcessRef, RestoreSpec, RunningVm};
use identity::{
    AckKey, Action, ClockNanos, Document, File, ForkId, ForkIdentity, ForkName, Limits, MailboxName, NameError, Secret,
    document::{ENTROPY_LEN, FORMAT},
};
use memory::Mailbox;
use store::Template;
use thiserror::Error;

use crate::{
    acks::{AckWaitError, Received, Waiter},
    confine, fault,
    home::Home,
    limits::{ForkCgroups, LimitError},
    pages, pool,
    record::{ForkRecord, MailboxReport, NewFork, StepTime},
    request::{Addressed, ForkRequest, RequestError},
};

/// Time for the identity's ack. Applying takes milliseconds; services that restart at a fork take what they take.
pub const IDENTITY_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for a spare machine to be gone once it is killed.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Why a fork was not made. Nothing of it is left.
#[derive(Debug, Error)]
pub enum ForkError {
    /// The request is not valid.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The name is taken.
    #[error("the name {0} is taken by another fork; see `offshoot ls`, or choose another with --name")]
    NameTaken(ForkName),
    /// The engine can not do what the request needs.
    #[error(
        "the {engine} engine can not write mailboxes; leave --mailbox out, or build the template with another engine"
    )]
    NotSupported {
        /// The engine.
        engine: engine::EngineName,
    },
    /// The template can not run with this engine.
    #[error("template {tag} can not be forked here: {reason}; build it again with `offshoot build … --tag {tag}`")]
    Incompatible {
        /// The template.
        tag: identity::Tag,
        /// Why.
        reason: String,
    },
    /// A limit can not be applied.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The machine could not be started.
    #[error("the fork's machine could not be started")]
    Engine(#[from] EngineError),
    /// The identity could not be delivered.
    #[error(transparent)]
    Deliver(#[from] DeliverError),
    /// The fork did not acknowledge, and was destroyed.
    #[error("the fork was destroyed: {0}")]
    Ack(#[from] AckWaitError),
    /// The state directory could not be written, or a test made the step fail.
    #[error("{step} failed")]
    State {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No random bytes.
    #[error("the system gave no random bytes: {0}")]
    Random(getrandom::Error),
    /// A made-up name is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// Makes the forks that `request` asks for; one result per fork, in order. A fork that fails does not undo the others.
///
/// # Errors
/// [`ForkError`] as a whole only for what is wrong with the request itself: no work was begun then.
pub fn fork(
    home: &Home,
    engine: &dyn Engine,
    template: &Template,
    request: &ForkRequest,
) -> Result<Vec<Result<ForkRecord, ForkError>>, ForkError> {
    let manifest = template.manifest();
    if !engine.capabilities().patch_memory {
        return Err(ForkError::NotSupported { engine: engine.info().name });
    }
    check_compatible(engine, template)?;
    let letters = request.check(manifest)?;
    let identity =
        manifest.mailboxes.iter().find(|mailbox| mailbox.name.as_str() == MailboxName::IDENTITY).ok_or_else(|| {
            ForkError::Incompatible { tag: manifest.tag.clone(), reason: "it has no identity mailbox".into() }
        })?;
    let plan = Plan { home, engine, template, request, identity, letters };
    plan.check_size()?;

    // More at once than CPUs, because a start waits for the disk now and then; many more only slow each other down.
    let workers = thread::available_parallelism().map_or(2, NonZero::get).saturating_mul(2).min(request.count);
    let next = AtomicUsize::new(0);
    let mut results: Vec<(usize, Result<ForkRecord, ForkError>)> = thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= request.count {
                    return done;
                }
                done.push((index, plan.fork_one(index)));
            }
        };
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        #[allow(clippy::expect_used)]
        handles.into_iter().flat_map(|handle| handle.join().expect("a fork's thread does not panic")).collect()
    });
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

fn check_compatible(engine: &dyn Engine, template: &Template) -> Result<(), ForkError> {
    let (made, ours) = (&template.manifest().engine, engine.info());
    if made == ours {
        return Ok(());
    }
    let reason = format!(
        "it was made by {} {} ({}), and this is {} {} ({})",
        made.name, made.version, made.accel, ours.name, ours.version, ours.accel
    );
    Err(ForkError::Incompatible { tag: template.manifest().tag.clone(), reason })
}

struct Plan<'a> {
    home: &'a Home,
    engine: &'a dyn Engine,
    template: &'a Template,
    request: &'a ForkRequest,
    identity: &'a Mailbox,
    letters: Vec<Addressed<'a>>,
}

/// A machine that runs and whose acks are still awaited: killed on drop.
struct Running(Option<RunningVm>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(vm) = self.0.take() {
            let _ = vm.destroy();
        }
    }
}

/// A spare machine that no engine value holds: killed on drop.
struct Ending(Option<ProcessRef>);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            let _ = process.kill(KILL_LIMIT);
        }
    }
}

/// Notes what each step took.
struct Stopwatch {
    start: Instant,
    last: Instant,
    steps: Vec<StepTime>,
}

impl Stopwatch {
    fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, steps: Vec::new() }
    }

    fn step(&mut self, step: &str) {
        let now = Instant::now();
        self.steps.push(StepTime { step: step.into(), outcome: String::new(), micros: micros(now - self.last) });
        self.last = now;
    }
}

impl Plan<'_> {
    /// Whether the document of the fork with the longest name fits the mailbox: found out before any work.
    fn check_size(&self) -> Result<(), ForkError> {
        let mut fork = self.identity_of(ForkId::parse(&"0".repeat(20))?, ForkName::parse(&"a".repeat(63))?)?;
        fork.template.clone_from(&self.template.manifest().tag);
        let document = self.document(fork, &AckKey::new([0; 32]))?;
        let (len, capacity) = (document.to_bytes().expose().len(), self.identity.capacity);
        if len > capacity {
            return Err(RequestError::IdentityTooLong { len, capacity }.into());
        }
        Ok(())
    }

    fn fork_one(&self, index: usize) -> Result<ForkRecord, ForkError> {
        let state = |step| move |source| ForkError::State { step, source };
        let mut watch = Stopwatch::start();
        let (mut new, spare) = match self.spare() {
            Some((new, process)) => (new, Some(process)),
            None => (NewFork::begin(self.home, &new_id()?).map_err(state("making the fork's directory"))?, None),
        };
        let id = new.id().clone();
        // A spare is nobody's child: it goes with this value until the engine has it.
        let mut spare = Ending(spare);
        fault::point("fork.directory", None).map_err(state("making the fork's directory"))?;
        let name = self.take_name(&mut new, index, &id)?;
        fault::point("fork.name", None).map_err(state("taking the fork's name"))?;
        let cgroups = ForkCgroups::make(&id, &self.request.limits)?;
        fault::point("fork.limits", None).map_err(state("making the fork's limits"))?;
        watch.step("reserve");

        let manifest = self.template.manifest();
        let procs = cgroups.procs();
        let pages = pages::file(self.home, self.template);
        let spec = RestoreSpec {
            dir: new.dir(),
            machine: manifest.machine,
            root_image: &self.template.root_image(),
            memory_file: &self.template.memory_file(),
            state_file: &self.template.state_file(),
            pages_file: pages.as_deref(),
            network: None,
            confinement: Confinement { cgroups: &procs, ..confine::of_fork(&id, &manifest.id) },
        };
        let paused = match spare.0.as_ref().map(|process| self.engine.adopt(&spec, process)) {
            Some(Ok(paused)) => {
                spare.0 = None;
                watch.step("take over a spare");
                paused
            }
            unusable => {
                if unusable.is_some() {
                    drop(spare);
                    new.clear().map_err(state("removing a spare that can not be used"))?;
                }
                let paused = self.engine.restore(&spec)?;
                watch.step("start and load");
                paused
            }
        };
        let process = paused.process().clone();
        new.note_process(&process).map_err(state("noting the fork's process"))?;
        fault::point("fork.loaded", Some(&process)).map_err(state("loading the template"))?;

        let ack_key = AckKey::new(random()?);
        let identity = self.identity_of(id.clone(), name.clone())?;
        let (record_id, hostname) = (identity.machine_id.clone(), identity.hostname.clone());
        let boot_id = identity.boot_id.clone();
        let (waiter, letter, others) = self.letters(&id, &ack_key, self.document(identity, &ack_key)?.to_bytes());
        let sealed = paused.deliver(letter, others)?;
        watch.step("deliver");
        fault::point("fork.delivered", Some(&process)).map_err(state("delivering the identity"))?;

        let running = Running(Some(sealed.resume()?));
        fault::point("fork.resumed", Some(&process)).map_err(state("resuming"))?;
        watch.step("resume");
        #[allow(clippy::expect_used)]
        let acks = waiter.wait(&running.0.as_ref().expect("set above").ack_stream)?;
        watch.step("acknowledge");
        let acked = acks.get(&MailboxName::identity()).map_or(watch.last, |received| received.at);
        fault::point("fork.acked", Some(&process)).map_err(state("the ack"))?;

        let mut record = ForkRecord {
            format: ForkRecord::FORMAT,
            id,
            name,
            hostname,
            template: manifest.tag.clone(),
            template_id: manifest.id.clone(),
            engine: self.engine.info().clone(),
            process,
            created_ms: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            machine_id: record_id,
            boot_id,
            labels: self.request.labels.clone(),
            env: self.request.env.keys().map(ToString::to_string).collect(),
            secrets: self.request.secrets.keys().map(ToString::to_string).collect(),
            files: self.request.files.keys().cloned().collect(),
            mailboxes: self.mailbox_reports(&acks),
            limits: self.limits_asked(),
            cgroups: Vec::new(),
            acked_micros: micros(acked - watch.start),
            host_steps: watch.steps,
            guest_steps: guest_steps(&acks),
        };
        pages::note(self.home, self.engine, self.template, &record.process);
        drop(procs);
        // Nothing may fail between keeping the groups and publishing the record that names them.
        record.cgroups = cgroups.keep();
        let published = new.publish(self.home, &record);
        if let Err(source) = published {
            drop(running);
            let _ = crate::limits::remove(&record.cgroups, &record.id);
            return Err(ForkError::State { step: "writing the fork's record", source });
        }
        let mut running = running;
        // The machine lives on; only our handle of it goes.
        drop(running.0.take());
        Ok(record)
    }

    /// A machine from the template's pool. Limits of the host are taken on when a machine starts, so a fork that is to have
    /// some starts its own.
    fn spare(&self) -> Option<(NewFork, ProcessRef)> {
        let limits = &self.request.limits;
        if limits.memory.is_some() || limits.cpu_millis.is_some() {
            return None;
        }
        pool::take(self.home, self.template.manifest())
    }

    fn take_name(&self, new: &mut NewFork, index: usize, id: &ForkId) -> Result<ForkName, ForkError> {
        let name = match self.request.name_of(index) {
            Some(name) => name,
            None => made_up_name(self.template.manifest().tag.as_str(), id)?,
        };
        match new.take_name(self.home, &name) {
            Ok(true) => Ok(name),
            Ok(false) => Err(ForkError::NameTaken(name)),
            Err(source) => Err(ForkError::State { step: "taking the fork's name", source }),
        }
    }

    fn identity_of(&self, id: ForkId, name: ForkName) -> Result<ForkIdentity, ForkError> {
        Ok(ForkIdentity {
            id,
            hostname: name.clone(),
            name,
            template: self.template.manifest().tag.clone(),
            machine_id: uuid4(random()?).replace('-', ""),
            boot_id: uuid4(random()?),
        })
    }

    fn document(&self, fork: ForkIdentity, ack_key: &AckKey) -> Result<Document, ForkError> {
        let request = self.request;
        let files = request.files.iter().map(|(path, (content, mode))| File {
            path: path.clone(),
            mode: *mode,
            content: content.clone(),
        });
        Ok(Document {
            format: FORMAT,
            action: Action::Become,
            fork,
            labels: request.labels.clone(),
            env: request.env.clone(),
            secrets: request.secrets.clone(),
            files: files.collect(),
            wall_clock: ClockNanos(u64::try_from(now().as_nanos()).unwrap_or(u64::MAX)),
            entropy: Secret::new(random::<ENTROPY_LEN>()?.to_vec()),
            ack_key: ack_key.clone(),
            limits: Limits {
                pids: request.limits.pids,
                memory: request.limits.memory,
                cpu_millis: request.limits.cpu_millis,
            },
            network: None,
        })
    }

    fn letters(&self, id: &ForkId, ack_key: &AckKey, identity: Secret) -> (Waiter, Letter<'_>, Vec<Letter<'_>>) {
        let own = MailboxName::identity();
        let names = self.letters.iter().map(|letter| letter.mailbox.name.clone()).chain([own.clone()]);
        let keys: BTreeMap<_, _> = names.map(|name| (name.clone(), ack_key.for_mailbox(&name))).collect();
        let letter = |mailbox: &'_ Mailbox, payload| (payload, keys[&mailbox.name].clone());
        let others = self
            .letters
            .iter()
            .map(|addressed| {
                let (payload, ack_key) = letter(addressed.mailbox, addressed.request.payload.clone());
                Letter { mailbox: addressed.mailbox, payload, ack_key }
            })
            .collect();
        let identity = Letter { mailbox: self.identity, payload: identity, ack_key: keys[&own].clone() };
        let mut waiter = Waiter::new(id.clone(), keys);
        waiter.want(own, IDENTITY_TIMEOUT);
        for addressed in self.letters.iter().filter(|addressed| addressed.request.wait_ack) {
            waiter.want(addressed.mailbox.name.clone(), addressed.request.timeout());
        }
        (waiter, identity, others)
    }

    fn mailbox_reports(&self, acks: &BTreeMap<MailboxName, Received>) -> Vec<MailboxReport> {
        let report = |letter: &Addressed<'_>| MailboxReport {
            name: letter.mailbox.name.to_string(),
            acknowledged: letter.request.wait_ack.then(|| acks.contains_key(&letter.mailbox.name)),
        };
        self.letters.iter().map(report).collect()
    }

    fn limits_asked(&self) -> BTreeMap<String, u64> {
        let limits = &self.request.limits;
        [("memory", limits.memory), ("cpu_millis", limits.cpu_millis), ("pids", limits.pids)]
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect()
    }
}

fn guest_steps(acks: &BTreeMap<MailboxName, Received>) -> Vec<StepTime> {
    let steps = acks.get(&MailboxName::identity()).map(|received| received.ack.steps.as_slice()).unwrap_or_default();
    let clean = |text: &str| text.chars().filter(|character| !character.is_control()).take(64).collect();
    steps
        .iter()
        .map(|step| StepTime { step: clean(&step.name), outcome: clean(&step.outcome), micros: step.micros })
        .collect()
}

/// `<template>-<first six digits of the id>`, as a DNS label.
fn made_up_name(tag: &str, id: &ForkId) -> Result<ForkName, NameError> {
    let plain: String = tag
        .chars()
        .map(|character| if character.is_ascii_alphanumeric() { character.to_ascii_lowercase() } else { '-' })
        .take(40)
        .collect();
    let plain = plain.trim_matches('-');
    let stem = if plain.is_empty() { "fork" } else { plain };
    ForkName::parse(&format!("{stem}-{}", &id.as_str()[..8]))
}

pub(crate) fn new_id() -> Result<ForkId, ForkError> {
    use std::fmt::Write as _;
    let text = random::<10>()?.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    Ok(ForkId::parse(&text)?)
}

/// A version 4 UUID from 16 random bytes (RFC 9562, section 5.4).
fn uuid4(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let number = u128::from_be_bytes(bytes);
    let hex = format!("{number:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn random<const N: usize>() -> Result<[u8; N], ForkError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(ForkError::Random)?;
    Ok(bytes)
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn made_up_names_are_valid_for_every_tag() {
        let id = ForkId::parse("0123456789abcdef0123").unwrap();
        for tag in ["python-3.11", "_", "___x", "A", &"Z".repeat(64), "a..b"] {
            assert!(made_up_name(tag, &id).is_ok(), "{tag}");
        }
    }

    #[test]
    fn uuids_have_version_and_variant() {
        let uuid = uuid4([0xff; 16]);
        assert_eq!(uuid, "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
