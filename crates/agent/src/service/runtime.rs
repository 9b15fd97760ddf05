//! The warmed runtime: its process, whose turn it is to talk with it, and what happens when it dies.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use identity::Limits;
use rustix::process::Signal;

use super::{
    answer::{Answer, push_object, push_string},
    conversation::{Conversation, NoAnswer},
    gate::Gate,
    in_place::InPlace,
    log::Logs,
    pump::Pump,
    spec::{self, RUNTIME},
    unit::{first_pause, next_pause, said},
    world::{World, environment, input_pipe, output_pipe},
};
use crate::{
    state::{IDENTITY_VARIABLES, Identity},
    workload::{Among, Console, Process, Program, Start},
};

/// How long a runtime that hung up may take to end, and its last words to be read.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often a runtime that can not be started again is tried.
const ATTEMPTS: u32 = 5;

#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) spec: spec::Runtime,
    world: Arc<dyn World>,
    logs: Arc<Logs>,
    gate: Arc<Gate>,
    turn: Mutex<Turn>,
    changed: Condvar,
    this: Weak<Self>,
}

#[derive(Debug)]
struct Turn {
    status: Status,
    life: u64,
    /// Absent while somebody talks with the runtime, and while there is none.
    conversation: Option<Conversation>,
    /// How many wait for it.
    waiting: usize,
    process: Option<Arc<Process>>,
    next_id: u64,
    log_start: u64,
    /// What can be filled in a fork while it is frozen.
    in_place: Option<InPlace>,
    /// Whether it wants to be told if a capture is given up.
    told: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Status {
    Starting,
    Ready,
    /// Why, with its last output.
    Dead(String),
}

/// Why nobody got a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoTurn {
    /// The deadline passed; others were before.
    Late,
    /// There is no runtime any more.
    Dead(String),
}

impl Runtime {
    pub(crate) fn new(spec: spec::Runtime, world: Arc<dyn World>, logs: Arc<Logs>, gate: Arc<Gate>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            spec,
            world,
            logs,
            gate,
            turn: Mutex::new(Turn {
                status: Status::Starting,
                life: 0,
                conversation: None,
                waiting: 0,
                process: None,
                next_id: 1,
                log_start: 0,
                in_place: None,
                told: false,
            }),
            changed: Condvar::new(),
            this: this.clone(),
        })
    }

    /// Starts it and waits until it is ready; in a fork also until it knows who it is.
    pub(crate) fn start(&self, deadline: Instant) -> Result<(), String> {
        let (mut conversation, errors) = self.launch()?;
        let (life, process) = (conversation.life, Arc::clone(&conversation.process));
        let this = self.this.upgrade().ok_or("the agent ends")?;
        thread::Builder::new()
            .name(RUNTIME.into())
            .stack_size(256 << 10)
            .spawn(move || this.mind(life, &process, &errors))
            .map_err(|error| format!("no thread for the runtime: {error}"))?;
        let told = match conversation.expect_ready(deadline) {
            Ok(told) => told,
            Err(error) => return Err(self.give_up(&conversation, error, "before it was ready")),
        };
        if let Some(identity) = self.world.identity() {
            let id = self.next_id();
            if let Err(error) = conversation.ask(id, &identity_request(id, &identity), deadline) {
                return Err(self.give_up(&conversation, error, "when it was told its identity"));
            }
        }
        let mut turn = self.lock();
        if let Status::Dead(reason) = &turn.status {
            return Err(reason.clone());
        }
        turn.status = Status::Ready;
        turn.told = told;
        turn.conversation = Some(conversation);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for its turn to talk with the runtime.
    pub(crate) fn take_turn(&self, deadline: Instant) -> Result<Conversation, NoTurn> {
        let mut turn = self.lock();
        loop {
            if let Status::Dead(reason) = &turn.status {
                return Err(NoTurn::Dead(reason.clone()));
            }
            if turn.status == Status::Ready
                && let Some(conversation) = turn.conversation.take()
            {
                return Ok(conversation);
            }
            let left = deadline.checked_duration_since(Instant::now()).ok_or(NoTurn::Late)?;
            turn.waiting += 1;
            turn = self.changed.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
            turn.waiting -= 1;
        }
    }

    /// Ends the turn.
    pub(crate) fn give_back(&self, conversation: Conversation) {
        let mut turn = self.lock();
        if turn.life == conversation.life && turn.status == Status::Ready {
            turn.conversation = Some(conversation);
            if turn.waiting > 0 {
                self.changed.notify_one();
            }
        }
    }

    pub(crate) fn next_id(&self) -> u64 {
        let mut turn = self.lock();
        turn.next_id += 1;
        turn.next_id
    }

    /// Sends an event and answers with the runtime's report.
    pub(crate) fn event(&self, name: &str, request: &str, id: u64, deadline: Instant) -> Result<Report, String> {
        let mut conversation = self.turn_for_event(deadline)?;
        match conversation.ask(id, request, deadline) {
            Ok(Answer::Done { report, in_place, .. }) => {
                self.keep_in_place(&conversation, in_place);
                self.give_back(conversation);
                Ok(report)
            }
            Ok(Answer::Error { message, .. }) => {
                self.give_back(conversation);
                let short: String = message.chars().take(300).collect();
                Err(format!("the runtime's {name} event failed: {short}"))
            }
            Ok(_) => {
                self.give_back(conversation);
                Err(format!("the runtime did not answer the {name} event with \"done\""))
            }
            Err(NoAnswer::Died) => Err(self.died(conversation)),
            Err(error) => {
                self.give_back(conversation);
                Err(match error {
                    NoAnswer::Late => format!("the runtime did not answer the {name} event in time"),
                    NoAnswer::Busy => "the runtime still works on a request that timed out".to_owned(),
                    _ => format!("the runtime's answer to the {name} event is not valid"),
                })
            }
        }
    }

    /// Sends an event whose answer nobody has to wait for: it comes before the next request, which is not sent without it.
    pub(crate) fn announce(&self, name: &str, request: &str, id: u64, deadline: Instant) -> Result<(), String> {
        let mut conversation = self.turn_for_event(deadline)?;
        match conversation.announce(id, request, deadline) {
            Ok(()) => {
                self.give_back(conversation);
                Ok(())
            }
            Err(NoAnswer::Died) => Err(self.died(conversation)),
            Err(_) => {
                self.give_back(conversation);
                Err(format!("the runtime did not take the {name} event in time"))
            }
        }
    }

    /// Tells it that the capture was given up, if it wants to know: it may hold its work since the quiesce.
    pub(crate) fn go_on(&self) {
        if !self.lock().told {
            return;
        }
        let id = self.next_id();
        if let Err(error) = self.event("continue", &continue_request(id), id, Instant::now() + self.spec.event_timeout)
        {
            // It is released by the next request too.
            self.logs.note(RUNTIME, &error);
        }
    }

    /// Ends a runtime that must not answer any more.
    pub(crate) fn end(&self, reason: &str) {
        self.logs.note(RUNTIME, &format!("ended: {reason}"));
        if let Some(process) = self.process() {
            let _ = process.kill_tree();
        }
    }

    fn turn_for_event(&self, deadline: Instant) -> Result<Conversation, String> {
        self.take_turn(deadline).map_err(|error| match error {
            NoTurn::Dead(reason) => reason,
            NoTurn::Late => "the runtime is busy with an evaluation; wait for it, or let it time out".into(),
        })
    }

    /// Notes what can be filled in this process' memory in a fork. Without it the fork's ack waits for the runtime.
    fn keep_in_place(&self, conversation: &Conversation, said: Option<String>) {
        let in_place = said.and_then(|said| match InPlace::open(conversation.process.pid(), &said) {
            Ok(in_place) => Some(in_place),
            Err(error) => {
                self.logs.note(RUNTIME, &format!("what it says can be filled in place can not be: {error}"));
                None
            }
        });
        self.lock().in_place = in_place;
    }

    /// Fills it; called while the runtime is frozen in a fork. False if there is nothing to fill.
    pub(crate) fn fill_in_place(&self) -> io::Result<bool> {
        self.lock().in_place.as_mut().map_or(Ok(false), InPlace::fill)
    }

    /// What was filled, once. (What it takes stays open until the next capture: closing takes longer than filling.)
    pub(crate) fn take_filled(&self) -> Option<Report> {
        self.lock().in_place.as_mut()?.take_report()
    }

    /// Its process.
    pub(crate) fn process(&self) -> Option<Arc<Process>> {
        self.lock().process.clone()
    }

    /// Interrupts the request in progress.
    pub(crate) fn interrupt(conversation: &Conversation) {
        // If it has ended, there is nothing to interrupt.
        let _ = conversation.process.signal(Signal::INT);
    }

    /// Why the runtime of this conversation is gone, with its last output.
    pub(crate) fn died(&self, mut conversation: Conversation) -> String {
        let life = conversation.life;
        let refusal = conversation.refusal.take();
        // It may have hung up without ending.
        if conversation.process.wait_until(Instant::now() + LAST_WORDS).is_none() {
            let _ = conversation.process.kill_tree();
        }
        drop(conversation);
        let deadline = Instant::now() + LAST_WORDS;
        let mut turn = self.lock();
        loop {
            match &turn.status {
                Status::Dead(reason) if turn.life == life => {
                    let refused = |why| format!("the runtime was ended: it could not take on its identity: {why}");
                    return refusal.map_or_else(|| reason.clone(), refused);
                }
                _ if turn.life != life => return "the runtime died and was started again".to_owned(),
                _ => {}
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return "the runtime died".to_owned();
            };
            turn = self.changed.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn launch(&self) -> Result<(Conversation, OwnedFd), String> {
        let failed = |error: &dyn std::fmt::Display| format!("the runtime could not be started: {error}");
        let (input, stdin) = input_pipe().map_err(|error| failed(&error))?;
        let (output, stdout) = output_pipe().map_err(|error| failed(&error))?;
        let (errors, stderr) = output_pipe().map_err(|error| failed(&error))?;
        let start = Start {
            group: RUNTIME.into(),
            program: Program::Command(self.spec.command.clone()),
            env: environment(&*self.world, &self.spec.env),
            workdir: self.spec.workdir.clone(),
            user: self.spec.user.clone(),
            console: Console::Pipes([Some(stdin), Some(stdout), Some(stderr)]),
            inherited: None,
            place: Among::Workload,
            limits: Limits::default(),
        };
        let mut turn = self.lock();
        turn.life += 1;
        turn.status = Status::Starting;
        turn.conversation = None;
        turn.log_start = self.logs.position(RUNTIME);
        let process = match self.world.start(start) {
            Ok(process) => Arc::new(process),
            Err(error) => {
                turn.status = Status::Dead(failed(&error));
                self.changed.notify_all();
                return Err(failed(&error));
            }
        };
        turn.process = Some(Arc::clone(&process));
        Ok((Conversation::new(turn.life, process, input, output), errors))
    }

    /// Ends a runtime that did not come up.
    fn give_up(&self, conversation: &Conversation, error: NoAnswer, when: &str) -> String {
        let log_start = self.lock().log_start;
        let how = match error {
            NoAnswer::Died => match conversation.process.wait_until(Instant::now() + LAST_WORDS) {
                Some(exit) => format!("ended with exit code {} {when}", exit.code()),
                None => format!("hung up {when}"),
            },
            NoAnswer::Late => "was not ready in time".to_owned(),
            NoAnswer::Invalid(error) => format!("said something else {when}: {error}"),
            NoAnswer::Busy | NoAnswer::TooLong => format!("failed {when}"),
        };
        let _ = conversation.process.kill_tree();
        // Its thread reads its last words, then says that it is dead.
        let deadline = Instant::now() + LAST_WORDS;
        let mut turn = self.lock();
        while turn.life == conversation.life && !matches!(turn.status, Status::Dead(_)) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            turn = self.changed.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        format!("the runtime {how}{}", said(&self.logs.tail(RUNTIME, log_start)))
    }

    /// Minds one process: carries what it writes besides its answers into the log, and starts the next when it dies.
    fn mind(&self, life: u64, process: &Arc<Process>, errors: &OwnedFd) {
        let begun = Instant::now();
        Pump::new(&self.logs, RUNTIME, errors).until_exit(process, None, || ());
        let exit = process.wait();
        let was_ready = {
            let mut turn = self.lock();
            if turn.life != life {
                return;
            }
            let was_ready = turn.status == Status::Ready;
            let tail = said(&self.logs.tail(RUNTIME, turn.log_start));
            turn.status = Status::Dead(format!("the runtime ended with exit code {}{tail}", exit.code()));
            turn.conversation = None;
            turn.process = None;
            self.changed.notify_all();
            was_ready
        };
        let _ = process.kill_tree();
        // One that never was ready is its starter's business.
        if !was_ready || !self.spec.restart.applies(exit.success()) {
            return;
        }
        self.logs.note(RUNTIME, &format!("ended with exit code {}; starting it again", exit.code()));
        let mut pause = first_pause();
        for _ in 0..ATTEMPTS {
            thread::sleep(pause);
            self.gate.wait_open(None);
            pause = next_pause(pause, begun.elapsed());
            match self.start(Instant::now() + self.spec.ready_timeout) {
                Ok(()) => return,
                Err(error) => self.logs.note(RUNTIME, &error),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a runtime reports of an event.
pub(crate) type Report = Vec<(String, String)>;

/// The request that asks the runtime to get ready for the capture.
pub(crate) fn quiesce_request(id: u64) -> String {
    format!(r#"{{"type":"quiesce","id":{id}}}"#)
}

/// The request that tells the runtime that the capture was given up.
fn continue_request(id: u64) -> String {
    format!(r#"{{"type":"continue","id":{id}}}"#)
}

/// The request that tells the runtime who it is.
pub(crate) fn identity_request(id: u64, identity: &Identity) -> String {
    let fork = &identity.fork;
    let values = [fork.id.as_str(), fork.name.as_str(), fork.hostname.as_str(), fork.template.as_str()];
    let mut line = [r#"{"type":"identity","id":"#, &id.to_string(), r#","fork":"#].concat();
    push_object(&mut line, ["id", "name", "hostname", "template"].into_iter().zip(values));
    line.push_str(r#","env":"#);
    let given = identity.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let given = given.filter(|(name, _)| !IDENTITY_VARIABLES.contains(name));
    push_object(&mut line, given.chain(IDENTITY_VARIABLES.into_iter().zip(values)));
    line.push('}');
    line
}

/// The request to evaluate code.
pub(crate) fn eval_request(id: u64, code: &str) -> String {
    let mut line = format!(r#"{{"type":"eval","id":{id},"code":"#);
    push_string(&mut line, code);
    line.push('}');
    line
}
