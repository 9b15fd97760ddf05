//! A fork that is captured while it runs: quiesced, stopped, captured; and then it goes on as who it is, or ends.
//!
//! ```text
//! quiesce ─► "armed" ─► stop ─► capture ─► (standby: end)
//!    │          │         │        └─────► Continue document ─► go on ─► ack
//!    └──────────┴─────────┴── any failure: [`bring_back`], the same that the next command does if this process dies
//! ```

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use engine::{Accel, AckStream, CaptureFiles, DeliverError, Engine, EngineError, HeldVm, HoldSpec, Letter};
use identity::{
    AckKey, Action, ClockNanos, Document, ForkIdentity, Limits, MailboxName, Secret, SecretName,
    document::{ENTROPY_LEN, format_for},
    mailbox::{Header, Nonce, PAGE_SIZE, State},
    seal,
};
use memory::{ExpectedMailbox, Finder, Mailbox, PlantedBy, ScanError};
use store::{Manifest, Store, StoreError, Template};
use thiserror::Error;

use crate::{
    acks::{AckWaitError, Waiter},
    build, engines, fault,
    fork::{Stopwatch, random},
    guest::{GuestChannel, GuestError},
    handoff::ack_limit,
    home::Home,
    operation::{Journal, Kind, Operation},
    record::{self, ForkRecord, StepTime},
    snapshot::{Draft, Found, SnapshotError},
};

/// Time for the agent to answer at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// Time for the agent to freeze the workload and arm its mailboxes.
const QUIESCE_LIMIT: Duration = Duration::from_secs(60);

/// Why a fork was not captured, or did not go on. Unless it says so, the fork runs on as before.
#[derive(Debug, Error)]
pub enum SourceError {
    /// Somebody else is at it.
    #[error("fork {name} is being put into standby, resumed or forked by another command; wait until it is done")]
    Busy {
        /// Its name.
        name: String,
    },
    /// Its machine has ended.
    #[error("fork {name} is dead: its machine has ended; remove it with `offshoot kill {name}`")]
    Dead {
        /// Its name.
        name: String,
    },
    /// Its template is not there any more.
    #[error(
        "the template of fork {name} ({tag}) was removed or built anew, and what the fork has not changed is only there; the fork can not be captured or restored"
    )]
    TemplateGone {
        /// Its name.
        name: String,
        /// The tag.
        tag: String,
    },
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The machine.
    #[error("the fork's machine failed")]
    Engine(#[from] EngineError),
    /// Its memory.
    #[error(transparent)]
    Deliver(#[from] DeliverError),
    /// The agent did not do its part.
    #[error("the agent of the fork failed while {during}")]
    Guest {
        /// What was going on.
        during: &'static str,
        /// The cause.
        #[source]
        source: GuestError,
    },
    /// The agent did not come to rest.
    #[error("the agent of the fork did not come to rest after the freeze")]
    NotArmed,
    /// Its agent is older than that.
    #[error("the fork has secrets, and its agent can not seal them before a capture; build the template again")]
    SecretsOpen,
    /// The mailboxes in memory are not as they must be.
    #[error("the fork's mailboxes can not be used")]
    Scan(#[from] ScanError),
    /// What is on disk.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It went on, and did not say so.
    #[error("the fork did not go on: {0}")]
    Ack(#[from] AckWaitError),
    /// No random bytes, or another thing that a fork's beginning fails of.
    #[error("{step} failed: {reason}")]
    Begin {
        /// The step.
        step: &'static str,
        /// Why.
        reason: String,
    },
    /// A directory could not be read or written.
    #[error("{step} failed")]
    State {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn state(step: &'static str) -> impl Fn(io::Error) -> SourceError {
    move |source| SourceError::State { step, source }
}

/// The template that a fork was made of, if it still is that one, and its engine.
pub(crate) fn base(store: &Store, record: &ForkRecord) -> Result<(Template, Box<dyn Engine>), SourceError> {
    let gone = || SourceError::TemplateGone { name: record.name.to_string(), tag: record.template.to_string() };
    let template = match store.get(&record.template) {
        Ok(template) if template.manifest().id == record.template_id => template,
        Ok(_) | Err(StoreError::NotFound { .. }) => return Err(gone()),
        Err(error) => return Err(error.into()),
    };
    let engine = engines::for_template(template.manifest())?;
    Ok((template, engine))
}

/// A fork, its template, and the right to do something to it.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    pub(crate) record: &'a ForkRecord,
    pub(crate) template: &'a Template,
    pub(crate) engine: &'a dyn Engine,
    pub(crate) operation: &'a Operation,
}

impl<'a> Source<'a> {
    fn dir(&self) -> &Path {
        self.operation.dir()
    }

    fn hold(&self) -> Result<HeldVm, SourceError> {
        let spec = HoldSpec {
            dir: self.dir(),
            machine: self.template.manifest().machine,
            memory_file: &self.template.memory_file(),
        };
        Ok(self.engine.hold(&spec, &self.record.process)?)
    }

    /// Freezes the workload, stops the machine and captures it into `draft`. The machine stands still then, until the answer [goes
    /// on](Captured::go_on) or is [dropped](Captured), or it is ended.
    pub(crate) fn capture(&self, draft: &Draft) -> Result<Captured<'_, 'a>, SourceError> {
        let begun = Instant::now();
        let ack_key = AckKey::new(random::<32>().map_err(begin("drawing a key"))?);
        let held = self.hold()?;
        let unseal = Secret::new(random::<32>().map_err(begin("drawing a key"))?.to_vec());
        let mut journal = Journal { kind: Kind::Capture, ack_key, unseal: Some(unseal), nonce: None };
        self.operation.note(&journal).map_err(state("noting what is begun"))?;
        let waking = Waking { source: self, awake: false };
        // Dropped before it: the machine has one monitor.
        let held = held;
        fault::point("capture.noted", Some(&self.record.process)).map_err(state("noting what is begun"))?;
        let mut watch = Stopwatch::start();
        let (expected, frozen_at) = self.quiesce(&held, &mut journal, &mut watch)?;
        fault::point("capture.quiesced", Some(&self.record.process)).map_err(state("quiescing"))?;
        let mut stopped = held.stop()?;
        let stopped_at = Instant::now();
        watch.step("stop");
        fault::point("capture.paused", Some(&self.record.process)).map_err(state("pausing"))?;

        let mut finder = Finder::default();
        let mut scanned = Ok(());
        let known = &self.template.manifest().mailboxes;
        let mut untouched: BTreeSet<u64> = known.iter().flat_map(|mailbox| &mailbox.pages).copied().collect();
        let files =
            CaptureFiles { delta: &draft.delta(), state: &draft.state(), template_id: &self.template.manifest().id };
        let size = stopped.capture(files, |offset, page| {
            untouched.remove(&offset);
            if scanned.is_ok() {
                scanned = finder.take(offset, page);
            }
        })?;
        scanned?;
        // Mailboxes that nobody has written to since the template was captured are where they were.
        let memory = File::open(self.template.memory_file()).map_err(state("reading the template's memory"))?;
        for offset in untouched {
            let mut page = [0; PAGE_SIZE];
            memory.read_exact_at(&mut page, offset).map_err(state("reading the template's memory"))?;
            finder.take(offset, &page)?;
        }
        let scan = finder.finish(&expected)?;
        fault::point("capture.captured", Some(&self.record.process)).map_err(state("the capture"))?;
        watch.step("capture");
        let found = Found { mailboxes: scan.mailboxes, ambiguous: scan.ambiguous, size };
        Ok(Captured { found, journal, begun, frozen_at, stopped_at, watch, stopped: Some(stopped), waking })
    }

    fn quiesce(
        &self,
        held: &HeldVm,
        journal: &mut Journal,
        watch: &mut Stopwatch,
    ) -> Result<(Vec<ExpectedMailbox>, Duration), SourceError> {
        let failed = |during| move |source| SourceError::Guest { during, source };
        drain(held.ack_stream());
        let seal_key = journal.unseal.as_ref().and_then(seal::public);
        let (expected, sealed, frozen, steps) = in_guest(async {
            let mut channel = GuestChannel::connect(self.dir(), CONNECT_LIMIT).await?;
            let reply = channel.quiesce(seal_key, QUIESCE_LIMIT).await?;
            let expected = reply.mailboxes.iter().map(build::expected).collect::<Result<Vec<_>, _>>()?;
            Ok((expected, reply.sealed, Duration::from_nanos(reply.frozen_wall_ns), reply.steps))
        })
        .map_err(failed("freezing"))?;
        watch.step("quiesce");
        // Of this: what the guest did in it.
        watch.steps.extend(steps.into_iter().map(|step| StepTime {
            step: format!("guest:{}", crate::guest::clean(&step.name)),
            outcome: String::new(),
            micros: step.micros,
        }));
        journal.nonce = own_nonce(&expected);
        // Before it can be paused: who finds it paused has to know what to look for.
        self.operation.note(journal).map_err(state("noting what is begun"))?;
        if usize::try_from(sealed).is_ok_and(|sealed| sealed < self.record.secrets.len()) {
            return Err(SourceError::SecretsOpen);
        }
        if !build::wait_armed(held.ack_stream()) {
            return Err(SourceError::NotArmed);
        }
        watch.step("come to rest");
        Ok((expected, frozen))
    }

    /// Lets a fork that somebody left frozen, stopped or in between go on as who it is. Nothing happens to one that runs.
    fn bring_back(&self, journal: &Journal) -> Result<(), SourceError> {
        let mut held = self.hold()?;
        let mut nonce = journal.nonce;
        if nonce.is_none() && !held.is_stopped()? {
            nonce = self.ask_for_nonce(journal)?;
        }
        // Without one it was never quiesced, and so never stopped by us.
        let Some(nonce) = nonce else { return Ok(()) };
        drain(held.ack_stream());
        let mut stopped = held.stop()?;
        let mut finder = Finder::default();
        let mut scanned = Ok(());
        let mut filled = false;
        stopped.scan(|offset, page| {
            if let Ok(header) = Header::parse(page)
                && header.nonce == nonce
                && header.name == MailboxName::identity()
            {
                filled |= header.state == State::Filled;
                if scanned.is_ok() {
                    scanned = finder.take(offset, page);
                }
            }
        })?;
        scanned?;
        let own = ExpectedMailbox { name: MailboxName::identity(), nonce, planted_by: PlantedBy::Agent };
        let mailbox = finder.finish(&[own]).ok().and_then(|scan| scan.mailboxes.into_iter().next());
        let (held, told) = match mailbox {
            Some(mailbox) if !filled => {
                let letter = letter_of(&mailbox, &continue_document(self.record, journal)?, journal);
                (stopped.deliver(&letter)?.go_on()?, true)
            }
            // Told already, or taken already: then it has gone on, or is about to.
            _ => (stopped.was_told().go_on()?, filled),
        };
        if told { self.wait_ack(&held, journal) } else { Ok(()) }
    }

    /// The nonce of a guest that runs and is quiesced; `None` if it is not.
    fn ask_for_nonce(&self, journal: &Journal) -> Result<Option<Nonce>, SourceError> {
        let seal_key = journal.unseal.as_ref().and_then(seal::public);
        let asked = in_guest(async {
            let deadline = Instant::now() + QUIESCE_LIMIT;
            loop {
                let mut channel = GuestChannel::connect(self.dir(), CONNECT_LIMIT).await?;
                let phase = channel.ping().await?.state;
                if phase == "running" {
                    return Ok(None);
                }
                // Asked again, it answers as it did, once it is done.
                if phase == "quiesced"
                    && let Ok(reply) = channel.quiesce(seal_key, QUIESCE_LIMIT).await
                {
                    let expected: Vec<_> = reply.mailboxes.iter().map(build::expected).collect::<Result<_, _>>()?;
                    return Ok(own_nonce(&expected));
                }
                if Instant::now() >= deadline {
                    return Err(GuestError::Refused(format!("it is {}", crate::guest::clean(&phase))));
                }
            }
        });
        asked.map_err(|source| SourceError::Guest { during: "being asked how it is", source })
    }

    fn wait_ack(&self, held: &HeldVm, journal: &Journal) -> Result<(), SourceError> {
        let mut waiter = continue_waiter(self.record, self.template.manifest(), &journal.ack_key);
        waiter.start();
        waiter.wait_for(&MailboxName::identity(), held.ack_stream())?;
        Ok(())
    }
}

pub(crate) fn begin(step: &'static str) -> impl Fn(crate::fork::ForkError) -> SourceError {
    move |error| SourceError::Begin { step, reason: error.to_string() }
}

fn own_nonce(expected: &[ExpectedMailbox]) -> Option<Nonce> {
    expected.iter().find(|mailbox| mailbox.name == MailboxName::identity()).map(|mailbox| mailbox.nonce)
}

/// What tells a fork to go on as who it is.
pub(crate) fn continue_document(record: &ForkRecord, journal: &Journal) -> Result<Document, SourceError> {
    let entropy = random::<ENTROPY_LEN>().map_err(begin("drawing entropy"))?;
    let name = || SecretName::parse(seal::UNSEAL).ok();
    let unseal = journal.unseal.as_ref().and_then(|key| Some((name()?, key.clone())));
    Ok(Document {
        format: format_for(None),
        action: Action::Continue,
        fork: ForkIdentity {
            id: record.id.clone(),
            name: record.name.clone(),
            hostname: record.hostname.clone(),
            template: record.template.clone(),
            machine_id: record.machine_id.clone(),
            boot_id: record.boot_id.clone(),
        },
        labels: Default::default(),
        env: Default::default(),
        secrets: unseal.into_iter().collect(),
        files: Vec::new(),
        wall_clock: nanos(now()),
        entropy: Secret::new(entropy.to_vec()),
        ack_key: journal.ack_key.clone(),
        limits: Limits::default(),
        network: None,
    })
}

pub(crate) fn letter_of<'m>(mailbox: &'m Mailbox, document: &Document, journal: &Journal) -> Letter<'m> {
    Letter { mailbox, payload: document.to_bytes(), ack_key: journal.ack_key.for_mailbox(&mailbox.name) }
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn nanos(since_epoch: Duration) -> ClockNanos {
    ClockNanos(u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX))
}

/// Waits for the ack of a fork of `template` that goes on.
pub(crate) fn continue_waiter(record: &ForkRecord, template: &Manifest, ack_key: &AckKey) -> Waiter {
    let own = MailboxName::identity();
    let mut waiter = Waiter::new(record.id.clone(), [(own.clone(), ack_key.for_mailbox(&own))].into());
    waiter.want(own, ack_limit(template));
    waiter
}

/// Takes what was left on an ack port: answers that came late, to whoever asked then.
fn drain(stream: &AckStream) {
    let mut buffer = [0; 4096];
    while matches!(stream.read(&mut buffer, Duration::ZERO), Ok(count) if count > 0) {}
}

/// Runs what talks to a guest, on a thread that has no runtime.
fn in_guest<T>(future: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future)
}

/// A source that was begun with. Dropped, it is brought back.
#[derive(Debug)]
struct Waking<'s, 'a> {
    source: &'s Source<'a>,
    awake: bool,
}

impl Drop for Waking<'_, '_> {
    fn drop(&mut self) {
        if self.awake {
            return;
        }
        let Source { record, operation, .. } = self.source;
        // What is noted stays noted if this fails: the next command tries again.
        if let Ok(Some(journal)) = operation.journal()
            && (!record.process.is_alive() || self.source.bring_back(&journal).is_ok())
        {
            let _ = operation.settle();
        }
    }
}

/// How long a source was held up.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) asked: Duration,
    pub(crate) frozen: Duration,
    pub(crate) stopped: Duration,
    pub(crate) steps: Vec<StepTime>,
}

/// A captured fork that stands still. Dropped, it goes on as who it is.
#[derive(Debug)]
pub(crate) struct Captured<'s, 'a> {
    pub(crate) found: Found,
    pub(crate) journal: Journal,
    begun: Instant,
    /// The guest's wall clock when its workload was frozen.
    frozen_at: Duration,
    stopped_at: Instant,
    watch: Stopwatch,
    // In this order: the connection to the machine is given up before another is made.
    stopped: Option<engine::StoppedVm>,
    waking: Waking<'s, 'a>,
}

impl Captured<'_, '_> {
    /// Lets it go on as who it is, and waits until it says so.
    pub(crate) fn go_on(mut self) -> Result<Held, SourceError> {
        let source = self.waking.source;
        let own = MailboxName::identity();
        let mailbox = self.found.mailboxes.iter().find(|mailbox| mailbox.name == own);
        let (Some(mailbox), Some(stopped)) = (mailbox, self.stopped.take()) else { return Err(SourceError::NotArmed) };
        let mut document = continue_document(source.record, &self.journal)?;
        if source.engine.info().accel == Accel::Kvm {
            // The guest adds what has passed on its own clock since it was stopped, and a processor's counter goes on meanwhile.
            document.wall_clock = nanos(now().saturating_sub(self.stopped_at.elapsed()));
        }
        let letter = letter_of(mailbox, &document, &self.journal);
        let sealed = stopped.deliver(&letter)?;
        fault::point("capture.told", Some(&source.record.process)).map_err(state("telling the fork to go on"))?;
        let held = sealed.go_on()?;
        let stopped = self.stopped_at.elapsed();
        fault::point("capture.resumed", Some(&source.record.process)).map_err(state("letting the fork go on"))?;
        self.watch.step("tell");
        source.wait_ack(&held, &self.journal)?;
        self.watch.step("thaw");
        self.waking.awake = true;
        // By the guest's own clock, as far as that can be: it was the host's when the fork was made.
        let asked = self.begun.elapsed();
        let frozen = now().saturating_sub(self.frozen_at).clamp(stopped, asked.max(stopped));
        source.operation.settle().map_err(state("noting that the fork goes on"))?;
        Ok(Held { asked, frozen, stopped, steps: self.watch.steps })
    }

    /// How long it has not run by now.
    pub(crate) fn since(&self) -> Duration {
        self.begun.elapsed()
    }

    /// It never goes on: it is in standby.
    pub(crate) fn never_mind(mut self) {
        self.waking.awake = true;
    }
}

/// Brings a fork that runs back from what somebody began with it and did not end.
pub(crate) fn recover(store: &Store, operation: &Operation, record: &ForkRecord) -> Result<(), SourceError> {
    let Some(journal) = operation.journal().map_err(state("reading what was begun"))? else { return Ok(()) };
    if record.is_alive() {
        let (template, engine) = base(store, record)?;
        let source = Source { record, template: &template, engine: engine.as_ref(), operation };
        source.bring_back(&journal)?;
    }
    operation.settle().map_err(state("noting that the fork goes on"))
}

/// The record as it is now that the fork's operation is ours.
pub(crate) fn record_of(home: &Home, record: &ForkRecord) -> Result<ForkRecord, SourceError> {
    record::read(&crate::forks::dir(home, record)).map_err(state("reading the fork's record"))
}
