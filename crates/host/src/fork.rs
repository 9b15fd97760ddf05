//! `fork`: clones of a template, each with an identity of its own before it runs.
//!
//! One fork is a list of steps. Whatever a step makes is a guard that undoes it: the directory and the name
//! ([`NewFork`]), the control groups ([`ForkCgroups`]), the machine ([`engine::PausedVm`], [`engine::SealedVm`], and
//! [`Running`] below). They are released in reverse order, and kept only when every ack is there.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr},
    num::NonZero,
    os::fd::BorrowedFd,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use engine::{Confinement, DeliverError, Engine, EngineError, PausedVm, ProcessRef, RestoreSpec, RunningVm};
use identity::{AckKey, ForkId, ForkName, MailboxName, NameError, Network as Section};
use memory::Mailbox;
use net::{Egress, LinkError, MAX_DNS, Network, Pool, UserLink};
use store::{Manifest, Template};
use thiserror::Error;

use crate::{
    acks::AckWaitError,
    confine, fault,
    handoff::{
        Arrival, Draft, End, Handoff, Handoffs, IdentityHandoff, MailboxesHandoff, Post,
        network::{NetworkError, TapHandoff, UserHandoff, tap_section},
    },
    home::Home,
    limits::{ForkCgroups, LimitError},
    network::{self, Mode, NetworkRequest},
    pages, pool,
    record::{ForkRecord, NewFork, StepTime},
    request::{Addressed, ForkRequest, RequestError},
    snapshot::Snapshot,
    source::SourceError,
};

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
    /// Its network is not as it was asked for.
    #[error(transparent)]
    Network(#[from] NetworkError),
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
    /// The fork that was to be forked could not be captured. Unless it says so, it runs on.
    #[error(transparent)]
    Source(Box<SourceError>),
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
    fork_each(home, engine, template, std::slice::from_ref(request)).map_err(|(_, error)| error)
}

/// Makes the forks of several requests at once: all that the first asks for, then all of the second, and so on.
///
/// # Errors
/// The number of the first request (from 0) with which something is wrong, and what: no work was begun then.
pub fn fork_each(
    home: &Home,
    engine: &dyn Engine,
    template: &Template,
    requests: &[ForkRequest],
) -> Result<Vec<Result<ForkRecord, ForkError>>, (usize, ForkError)> {
    let origin = Origin { template, manifest: template.manifest(), snapshot: None };
    fork_all(home, engine, origin, requests)
}

/// What forks are made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) template: &'a Template,
    /// The template's, with the mailboxes of what the forks are made of.
    pub(crate) manifest: &'a Manifest,
    /// A fork that was captured.
    pub(crate) snapshot: Option<&'a Snapshot>,
}

pub(crate) fn fork_all(
    home: &Home,
    engine: &dyn Engine,
    origin: Origin<'_>,
    requests: &[ForkRequest],
) -> Result<Vec<Result<ForkRecord, ForkError>>, (usize, ForkError)> {
    let plan = |(number, request)| Plan::of(home, engine, origin, request).map_err(|error| (number, error));
    let plans: Vec<Plan<'_>> = requests.iter().enumerate().map(plan).collect::<Result<_, _>>()?;
    let each: Vec<(&Plan<'_>, usize)> =
        plans.iter().flat_map(|plan| (0..plan.request.count).map(move |index| (plan, index))).collect();

    // More at once than CPUs, because a start waits for the disk now and then; many more only slow each other down.
    let workers = thread::available_parallelism().map_or(2, NonZero::get).saturating_mul(2).min(each.len());
    let next = AtomicUsize::new(0);
    let mut results: Vec<(usize, Result<ForkRecord, ForkError>)> = thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some((plan, index)) = each.get(number) else { return done };
                done.push((number, plan.fork_one(*index)));
            }
        };
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        #[allow(clippy::expect_used)]
        handles.into_iter().flat_map(|handle| handle.join().expect("a fork's thread does not panic")).collect()
    });
    results.sort_by_key(|(number, _)| *number);
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

impl From<SourceError> for ForkError {
    fn from(error: SourceError) -> Self {
        Self::Source(Box::new(error))
    }
}

fn check_engine(engine: &dyn Engine, template: &Template) -> Result<(), ForkError> {
    if !engine.capabilities().patch_memory {
        return Err(ForkError::NotSupported { engine: engine.info().name });
    }
    check_compatible(engine, template)
}

/// Refuses what can be refused before it is known which mailboxes there are: all but what depends on a caller's mailbox itself. A fork's own
/// mailbox is its template's, as is its size.
pub(crate) fn check_early(
    home: &Home,
    engine: &dyn Engine,
    template: &Template,
    request: &ForkRequest,
) -> Result<(), ForkError> {
    let manifest = template.manifest();
    check_engine(engine, template)?;
    request.check_early(manifest)?;
    let connection = Connection::of(home, manifest, &request.network, request.count)?;
    let identity = IdentityHandoff::new(request, own_mailbox(manifest)?, manifest);
    identity.check_size(connection.largest_section()?)
}

fn own_mailbox(manifest: &Manifest) -> Result<&Mailbox, ForkError> {
    let own = MailboxName::identity();
    manifest.mailboxes.iter().find(|mailbox| mailbox.name == own).ok_or_else(|| no_identity(manifest))
}

fn no_identity(manifest: &Manifest) -> ForkError {
    ForkError::Incompatible { tag: manifest.tag.clone(), reason: "it has no identity mailbox".into() }
}

/// What forks are connected to.
#[derive(Debug)]
enum Connection {
    None,
    User,
    Tap(Network),
}

impl Connection {
    /// For these forks. Everything that can be refused before any work is refused here.
    fn of(home: &Home, manifest: &Manifest, request: &NetworkRequest, count: usize) -> Result<Self, NetworkError> {
        let has_card = manifest.machine.network;
        let mode = match request.mode {
            Some(Mode::None) => Mode::None,
            Some(_) if !has_card => return Err(NetworkError::NoCard(manifest.tag.clone())),
            Some(mode) => mode,
            None if has_card => Mode::default_here(),
            None => Mode::None,
        };
        let policy = &request.policy;
        if count > 1 && !policy.forwards.is_empty() {
            return Err(NetworkError::OnePortManyForks(count));
        }
        match mode {
            Mode::Tap => {
                policy.check().map_err(LinkError::from)?;
                return Ok(Self::Tap(network::open(home)?));
            }
            Mode::User => {
                UserLink::check(policy)?;
                return Ok(Self::User);
            }
            Mode::None => {}
        }
        let asked = [
            ("--egress", policy.egress != Egress::default()),
            ("--net", policy.net.is_some()),
            ("--publish", !policy.forwards.is_empty()),
            ("--rate", policy.rate.is_some()),
            ("--dns", request.dns.is_some()),
        ];
        match asked.into_iter().find(|(_, asked)| *asked) {
            Some((option, _)) => Err(NetworkError::NoMeaning { option, mode }),
            None => Ok(Self::None),
        }
    }

    fn mode(&self) -> Mode {
        match self {
            Self::None => Mode::None,
            Self::User => Mode::User,
            Self::Tap(_) => Mode::Tap,
        }
    }

    fn tap(&self) -> Option<&Network> {
        if let Self::Tap(network) = self { Some(network) } else { None }
    }

    /// A network section as long as any that these forks may be given.
    fn largest_section(&self) -> Result<Option<Section>, ForkError> {
        if self.mode() == Mode::None {
            return Ok(None);
        }
        let host: IpAddr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into();
        Ok(Some(tap_section(&Pool::default().largest(), &[host; MAX_DNS])?))
    }
}

struct Plan<'a> {
    home: &'a Home,
    engine: &'a dyn Engine,
    origin: Origin<'a>,
    request: &'a ForkRequest,
    identity: &'a Mailbox,
    letters: Vec<Addressed<'a>>,
    connection: Connection,
}

/// A machine that runs and whose acks are still awaited: killed on drop.
pub(crate) struct Running(pub(crate) Option<RunningVm>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(vm) = self.0.take() {
            let _ = vm.destroy();
        }
    }
}

/// A spare machine that no engine value holds, and a spare's link that no handoff holds: ended and removed on drop.
struct Ending<'a> {
    process: Option<ProcessRef>,
    link: Option<(&'a Network, ForkId)>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.kill(KILL_LIMIT);
        }
        if let Some((network, id)) = self.link.take() {
            // What can not be removed stays recorded, and `cleanup` finds it.
            let _ = network.remove(&id);
        }
    }
}

/// Notes what each step took.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    start: Instant,
    last: Instant,
    pub(crate) steps: Vec<StepTime>,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, steps: Vec::new() }
    }

    pub(crate) fn step(&mut self, step: &str) {
        let now = Instant::now();
        self.steps.push(StepTime { step: step.into(), outcome: String::new(), micros: micros(now - self.last) });
        self.last = now;
    }
}

impl<'a> Plan<'a> {
    /// Everything that can be refused before any work is refused here.
    fn of(
        home: &'a Home,
        engine: &'a dyn Engine,
        origin: Origin<'a>,
        request: &'a ForkRequest,
    ) -> Result<Self, ForkError> {
        let manifest = origin.manifest;
        check_engine(engine, origin.template)?;
        let letters = request.check(manifest)?;
        let identity = own_mailbox(manifest)?;
        let connection = Connection::of(home, manifest, &request.network, request.count)?;
        let plan = Self { home, engine, origin, request, identity, letters, connection };
        plan.identity_handoff().check_size(plan.connection.largest_section()?)?;
        Ok(plan)
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
        let link = self.connection.tap().filter(|_| spare.is_some()).map(|network| (network, id.clone()));
        let mut spare = Ending { process: spare, link };
        fault::point("fork.directory", None).map_err(state("making the fork's directory"))?;
        let name = self.take_name(&mut new, index, &id)?;
        fault::point("fork.name", None).map_err(state("taking the fork's name"))?;
        let cgroups = ForkCgroups::make(&id, &self.request.limits)?;
        fault::point("fork.limits", None).map_err(state("making the fork's limits"))?;
        watch.step("reserve");

        let mut draft = Draft { id, name, spare: spare.process.is_some(), network: None };
        let mut handoffs = self.handoffs();
        handoffs.prepare(&mut draft)?;
        spare.link = None;
        watch.step("prepare");

        let manifest = self.origin.manifest;
        let procs = cgroups.procs();
        let paused = self.machine(&new, &draft, &mut spare, &mut handoffs, &procs, &mut watch)?;
        let process = paused.process().clone();
        new.note_process(&process).map_err(state("noting the fork's process"))?;
        fault::point("fork.loaded", Some(&process)).map_err(state("loading the template"))?;

        let mut post = Post::new(AckKey::new(random()?));
        handoffs.letters(&draft, &mut post)?;
        let (identity, others, waiter) = post.close(&draft.id).ok_or_else(|| self.no_identity())?;
        let sealed = paused.deliver(identity, others)?;
        watch.step("deliver");
        fault::point("fork.delivered", Some(&process)).map_err(state("delivering the identity"))?;

        let mut running = Running(Some(sealed.resume()?));
        fault::point("fork.resumed", Some(&process)).map_err(state("resuming"))?;
        watch.step("resume");
        let Some(vm) = &running.0 else { return Err(self.no_identity()) };
        let mut arrival = Arrival { waiter, stream: &vm.ack_stream, dir: new.dir(), id: &draft.id, connected: None };
        arrival.waiter.start();
        handoffs.after_resume(&mut arrival)?;
        watch.step("acknowledge");
        let identity = arrival.waiter.received(&MailboxName::identity()).map(|received| received.at);
        let acked = identity.max(arrival.connected).unwrap_or(watch.last);
        fault::point("fork.acked", Some(&process)).map_err(state("the ack"))?;

        let mut record = ForkRecord {
            format: ForkRecord::FORMAT,
            hostname: draft.name.clone(),
            id: draft.id,
            name: draft.name,
            source: self.origin.snapshot.map(|snapshot| snapshot.manifest().fork.clone()),
            standby: None,
            template: manifest.tag.clone(),
            template_id: manifest.id.clone(),
            engine: self.engine.info().clone(),
            process,
            created_ms: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            machine_id: String::new(),
            boot_id: String::new(),
            labels: self.request.labels.clone(),
            env: self.request.env.keys().map(ToString::to_string).collect(),
            secrets: self.request.secrets.keys().map(ToString::to_string).collect(),
            files: self.request.files.keys().cloned().collect(),
            mailboxes: Vec::new(),
            network: None,
            origin: self.request.origin.clone(),
            devtools_port: manifest.devtools_port,
            limits: self.limits_asked(),
            cgroups: Vec::new(),
            acked_micros: micros(acked - watch.start),
            host_steps: watch.steps,
            guest_steps: Vec::new(),
        };
        if self.origin.snapshot.is_none() {
            pages::note(self.home, self.engine, self.origin.template, self.connection.mode(), &record.process);
        }
        drop(procs);
        // Nothing may fail between keeping the parts and publishing the record that names them.
        record.cgroups = cgroups.keep();
        handoffs.keep(&mut record);
        let published = new.publish(self.home, &record);
        if let Err(source) = published {
            drop(running);
            drop(handoffs);
            let _ = crate::limits::remove(&record.cgroups, &record.id);
            return Err(ForkError::State { step: "writing the fork's record", source });
        }
        handoffs.release();
        // The machine lives on; only our handle of it goes.
        drop(running.0.take());
        Ok(record)
    }

    /// What every fork is given over, in the order in which it is prepared and awaited.
    fn handoffs(&self) -> Handoffs<'_> {
        let mut list: Vec<Box<dyn Handoff<'_> + '_>> = Vec::new();
        let request = &self.request.network;
        match &self.connection {
            Connection::None => {}
            Connection::User => list.push(Box::new(UserHandoff::new(request))),
            Connection::Tap(network) => list.push(Box::new(TapHandoff::new(network, request))),
        }
        list.push(Box::new(self.identity_handoff()));
        list.push(Box::new(MailboxesHandoff::new(&self.letters)));
        Handoffs::new(list)
    }

    fn identity_handoff(&self) -> IdentityHandoff<'_> {
        IdentityHandoff::new(self.request, self.identity, self.origin.manifest)
    }

    /// A machine that has loaded the template: the spare, or one of its own.
    fn machine(
        &self,
        new: &NewFork,
        draft: &Draft,
        spare: &mut Ending<'_>,
        handoffs: &mut Handoffs<'_>,
        procs: &[BorrowedFd<'_>],
        watch: &mut Stopwatch,
    ) -> Result<PausedVm, ForkError> {
        let manifest = self.origin.manifest;
        let Origin { template, snapshot, .. } = self.origin;
        // What a fork of the template needs first is not what a fork of a fork does.
        let mode = self.connection.mode();
        let pages = if snapshot.is_none() { pages::file(self.home, template, mode) } else { None };
        let delta = snapshot.map(Snapshot::delta);
        let spec = RestoreSpec {
            dir: new.dir(),
            machine: manifest.machine,
            root_image: &template.root_image(),
            memory_file: &template.memory_file(),
            state_file: &snapshot.map_or_else(|| template.state_file(), Snapshot::state),
            delta: delta.as_deref().map(|delta| (delta, manifest.id.as_str())),
            pages_file: pages.as_deref(),
            network: None,
            confinement: Confinement { cgroups: procs, ..confine::of_fork(&draft.id, &manifest.id) },
        };
        if let Some(process) = &spare.process {
            if draft.spare
                && let Ok(paused) = self.engine.adopt(&spec, process)
            {
                spare.process = None;
                watch.step("take over a spare");
                return Ok(paused);
            }
            drop(std::mem::replace(spare, Ending { process: None, link: None }));
            let clear = |source| ForkError::State { step: "removing a spare that can not be used", source };
            new.clear().map_err(clear)?;
        }
        let end = handoffs.end()?;
        let spec = RestoreSpec { network: end.as_ref().map(End::as_network_end), ..spec };
        let paused = self.engine.restore(&spec)?;
        watch.step("start and load");
        Ok(paused)
    }

    fn no_identity(&self) -> ForkError {
        no_identity(self.origin.manifest)
    }

    /// A machine from the template's pool. Limits of the host are taken on when a machine starts, so a fork that is to have
    /// some starts its own.
    fn spare(&self) -> Option<(NewFork, ProcessRef)> {
        let limits = &self.request.limits;
        if limits.memory.is_some() || limits.cpu_millis.is_some() || self.origin.snapshot.is_some() {
            return None;
        }
        pool::take(self.home, self.origin.manifest, self.connection.mode())
    }

    fn take_name(&self, new: &mut NewFork, index: usize, id: &ForkId) -> Result<ForkName, ForkError> {
        let name = match self.request.name_of(index) {
            Some(name) => name,
            None => made_up_name(self.origin.manifest.tag.as_str(), id)?,
        };
        match new.take_name(self.home, &name) {
            Ok(true) => Ok(name),
            Ok(false) => Err(ForkError::NameTaken(name)),
            Err(source) => Err(ForkError::State { step: "taking the fork's name", source }),
        }
    }

    fn limits_asked(&self) -> BTreeMap<String, u64> {
        let limits = &self.request.limits;
        [("memory", limits.memory), ("cpu_millis", limits.cpu_millis), ("pids", limits.pids)]
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect()
    }
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

pub(crate) fn random<const N: usize>() -> Result<[u8; N], ForkError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(ForkError::Random)?;
    Ok(bytes)
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use engine::{Accel, BootSpec, BootedVm, Capabilities, EngineInfo, EngineName, HeldVm, HoldSpec, Machine, SpareVm};
    use store::{Contents, Store};

    use super::*;

    /// One that loads a template and can not write into its memory. Nothing else of it may be asked for.
    #[derive(Debug)]
    struct WithoutMailboxes(EngineInfo);

    impl Engine for WithoutMailboxes {
        fn info(&self) -> &EngineInfo {
            &self.0
        }

        fn capabilities(&self) -> Capabilities {
            Capabilities { patch_memory: false, copy_on_write: true, read_only_template: true, rehearse: false }
        }

        fn boot(&self, _: &BootSpec<'_>) -> Result<Box<dyn BootedVm>, EngineError> {
            panic!("work was begun")
        }

        fn restore(&self, _: &RestoreSpec<'_>) -> Result<PausedVm, EngineError> {
            panic!("work was begun")
        }

        fn prepare(&self, _: &RestoreSpec<'_>) -> Result<SpareVm, EngineError> {
            panic!("work was begun")
        }

        fn adopt(&self, _: &RestoreSpec<'_>, _: &ProcessRef) -> Result<PausedVm, EngineError> {
            panic!("work was begun")
        }

        fn hold(&self, _: &HoldSpec<'_>, _: &ProcessRef) -> Result<HeldVm, EngineError> {
            panic!("work was begun")
        }
    }

    #[test]
    fn i6_an_engine_that_can_not_write_mailboxes_is_refused_before_any_work() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path()).make().unwrap();
        let store = Store::open(&home.data).unwrap();
        let tag = identity::Tag::parse("t").unwrap();
        let building = store.begin(&tag).unwrap();
        for path in [building.memory_file(), building.state_file(), building.root_image()] {
            std::fs::write(path, [0; 4096]).unwrap();
        }
        let info = EngineInfo { name: EngineName::Qemu, version: "1".into(), accel: Accel::Tcg };
        let contents = Contents {
            engine: info.clone(),
            machine: Machine { memory_bytes: 4096, vcpus: 1, network: false },
            kernel: String::new(),
            recipe: String::new(),
            mailboxes: Vec::new(),
            ambiguous: Vec::new(),
            probes: BTreeMap::new(),
            allow_env: std::collections::BTreeSet::new(),
            facts: BTreeMap::new(),
            warnings: Vec::new(),
            findings: Vec::new(),
            findings_left_out: 0,
            frozen_monotonic_ns: 0,
            frozen_wall_ns: 0,
            rehearses: false,
            build_millis: 0,
            ack_limit_ms: 60_000,
            devtools_port: None,
            group: None,
            memory_writable: false,
        };
        building.commit(contents).unwrap();
        let template = store.get(&tag).unwrap();
        let request = ForkRequest { count: 2, ..ForkRequest::default() };
        let error = fork(&home, &WithoutMailboxes(info), &template, &request).unwrap_err();
        assert!(matches!(error, ForkError::NotSupported { engine: EngineName::Qemu }), "{error}");
        assert_eq!(std::fs::read_dir(home.forks()).unwrap().count(), 0);
    }

    #[test]
    fn made_up_names_are_valid_for_every_tag() {
        let id = ForkId::parse("0123456789abcdef0123").unwrap();
        for tag in ["python-3.11", "_", "___x", "A", &"Z".repeat(64), "a..b"] {
            assert!(made_up_name(tag, &id).is_ok(), "{tag}");
        }
    }
}
