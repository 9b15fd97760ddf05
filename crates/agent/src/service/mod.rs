//! Services and the warmed runtime.
//!
//! ```text
//! Supervisor ─┬─ Unit (one service) ── thread: output → Logs, exit → restart
//!             ├─ Runtime ──────────── thread: stderr → Logs, exit → restart
//!             │     └─ Conversation: whoever asks (an evaluation, the keeper) writes, and reads the answer
//!             └─ Gate: closed from prepare_quiesce until the fork knows who it is
//! ```
//!
//! Every thread blocks; nothing polls, and nothing ticks while all is well.
#![forbid(unsafe_code)]

mod answer;
mod conversation;
mod gate;
mod in_place;
mod log;
mod pump;
mod readiness;
mod runtime;
mod spec;
#[cfg(test)]
mod tests;
mod unit;
mod world;

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use guest_api::proto::{EvalError, EvalReply, WarmRequest};
use identity::{ForkId, Step};
use thiserror::Error;

use self::{
    answer::Answer,
    conversation::NoAnswer,
    gate::Gate,
    runtime::{NoTurn, Report, Runtime, eval_request, identity_request, quiesce_request},
    spec::Restart,
    unit::Unit,
    world::World,
};
pub(crate) use self::{answer::push_object, spec::OnFork};
pub use self::{
    log::{Follower, Logs},
    spec::SpecError,
};
use crate::{
    payload::Payload,
    state::{AgentState, Identity},
    workload::{Among, Process},
};

/// Deadline of an evaluation that names none.
const DEFAULT_EVAL_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a runtime, or a service, that ends while it warms up is tried, if the recipe wants it restarted.
const WARM_ATTEMPTS: u32 = 3;

/// Keeps the recipe's services and the runtime.
#[derive(Debug)]
pub struct Supervisor {
    world: Arc<dyn World>,
    logs: Arc<Logs>,
    gate: Arc<Gate>,
    kept: Mutex<Kept>,
    /// The fork whose services know its payload. Locked while they are told.
    told: Mutex<Option<ForkId>>,
}

/// What services are told after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// The thaw.
    Thawed,
    /// The payload that was waited for.
    Completed,
}

#[derive(Debug, Default)]
struct Kept {
    warmed: bool,
    units: Vec<Arc<Unit>>,
    runtime: Option<Arc<Runtime>>,
}

/// Why warming up failed. The text has the last output of what failed.
#[derive(Debug, Error)]
pub enum WarmError {
    /// It can be done once.
    #[error("the template was warmed before; build a new one")]
    Again,
    /// The request is not valid.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A service or the runtime did not come up.
    #[error("{0}")]
    Start(String),
}

/// Why a payload was not applied.
#[derive(Debug, Error)]
pub enum CompleteError {
    /// The sandbox was being captured, or took on its identity, until the deadline.
    #[error("the sandbox was being captured, or took on its identity, until the deadline")]
    Late,
    /// It is not the fork that the payload was given to.
    #[error("this is another fork by now; the payload was for the one that it was made from")]
    OtherFork,
    /// It has another payload.
    #[error("the identity is complete, with another payload")]
    OtherPayload,
    /// The identity directory.
    #[error("the payload could not be written: {0}")]
    Write(#[from] io::Error),
    /// The runtime or a service did not take it; the text has its last output.
    #[error("{0}")]
    Service(String),
}

/// What [`Supervisor::after_thaw`] did.
#[derive(Debug, Default)]
pub struct AfterThaw {
    /// Each thing done, for the ack.
    pub steps: Vec<Step>,
    /// Set if the fork must not be used: the reason.
    pub failure: Option<String>,
    /// Whether the runtime is still to be told, by [`Supervisor::after_ack`].
    pub announce: bool,
}

impl Supervisor {
    /// A supervisor with nothing to keep yet. It is made once, at boot; `AgentState::supervisor` gives it to everyone.
    #[must_use]
    pub fn new(state: &Arc<AgentState>) -> Self {
        Self::over(Arc::new(Arc::downgrade(state)))
    }

    fn over(world: Arc<dyn World>) -> Self {
        Self { world, logs: Arc::default(), gate: Arc::default(), kept: Mutex::default(), told: Mutex::default() }
    }

    /// What services and the runtime wrote.
    #[must_use]
    pub fn logs(&self) -> &Logs {
        &self.logs
    }

    /// Starts what the recipe says, in its order, and waits until everything is ready. Blocks; `progress` is given
    /// lines for people.
    ///
    /// # Errors
    /// [`WarmError`]. What was started before the failure still runs: the template is of no use and will be ended.
    pub fn warm(&self, request: WarmRequest, mut progress: impl FnMut(String)) -> Result<(), WarmError> {
        let deadline = Instant::now() + spec::timeout(request.timeout_ms, Duration::from_secs(600));
        let services = spec::services(request.services)?;
        let runtime = request.runtime.map(spec::Runtime::parse).transpose()?;
        if std::mem::replace(&mut self.kept().warmed, true) {
            return Err(WarmError::Again);
        }
        self.world.set_recipe_environment(request.env.into_iter().collect());
        for service in services {
            let (world, logs, gate) = self.shared();
            let unit = Unit::new(service, world, logs, gate);
            self.kept().units.push(Arc::clone(&unit));
            if unit.spec.in_template {
                Self::warm_unit(&unit, deadline, &mut progress)?;
            }
        }
        if let Some(spec) = runtime {
            let (world, logs, gate) = self.shared();
            let runtime = Runtime::new(spec, world, logs, gate);
            Self::warm_runtime(&runtime, deadline, &mut progress)?;
            self.kept().runtime = Some(runtime);
        }
        Ok(())
    }

    fn warm_unit(unit: &Unit, deadline: Instant, progress: &mut impl FnMut(String)) -> Result<(), WarmError> {
        let mut attempt = 1;
        loop {
            let begun = Instant::now();
            let ready_by = deadline.min(begun + unit.spec.timeout);
            let started = unit.stop().and_then(|()| unit.start(true, ready_by));
            match started {
                Ok(()) => {
                    progress(format!("service {} ready in {}", unit.spec.name, seconds(begun)));
                    return Ok(());
                }
                // One that is late would be late again.
                Err(error)
                    if unit.spec.restart != Restart::Never && attempt < WARM_ATTEMPTS && Instant::now() < ready_by =>
                {
                    attempt += 1;
                    progress(format!("{error}\nstarting service {} again", unit.spec.name));
                }
                Err(error) => return Err(WarmError::Start(error)),
            }
        }
    }

    fn warm_runtime(
        runtime: &Arc<Runtime>,
        deadline: Instant,
        progress: &mut impl FnMut(String),
    ) -> Result<(), WarmError> {
        let mut attempt = 1;
        loop {
            let begun = Instant::now();
            match runtime.start(deadline.min(begun + runtime.spec.ready_timeout)) {
                Ok(()) => {
                    progress(format!("runtime ready in {}", seconds(begun)));
                    return Ok(());
                }
                Err(error) if runtime.spec.restart == Restart::OnFailure && attempt < WARM_ATTEMPTS => {
                    attempt += 1;
                    progress(format!("{error}\nstarting the runtime again"));
                }
                Err(error) => return Err(WarmError::Start(error)),
            }
        }
    }

    /// Called by `keeper::quiesce` before the freeze (any thread, blocking): gets services and runtime ready for the
    /// capture and answers with what the runtime says it can not reseed. From now on evaluations and restarts wait, until
    /// [`Self::after_thaw`], [`Self::after_continue`] or, if the capture is given up, [`Self::abandon_quiesce`].
    ///
    /// # Errors
    /// The reason why the template can not be captured; nothing waits then.
    pub fn prepare_quiesce(&self, deadline: Instant) -> Result<Vec<String>, String> {
        if !self.gate.close(deadline) {
            return Err("a payload was being applied until the deadline".to_owned());
        }
        let result = self.prepare(deadline);
        if result.is_err() {
            self.gate.open();
        }
        self.logs.mark_frozen();
        result
    }

    fn prepare(&self, deadline: Instant) -> Result<Vec<String>, String> {
        let (units, runtime) = self.parts();
        for unit in &units {
            unit.wait_quiet(deadline)?;
        }
        let Some(runtime) = runtime else { return Ok(Vec::new()) };
        let id = runtime.next_id();
        let report = runtime.event("quiesce", &quiesce_request(id), id, deadline)?;
        let uncovered = report.into_iter().filter(|(name, _)| name == "uncovered");
        Ok(uncovered.map(|(_, what)| what).collect())
    }

    /// What the recipe wants done in forks for each service that runs in the template.
    pub(crate) fn on_fork(&self) -> BTreeMap<String, OnFork> {
        let units = &self.kept().units;
        let warm = units.iter().filter(|unit| unit.spec.in_template);
        warm.map(|unit| (unit.spec.name.clone(), unit.spec.on_fork.clone())).collect()
    }

    /// Called once the workload is frozen: what was written up to now is the template's, and no fork shows it. (Optional:
    /// without it, what services write between `prepare_quiesce` and the freeze stands in each fork's log too.)
    pub fn mark_frozen(&self) {
        self.logs.mark_frozen();
    }

    /// Called if a capture is given up after [`Self::prepare_quiesce`], which may have failed: everything goes on.
    pub fn abandon_quiesce(&self) {
        if let Some(runtime) = self.kept().runtime.clone() {
            runtime.go_on();
        }
        self.gate.open();
    }

    /// The process that has to answer before a fork can, if there is one.
    pub fn first_in_line(&self) -> Option<Arc<Process>> {
        self.parts().1?.process()
    }

    /// Called on the keeper's thread in a fork, right before the thaw: fills the runtime's generators in place, if it said
    /// where they are. The answer says what was done; after a failure the runtime does it itself, and the ack waits.
    pub fn before_thaw(&self) -> Option<&'static str> {
        let runtime = self.kept().runtime.clone()?;
        match runtime.fill_in_place() {
            Ok(true) => Some("filled"),
            Ok(false) => None,
            Err(_) => Some("left-to-the-runtime"),
        }
    }

    /// Called on the keeper's thread in a fork, before the thaw, once all of its identity is there: runs the hooks that are to run beside the
    /// frozen workload, one after the other.
    ///
    /// # Errors
    /// The first that fails, with what it wrote: nothing is to be thawed then.
    pub fn hooks_before_thaw(&self) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        for unit in self.parts().0 {
            if let OnFork::Hook { command, before_thaw: true } = &unit.spec.on_fork {
                let begun = Instant::now();
                unit.run_hook(command, Among::Hooks, begun + unit.spec.timeout)?;
                steps.push(service_step(&unit, "hook-ran-before-thaw".to_owned(), begun));
            }
        }
        Ok(steps)
    }

    /// Completes the identity of `fork` with the payload that it waits for: sets it, then tells the runtime and the services, and starts those
    /// that wait. Blocks, also while the sandbox is being captured or takes on its identity. The steps are for people.
    ///
    /// # Errors
    /// [`CompleteError`]. After [`CompleteError::Service`] the payload is set; the same one may be given again.
    pub fn complete(&self, fork: &ForkId, payload: Payload, deadline: Instant) -> Result<Vec<Step>, CompleteError> {
        let _inside = self.gate.enter(deadline).ok_or(CompleteError::Late)?;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = self.world.identity().filter(|identity| identity.fork.id == *fork);
        let identity = match identity.ok_or(CompleteError::OtherFork)? {
            again if again.payload.as_ref() == Some(&payload) && told.as_ref() == Some(fork) => return Ok(Vec::new()),
            again if again.payload.as_ref() == Some(&payload) => again,
            other if other.payload.is_some() => return Err(CompleteError::OtherPayload),
            _ => self.world.complete(fork, payload)?.ok_or(CompleteError::OtherFork)?,
        };
        let mut after = AfterThaw::default();
        self.tell(&identity, When::Completed, &mut after).map_err(CompleteError::Service)?;
        *told = Some(fork.clone());
        Ok(after.steps)
    }

    /// Called on the keeper's thread right after the thaw (blocking; the fork's ack waits for it): in-process events,
    /// signals, hooks, restarts, start of the services that start in forks. `identity` is also in
    /// `AgentState::identity`; `AgentState::environment` is the fork's already.
    pub fn after_thaw(&self, identity: &Identity) -> AfterThaw {
        self.logs.forget_template();
        self.gate.new_identity();
        let mut after = AfterThaw::default();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.tell(identity, When::Thawed, &mut after);
        // What has come with the fork may be posted too, and nobody is told twice then.
        *told = (result.is_ok() && identity.payload.is_some()).then(|| identity.fork.id.clone());
        drop(told);
        after.failure = result.err();
        if after.failure.is_some() || !after.announce {
            self.gate.open();
        }
        after
    }

    /// Called on the keeper's thread once the ack is out, if [`AfterThaw::announce`] says so: tells the runtime who it is, before
    /// any request can. It is itself by then; if it can not be told, it is ended.
    pub fn after_ack(&self, identity: &Identity) {
        if let Some(runtime) = self.kept().runtime.clone() {
            let id = runtime.next_id();
            let deadline = Instant::now() + runtime.spec.event_timeout;
            if let Err(error) = runtime.announce("identity", &identity_request(id, identity), id, deadline) {
                runtime.end(&error);
            }
        }
        self.gate.open();
    }

    /// Called instead of [`Self::after_thaw`] when a branch's source goes on with the identity it has.
    pub fn after_continue(&self) -> AfterThaw {
        let mut after = AfterThaw::default();
        let result = match self.world.identity() {
            // Its randomness is refreshed all the same: there may be two of it now.
            Some(identity) => self.tell_runtime(&identity, &mut after),
            None => {
                if let Some(runtime) = self.kept().runtime.clone() {
                    runtime.go_on();
                }
                Ok(())
            }
        };
        after.failure = result.err();
        if after.failure.is_some() || !after.announce {
            self.gate.open();
        }
        after
    }

    fn tell(&self, identity: &Identity, when: When, after: &mut AfterThaw) -> Result<(), String> {
        self.tell_runtime(identity, after)?;
        let complete = identity.payload.is_some();
        let (units, _) = self.parts();
        // First those that are warm, in the recipe's order, then those that have waited, in theirs.
        let (warm, waiting): (Vec<_>, Vec<_>) = units.iter().partition(|unit| unit.spec.in_template);
        for unit in warm {
            let begun = Instant::now();
            let deadline = begun + unit.spec.timeout;
            let outcome = match &unit.spec.on_fork {
                OnFork::Keep => continue,
                // Has run.
                OnFork::Hook { before_thaw: true, .. } if when == When::Thawed => continue,
                // It must not go on as the template, and can not start without its payload.
                OnFork::Restart if !complete => {
                    unit.stop()?;
                    "stopped".to_owned()
                }
                OnFork::Restart => {
                    unit.restart(deadline)?;
                    "restarted".to_owned()
                }
                OnFork::Signal(name, signal) => {
                    unit.signal(*signal)?;
                    format!("signalled-{name}")
                }
                OnFork::Hook { command, .. } => {
                    unit.run_hook(command, Among::Workload, deadline)?;
                    "hook-ran".to_owned()
                }
                OnFork::Event => {
                    unit.tell(|id| identity_request(id, identity), deadline)?;
                    "told".to_owned()
                }
            };
            after.steps.push(service_step(unit, outcome, begun));
        }
        for unit in waiting {
            let begun = Instant::now();
            let outcome = if complete {
                // A fork of a fork has it already.
                unit.restart(begun + unit.spec.timeout)?;
                "started"
            } else {
                unit.stop()?;
                "waits"
            };
            after.steps.push(service_step(unit, outcome.to_owned(), begun));
        }
        Ok(())
    }

    fn tell_runtime(&self, identity: &Identity, after: &mut AfterThaw) -> Result<(), String> {
        let Some(runtime) = self.kept().runtime.clone() else { return Ok(()) };
        let begun = Instant::now();
        let report: Report = match runtime.take_filled() {
            Some(report) => {
                after.announce = true;
                report
            }
            None => {
                let id = runtime.next_id();
                let deadline = begun + runtime.spec.event_timeout;
                let report = runtime.event("identity", &identity_request(id, identity), id, deadline)?;
                after.steps.push(step("runtime".to_owned(), "told".to_owned(), begun));
                report
            }
        };
        let entry =
            |(name, outcome): (String, String)| Step { name: ["runtime.", name.as_str()].concat(), outcome, micros: 0 };
        after.steps.extend(report.into_iter().map(entry));
        Ok(())
    }

    /// Evaluates code in the runtime. Blocks until the answer or the deadline (0: 60 s); evaluations run one after the
    /// other, and the wait for one's turn counts. Any thread may call it. Failures are in the reply.
    pub fn eval(&self, code: &str, timeout_ms: u32) -> EvalReply {
        let deadline = Instant::now() + spec::timeout(timeout_ms, DEFAULT_EVAL_TIMEOUT);
        let Some(runtime) = self.kept().runtime.clone() else {
            return failure("no-runtime", "the template has no warmed runtime; build it from a recipe with [runtime]");
        };
        let identities = self.gate.identities();
        let mut conversation = loop {
            if !self.gate.wait_open(Some(deadline)) {
                return failure("timeout", "the sandbox was being captured until the deadline");
            }
            match runtime.take_turn(deadline) {
                Ok(conversation) if self.gate.is_closed() => runtime.give_back(conversation),
                Ok(conversation) => break conversation,
                Err(NoTurn::Late) => return failure("timeout", "other evaluations ran until the deadline"),
                Err(NoTurn::Dead(reason)) => return failure("runtime-died", &reason),
            }
        };
        if self.gate.identities() != identities {
            // Who asked was the template's client. This fork must not do the template's work.
            runtime.give_back(conversation);
            return failure("timeout", "the sandbox was forked before the evaluation began");
        }
        let id = runtime.next_id();
        let answer = conversation.ask(id, &eval_request(id, code), deadline);
        if matches!(answer, Err(NoAnswer::Late | NoAnswer::Busy)) {
            Runtime::interrupt(&conversation);
        }
        if answer == Err(NoAnswer::Died) {
            return failure("runtime-died", &runtime.died(conversation));
        }
        runtime.give_back(conversation);
        match answer {
            Ok(answer) => reply(answer),
            Err(NoAnswer::Busy) => failure("timeout", "the runtime was still busy with an evaluation that timed out"),
            Err(NoAnswer::TooLong) => failure("too-large", "the code is longer than 4 MiB"),
            Err(NoAnswer::Invalid(answer::AnswerError::TooDeep)) => {
                failure("too-large", "the value is nested too deep; its repr may do")
            }
            Err(NoAnswer::Invalid(error)) => {
                failure("exception", &format!("the runtime's answer is not valid: {error}"))
            }
            Err(NoAnswer::Late | NoAnswer::Died) => {
                failure("timeout", "the evaluation did not end in time and was interrupted")
            }
        }
    }

    fn shared(&self) -> (Arc<dyn World>, Arc<Logs>, Arc<Gate>) {
        (Arc::clone(&self.world), Arc::clone(&self.logs), Arc::clone(&self.gate))
    }

    fn parts(&self) -> (Vec<Arc<Unit>>, Option<Arc<Runtime>>) {
        let kept = self.kept();
        (kept.units.clone(), kept.runtime.clone())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn reply(answer: Answer) -> EvalReply {
    match answer {
        Answer::Result { value, repr, stdout, stderr, .. } => {
            EvalReply { value_json: value, repr, stdout, stderr, error: None }
        }
        Answer::Error { too_large, message, stack, stdout, stderr, .. } => {
            let kind = if too_large { "too-large" } else { "exception" }.to_owned();
            EvalReply { stdout, stderr, error: Some(EvalError { kind, message, stack }), ..EvalReply::default() }
        }
        Answer::Ready { .. } | Answer::Done { .. } => failure("exception", "the runtime did not answer with a result"),
    }
}

fn failure(kind: &str, message: &str) -> EvalReply {
    let error = EvalError { kind: kind.to_owned(), message: message.to_owned(), stack: String::new() };
    EvalReply { error: Some(error), ..EvalReply::default() }
}

fn service_step(unit: &Unit, outcome: String, begun: Instant) -> Step {
    step(format!("service.{}", unit.spec.name), outcome, begun)
}

fn step(name: String, outcome: String, begun: Instant) -> Step {
    Step { name, outcome, micros: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX) }
}

fn seconds(begun: Instant) -> String {
    format!("{:.1} s", begun.elapsed().as_secs_f64())
}
