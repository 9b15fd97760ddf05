//! One service: its process, its readiness, and what happens when it ends.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use identity::Limits;
use rustix::process::Signal;

use super::{
    answer::Answer,
    conversation::{Conversation, NoAnswer},
    gate::Gate,
    log::Logs,
    pump::{Ended, Pump},
    readiness::{self, Readiness},
    spec::{OnFork, Service},
    world::{World, environment, output_pipe, socket_pair},
};
use crate::workload::{Among, Console, Process, Program, Start};

/// The first pause before a restart; each further one doubles, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Names the descriptor at which a service is told of its fork.
const EVENT_FD: &str = "OFFSHOOT_EVENT_FD";
/// A process that ran this long has earned a short pause again.
const LONG_LIFE: Duration = Duration::from_secs(30);

pub(crate) fn next_pause(pause: Duration, lived: Duration) -> Duration {
    if lived >= LONG_LIFE { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) }
}

pub(crate) fn first_pause() -> Duration {
    FIRST_PAUSE
}

#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) spec: Service,
    world: Arc<dyn World>,
    logs: Arc<Logs>,
    gate: Arc<Gate>,
    state: Mutex<State>,
    changed: Condvar,
    this: Weak<Self>,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// Counts processes. A thread that minds an older one has nothing to say any more.
    life: u64,
    process: Option<Arc<Process>>,
    /// How it is told of its fork, if it is told in-process; absent while somebody does.
    conversation: Option<Conversation>,
    next_id: u64,
    /// Where in the log this life begins.
    log_start: u64,
    /// Whether it has written its line, and answered: what its readiness asks for.
    wrote: bool,
    answered: bool,
    /// Why it has not answered yet.
    trouble: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Status {
    NotStarted,
    Starting,
    Ready,
    Ended(String),
}

/// Why there is no new process.
#[derive(Debug)]
pub(super) enum NoLife {
    /// Somebody else has started or ended the service meanwhile.
    Superseded,
    /// It could not be started, in this life.
    Failed(u64, String),
}

/// A process that was started and its output.
#[derive(Debug)]
pub(super) struct Life {
    number: u64,
    process: Arc<Process>,
    output: OwnedFd,
}

impl Unit {
    pub(crate) fn new(spec: Service, world: Arc<dyn World>, logs: Arc<Logs>, gate: Arc<Gate>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            spec,
            world,
            logs,
            gate,
            state: Mutex::new(State {
                status: Status::NotStarted,
                life: 0,
                process: None,
                conversation: None,
                next_id: 1,
                log_start: 0,
                wrote: false,
                answered: false,
                trouble: String::new(),
            }),
            changed: Condvar::new(),
            this: this.clone(),
        })
    }

    /// Starts it and, if it is `awaited`, waits until it is ready.
    pub(crate) fn start(&self, awaited: bool, deadline: Instant) -> Result<(), String> {
        let life = self.launch(None).map_err(|error| match error {
            NoLife::Superseded => format!("service {} was started again meanwhile", self.spec.name),
            NoLife::Failed(_, why) => why,
        })?;
        let Some(this) = self.this.upgrade() else { return Err("the agent ends".into()) };
        let number = life.number;
        thread::Builder::new()
            .name(format!("svc-{}", self.spec.name).chars().take(15).collect())
            .stack_size(256 << 10)
            .spawn(move || this.mind(life))
            .map_err(|error| format!("no thread for service {}: {error}", self.spec.name))?;
        if self.is_ready_at_once() || !awaited {
            // Ready the moment it started, even if it has done its work already.
            return Ok(());
        }
        self.wait_settled(number, deadline)
    }

    fn is_ready_at_once(&self) -> bool {
        self.spec.ready_line.is_empty() && self.spec.readiness.is_none()
    }

    /// In a fork: ends it and everything it started, and starts it again.
    pub(crate) fn restart(&self, deadline: Instant) -> Result<(), String> {
        self.stop()?;
        self.start(self.spec.awaited, deadline)
    }

    pub(crate) fn stop(&self) -> Result<(), String> {
        let process = {
            let mut state = self.lock();
            state.life += 1;
            state.status = Status::NotStarted;
            state.conversation = None;
            state.process.take()
        };
        self.changed.notify_all();
        match process {
            Some(process) => {
                process.kill_tree().map_err(|error| format!("service {} could not be ended: {error}", self.spec.name))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), String> {
        let process = Self::running(&self.lock());
        process
            .and_then(|process| process.signal(signal).map_err(|error| error.to_string()))
            .map_err(|why| format!("service {} could not be signalled: {why}", self.spec.name))
    }

    /// Its process, or why there is none.
    fn running(state: &State) -> Result<Arc<Process>, String> {
        match (&state.process, &state.status) {
            (_, Status::Ended(how)) => Err(format!("it {how}")),
            (Some(process), _) => Ok(Arc::clone(process)),
            (None, _) => Err("it does not run".to_owned()),
        }
    }

    /// Sends it an event and waits for its answer. The request is made with the event's id.
    pub(crate) fn tell(&self, request: impl FnOnce(u64) -> String, deadline: Instant) -> Result<(), String> {
        let name = &self.spec.name;
        let (mut conversation, id, log_start) = {
            let mut state = self.lock();
            let running =
                Self::running(&state).and_then(|_| state.conversation.take().ok_or("it is being told".into()));
            let conversation = running.map_err(|why| format!("service {name} could not be told: {why}"))?;
            state.next_id += 1;
            (conversation, state.next_id, state.log_start)
        };
        let answer = conversation.ask(id, &request(id), deadline);
        let mut state = self.lock();
        if state.life == conversation.life {
            state.conversation = Some(conversation);
        }
        drop(state);
        let problem = match answer {
            Ok(Answer::Done { .. }) => return Ok(()),
            Ok(Answer::Error { message, .. }) => {
                format!("failed its identity event: {}", message.chars().take(300).collect::<String>())
            }
            Ok(_) | Err(NoAnswer::Invalid(_)) => "did not answer its identity event with \"done\"".to_owned(),
            Err(NoAnswer::Died) => format!("ended, or closed {EVENT_FD}, before it answered its identity event"),
            Err(NoAnswer::Late) => "did not answer its identity event in time".to_owned(),
            Err(NoAnswer::Busy) => "has not answered an earlier event yet".to_owned(),
            Err(NoAnswer::TooLong) => "can not be told: its environment is longer than 4 MiB".to_owned(),
        };
        Err(format!("service {name} {problem}{}", said(&self.logs.tail(name, log_start))))
    }

    /// Waits until it is not in the middle of a start.
    pub(crate) fn wait_quiet(&self, deadline: Instant) -> Result<(), String> {
        let number = self.lock().life;
        match self.wait_settled(number, deadline) {
            // That it ended is not the capture's business.
            Err(_) if Instant::now() < deadline => Ok(()),
            other => other,
        }
    }

    /// Starts a process: for whoever minds the life `follows` only if that is still the last one.
    pub(super) fn launch(&self, follows: Option<u64>) -> Result<Life, NoLife> {
        let name = &self.spec.name;
        let failed_in = |life: u64, error: &dyn std::fmt::Display| {
            NoLife::Failed(life, format!("service {name} could not be started: {error}"))
        };
        let failed = |error: &dyn std::fmt::Display| failed_in(follows.unwrap_or_default(), error);
        let (output, theirs) = output_pipe().map_err(|error| failed(&error))?;
        let second = theirs.try_clone().map_err(|error| failed(&error))?;
        let mut env = environment(&*self.world, &self.spec.env);
        let mut events = None;
        if self.spec.on_fork == OnFork::Event {
            let (ours, theirs) = socket_pair().map_err(|error| failed(&error))?;
            env.insert(EVENT_FD.to_owned(), theirs.as_raw_fd().to_string());
            events = Some((ours, theirs));
        }
        let (ours, inherited) = events.unzip();
        let start = Start {
            group: format!("service-{name}"),
            program: Program::Command(self.spec.command.clone()),
            env,
            workdir: self.spec.workdir.clone(),
            user: self.spec.user.clone(),
            console: Console::Pipes([None, Some(theirs), Some(second)]),
            inherited,
            place: Among::Workload,
            limits: self.spec.limits,
        };
        let ours =
            ours.map(|ours| Ok((ours.try_clone()?, ours))).transpose().map_err(|error: io::Error| failed(&error))?;
        let mut state = self.lock();
        if follows.is_some_and(|life| life != state.life) {
            return Err(NoLife::Superseded);
        }
        state.life += 1;
        state.status = Status::Starting;
        state.log_start = self.logs.position(name);
        let process = match self.world.start(start) {
            Ok(process) => Arc::new(process),
            Err(error) => {
                state.status = Status::Ended(format!("could not be started: {error}"));
                self.changed.notify_all();
                return Err(failed_in(state.life, &error));
            }
        };
        state.process = Some(Arc::clone(&process));
        let number = state.life;
        state.conversation = ours.map(|(to, from)| Conversation::new(number, Arc::clone(&process), to, from));
        state.wrote = self.spec.ready_line.is_empty();
        state.answered = self.spec.readiness.is_none();
        state.trouble.clear();
        self.look_whether_ready(&mut state);
        drop(state);
        if let (Some(readiness), Some(this)) = (self.spec.readiness.clone(), self.this.upgrade()) {
            thread::Builder::new()
                .name(format!("ask-{name}").chars().take(15).collect())
                .stack_size(256 << 10)
                .spawn(move || this.ask(number, &readiness))
                .map_err(|error| failed_in(number, &error))?;
        }
        Ok(Life { number, process, output })
    }

    fn look_whether_ready(&self, state: &mut State) {
        if state.status == Status::Starting && state.wrote && state.answered {
            state.status = Status::Ready;
            self.changed.notify_all();
        }
    }

    /// Asks it until it answers, or has ended.
    fn ask(&self, number: u64, readiness: &Readiness) {
        let mut pause = readiness::FIRST;
        loop {
            let answer = readiness.ask();
            let mut state = self.lock();
            let starts = |state: &State| state.life == number && state.status == Status::Starting;
            if !starts(&state) {
                return;
            }
            match answer {
                Ok(()) => {
                    state.answered = true;
                    return self.look_whether_ready(&mut state);
                }
                Err(trouble) => state.trouble = trouble,
            }
            let until = Instant::now() + pause;
            // Its end wakes this thread.
            while let Some(left) = until.checked_duration_since(Instant::now()).filter(|_| starts(&state)) {
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            drop(state);
            // None while the sandbox is captured: it would freeze in the middle.
            self.gate.wait_open(None);
            pause = (pause * 3 / 2).min(readiness::LONGEST);
        }
    }

    /// Minds one process after the other until the service is ended for good.
    fn mind(&self, mut life: Life) {
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let mut pump = Pump::new(&self.logs, &self.spec.name, &life.output);
            pump.until_exit(&life.process, None, || self.look_for_ready_line(life.number));
            let exit = life.process.wait();
            let again = self.spec.restart.applies(exit.success());
            {
                let mut state = self.lock();
                if state.life != life.number {
                    return;
                }
                state.status = Status::Ended(format!("ended with exit code {}", exit.code()));
                state.process = None;
                state.conversation = None;
                self.changed.notify_all();
            }
            if !again {
                // A service may have gone into the background; somebody must read what it writes.
                pump.until_end();
                return;
            }
            self.logs.note(&self.spec.name, &format!("ended with exit code {}; starting it again", exit.code()));
            let _ = life.process.kill_tree();
            loop {
                if !self.pause(life.number, pause) {
                    return;
                }
                pause = next_pause(pause, begun.elapsed());
                match self.launch(Some(life.number)) {
                    Ok(next) => {
                        life = next;
                        break;
                    }
                    Err(NoLife::Superseded) => return,
                    Err(NoLife::Failed(number, error)) => {
                        life.number = number;
                        self.logs.note(&self.spec.name, &error);
                    }
                }
            }
        }
    }

    /// Waits before a restart, and while the sandbox is captured; false if the service was started or ended meanwhile.
    fn pause(&self, number: u64, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut state = self.lock();
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if state.life != number {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.gate.wait_open(None);
        self.lock().life == number
    }

    fn look_for_ready_line(&self, number: u64) {
        let mut state = self.lock();
        if state.life == number
            && state.status == Status::Starting
            && !state.wrote
            && self.logs.has_line(&self.spec.name, state.log_start, &self.spec.ready_line)
        {
            state.wrote = true;
            self.look_whether_ready(&mut state);
        }
    }

    fn wait_settled(&self, number: u64, deadline: Instant) -> Result<(), String> {
        let name = &self.spec.name;
        let mut state = self.lock();
        loop {
            if state.life != number {
                return Err(format!("service {name} was started again meanwhile"));
            }
            let tail = || said(&self.logs.tail(name, state.log_start));
            match &state.status {
                Status::NotStarted | Status::Ready => return Ok(()),
                Status::Ended(how) => return Err(format!("service {name} {how} before it was ready{}", tail())),
                Status::Starting => {}
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let what = match (state.wrote, state.trouble.as_str()) {
                    (false, _) => format!("did not write {:?} in time", self.spec.ready_line),
                    (true, "") => "did not answer in time".to_owned(),
                    (true, trouble) => format!("did not answer in time: {trouble}"),
                };
                return Err(format!("service {name} {what}{}", tail()));
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs the service's hook in the fork: among the workload, or beside it as long as that is frozen.
    pub(crate) fn run_hook(&self, command: &[String], place: Among, deadline: Instant) -> Result<(), String> {
        let name = &self.spec.name;
        let failed = |error: &dyn std::fmt::Display| format!("the hook of service {name} could not be run: {error}");
        let (output, theirs) = output_pipe().map_err(|error| failed(&error))?;
        let second = theirs.try_clone().map_err(|error| failed(&error))?;
        let log_start = self.logs.position(name);
        let process = self
            .world
            .start(Start {
                group: format!("hook-{name}"),
                program: Program::Command(command.to_vec()),
                env: environment(&*self.world, &self.spec.env),
                workdir: self.spec.workdir.clone(),
                user: self.spec.user.clone(),
                console: Console::Pipes([None, Some(theirs), Some(second)]),
                inherited: None,
                place,
                limits: Limits::default(),
            })
            .map_err(|error| failed(&error))?;
        let ended = Pump::new(&self.logs, name, &output).until_exit(&process, Some(deadline), || ());
        let problem = match ended {
            Ended::Exit if process.wait().success() => None,
            Ended::Exit => Some(format!("failed with exit code {}", process.wait().code())),
            Ended::Deadline => Some("did not end in time".to_owned()),
        };
        // Also what it left in the background: a hook is not a service.
        let left = process.kill_tree();
        match problem {
            // Beside the workload nothing would freeze it, or limit it.
            None if place == Among::Hooks => {
                left.map_err(|error| format!("what the hook of service {name} left behind could not be ended: {error}"))
            }
            None => Ok(()),
            Some(how) => Err(format!("the hook of service {name} {how}{}", said(&self.logs.tail(name, log_start)))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Last output, as the end of an error.
pub(crate) fn said(tail: &str) -> String {
    if tail.is_empty() { "; it wrote nothing".to_owned() } else { format!("; it last wrote:\n{tail}") }
}
