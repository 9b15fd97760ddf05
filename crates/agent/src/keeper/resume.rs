//! The keeper's thread: waits for the identity, has it applied, and answers.
//!
//! Under emulation every piece of code that runs first in a fork has to be translated first, so this path is short and
//! plain: one thread, no runtime, few system calls.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use identity::{Ack, AckKey, Action, Document, ForkId, Limits, MailboxName, Secret, Stage, Step};

use super::{
    Parts,
    apply::{self, Failed, Log},
    lock,
    pages::Pages,
    rehearsal,
    tick::Tick,
};
use crate::{
    console,
    state::{AgentState, Phase},
    workload::{Among, Console, Program, Start},
};

/// How long the host may take to read an ack: it waits for nothing else meanwhile.
const ACK_DEADLINE: Duration = Duration::from_secs(30);

/// What is taken for rest before a capture.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rest {
    /// Nothing else has wanted the CPU for this long.
    undisturbed: Duration,
    /// And this often the thread has given way in vain: a host that stops the machine for that long must not look like rest, and a
    /// thread that has just woken is let run on for some milliseconds (2 µs each, emulated) though it gives way.
    yields: u32,
    /// How long the thread spins before it gives way again. A capture begins at once.
    capture_within: Duration,
}

/// The quiesce's answer is out, and the host has closed its channel: every fork of the template is spared what would follow.
pub(super) const OF_TEMPLATE: Rest =
    Rest { undisturbed: Duration::from_millis(30), yields: 10_000, capture_within: Duration::from_secs(2) };

/// A fork's workload is held up meanwhile, and few are made of it, if any. If the answer was not out, it is after the first spin.
pub(super) const OF_FORK: Rest =
    Rest { undisturbed: Duration::from_millis(10), yields: 3_000, capture_within: Duration::from_millis(200) };

/// Most time for that. Where others never rest, forks are only later.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often the spinning thread looks (some µs each under emulation) until it holds the timer anew.
const SPINS: usize = 4096;
/// And this often it looks between two looks at the clock.
const SPINS_A_READING: usize = 16;

/// Says on the ack port that from now on this thread only waits for its identity: the host captures then.
const ARMED: &str = "offshoot-armed";

/// An ack needs a fork id; this one stands in where the document could not be read.
const NO_FORK: &str = "00000000000000000000";

/// How long making SSH host keys may take.
const HOST_KEYS_DEADLINE: Duration = Duration::from_secs(20);

/// Runs for ever.
pub(super) fn run(state: &Arc<AgentState>, parts: &Parts) {
    loop {
        let mut armed = lock(&parts.armed);
        let rest = loop {
            match armed.take() {
                Some(rest) => break rest,
                None => armed = parts.armed_changed.wait(armed).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(armed);
        touch_stack();
        touch_heap();
        while let Next::Wait = answer(state, parts, wait_until_filled(state, parts, rest)) {}
    }
}

/// What follows an answer.
enum Next {
    /// The mailbox is armed again.
    Wait,
    /// Nothing, until the next capture.
    Run,
}

/// Spins: the capture stops the guest within milliseconds, and a fork then goes on right here, with nothing between it
/// and the identity, neither a timer nor the scheduler. If no capture comes, everybody else gets another turn: the answer
/// that the host waits for may not be out.
///
/// Returns the time of the capture on the guest's own clock, which stands still from there until the fork runs: what has
/// passed on it since is what the fork has been busy with.
fn wait_until_filled(state: &AgentState, parts: &Parts, rest: Rest) -> Instant {
    let own = lock(&parts.own);
    let mut told = false;
    while !own.is_filled() {
        let_others_go_first(&own, rest);
        // Before the host is told: it captures at once, and a fork goes on where that was.
        right_of_way(state, true);
        if !told && let Err(error) = parts.ack.send(ARMED, Instant::now() + ACK_DEADLINE) {
            console::warn(&format!("the host could not be told that the agent is armed: {error}"));
        }
        told = true;
        if let Some(captured) = spin(&own, parts.tick.as_ref(), rest.capture_within) {
            return captured;
        }
        if let Some(tick) = &parts.tick {
            tick.release();
        }
        right_of_way(state, false);
    }
    Instant::now()
}

/// Gives way until nobody wants the CPU any more. That is seen by the kernel's count of switches, not by time that is
/// missing: that may as well have been the host's, and a busy one's always is.
fn let_others_go_first(own: &Pages, rest: Rest) {
    let asked = Instant::now();
    let (mut since, mut switches, mut yields) = (asked, context_switches(), 0);
    while !own.is_filled() {
        rustix::thread::sched_yield();
        yields += 1;
        let (now, seen) = (Instant::now(), context_switches());
        if seen != switches {
            (since, switches, yields) = (now, seen, 0);
        }
        let rests = now.duration_since(since) >= rest.undisturbed && yields >= rest.yields;
        if rests || now.duration_since(asked) >= PATIENCE {
            return;
        }
    }
}

/// Spins until the mailbox is filled, and returns when that was not so for the last time; `None` after `within`.
fn spin(own: &Pages, tick: Option<&Tick>, within: Duration) -> Option<Instant> {
    let begun = Instant::now();
    // Of two readings one after the other at least the first is from before the capture.
    let (mut before, mut last) = (begun, begun);
    while last.duration_since(begun) < within {
        // Renewed for as long as a capture may take.
        if let Some(tick) = tick {
            tick.hold();
        }
        for _ in 0..SPINS / SPINS_A_READING {
            for _ in 0..SPINS_A_READING {
                if own.is_filled() {
                    return Some(before);
                }
                std::hint::spin_loop();
            }
            before = std::mem::replace(&mut last, Instant::now());
        }
    }
    None
}

fn answer(state: &Arc<AgentState>, parts: &Parts, captured: Instant) -> Next {
    let started = Instant::now();
    let taken = lock(&parts.own).take();
    state.set_phase(Phase::Applying);
    let (payload, key) = match taken {
        Ok(Some(taken)) => taken,
        Ok(None) => return fail_silently(state, "the mailbox was filled and is not"),
        // Without the page there is no key, so there can be no ack either: the host's deadline ends this fork.
        Err(error) => return fail_silently(state, &error.to_string()),
    };
    // What the host sent to others is out of the pages before anything is applied.
    let others = state.keeper().mailboxes().take();
    let mut log = Log::new();
    let mut document = None;
    let mut announce = false;
    let result = apply(state, parts, payload, &key, [captured, started], &mut log, &mut document, &mut announce);
    let fork = document.as_ref().map(|document: &Document| document.fork.id.clone());
    let is_rehearsal = document.as_ref().is_some_and(|document| document.action == Action::Rehearse);
    let ack = Ack {
        stage: match result {
            Ok(()) if is_rehearsal => Stage::Rehearsed,
            Ok(()) => Stage::Applied,
            Err(_) => Stage::Failed,
        },
        mailbox: MailboxName::identity(),
        fork: fork.clone().or_else(|| ForkId::parse(NO_FORK).ok()).unwrap_or_else(|| unreachable!("20 zeroes")),
        steps: log.steps,
        reason: result.err().map(|Failed(reason)| reason),
    };
    if let Some(reason) = &ack.reason {
        state.set_phase(Phase::Failed);
        console::warn(&format!("the identity was not applied: {reason}"));
    }
    send(parts, &ack, &key);
    parts.send_datagram(document.as_ref(), &ack, &key);
    if announce && let Some(identity) = state.identity() {
        state.supervisor().after_ack(&identity);
    }
    if let Some(tick) = &parts.tick {
        tick.release();
    }
    right_of_way(state, false);
    state.announce_change();
    // Wiping takes its time, and nobody waits for it.
    drop(document);
    if ack.stage == Stage::Rehearsed {
        return end_rehearsal(state, parts, ack, &key);
    }
    match (&ack.reason, fork) {
        (None, Some(fork)) => state.keeper().mailboxes().deliver(state, &fork, others),
        // Payloads that nobody will get are dropped, and thereby wiped.
        _ => drop(others),
    }
    Next::Run
}

/// With the kernel's timer, and everybody else's turn: taking a card down waits for both.
fn end_rehearsal(state: &Arc<AgentState>, parts: &Parts, ack: Ack, key: &AckKey) -> Next {
    let Err(Failed(reason)) = rehearsal::put_back(state, parts) else { return Next::Wait };
    state.set_phase(Phase::Failed);
    console::warn(&reason);
    send(parts, &Ack { stage: Stage::Failed, steps: Vec::new(), reason: Some(reason), ..ack }, key);
    Next::Run
}

#[allow(clippy::too_many_arguments)] // What a failure leaves behind is the caller's.
fn apply(
    state: &Arc<AgentState>,
    parts: &Parts,
    payload: Secret,
    key: &AckKey,
    [captured, started]: [Instant; 2],
    log: &mut Log,
    kept: &mut Option<Document>,
    announce: &mut bool,
) -> Result<(), Failed> {
    let document = Document::from_bytes(payload.expose()).map_err(|error| Failed(format!("document: {error}")))?;
    drop(payload);
    let document = kept.insert(document);
    let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    log.steps.push(Step { name: "document".into(), outcome: "taken+wiped".into(), micros });
    let make_keys = {
        let mut prepared = lock(&parts.prepared);
        apply::until_thaw(state, parts, &mut prepared, document, key, captured, log)?;
        prepared.wants_host_keys && document.action == Action::Become
    };
    if document.action == Action::Rehearse {
        return Ok(());
    }
    // What follows waits for others: they run while this thread sleeps, and it goes on as soon as they have answered.
    if make_keys {
        log.step("ssh-host-keys", || make_host_keys(state))?;
    }
    let after = match (document.action, state.identity()) {
        (Action::Become, Some(identity)) => state.supervisor().after_thaw(&identity),
        _ => state.supervisor().after_continue(),
    };
    log.steps.extend(after.steps);
    *announce = after.announce;
    after.failure.map_or(Ok(()), |reason| Err(Failed(reason)))
}

/// Makes the fork's SSH host keys, if the program that makes them is there.
fn make_host_keys(state: &Arc<AgentState>) -> Result<std::borrow::Cow<'static, str>, String> {
    let start = Start {
        group: "tool-ssh-host-keys".to_owned(),
        program: Program::Command(vec!["ssh-keygen".to_owned(), "-A".to_owned()]),
        env: state.environment(),
        workdir: String::new(),
        user: String::new(),
        console: Console::Pipes([None, None, None]),
        inherited: None,
        place: Among::Workload,
        limits: Limits::default(),
    };
    let Ok(process) = state.workload().start(start) else { return Ok("removed".into()) };
    match process.wait_until(Instant::now() + HOST_KEYS_DEADLINE) {
        Some(exit) if exit.success() => Ok("made".into()),
        Some(exit) => Err(format!("ssh-keygen exited with {}", exit.code())),
        None => {
            let _ = process.kill_tree();
            Err("ssh-keygen took too long".to_owned())
        }
    }
}

fn fail_silently(state: &Arc<AgentState>, reason: &str) -> Next {
    right_of_way(state, false);
    state.set_phase(Phase::Failed);
    console::warn(&format!("no identity could be taken: {reason}"));
    Next::Run
}

fn send(parts: &Parts, ack: &Ack, key: &AckKey) {
    if let Err(error) = parts.ack.send(&ack.to_line(key), Instant::now() + ACK_DEADLINE) {
        console::warn(&format!("the ack could not be sent: {error}"));
    }
}

/// Who has the right of way on the CPU: this thread while it waits for, and applies, the identity; after it the runtime,
/// which has to answer before the fork can; then everybody else, the kernel's own threads too. This thread is above the
/// runtime so that its deadline holds even if that never sleeps. Processes and threads that they start do not inherit
/// it. Best effort: without it a fork is only later.
///
/// A runtime with several threads has none: its first one may spin until another has done its part, which then never gets the CPU. (libuv
/// does, in `uv__async_spin`: forks of a Node whose thread pool was at work hung until their deadline.)
pub(super) fn right_of_way(state: &AgentState, on: bool) {
    set_real_time(0, if on { 2 } else { 0 });
    if let Some(runtime) = state.supervisor().first_in_line() {
        set_real_time(runtime.pid(), i32::from(on && has_one_thread(runtime.pid())));
    }
}

fn has_one_thread(process: i32) -> bool {
    std::fs::read_dir(format!("/proc/{process}/task")).is_ok_and(|threads| threads.take(2).count() == 1)
}

/// While the keeper waits for the host in the middle of an identity, everybody else runs.
pub(super) fn let_others_run(state: &AgentState, parts: &Parts, on: bool) {
    match &parts.tick {
        Some(tick) if on => tick.release(),
        Some(tick) => tick.hold(),
        None => {}
    }
    right_of_way(state, !on);
}

fn set_real_time(thread: i32, priority: i32) {
    let parameters = libc::sched_param { sched_priority: priority };
    let policy = if priority > 0 { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    // SAFETY: the call reads the parameters and keeps no reference; 0 is the calling thread.
    let _ = unsafe { libc::sched_setscheduler(thread, policy | libc::SCHED_RESET_ON_FORK, &raw const parameters) };
}

/// How often this thread has made way for another.
fn context_switches() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure that it is given, and zeroes are a valid one should it not.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_nvcsw + usage.ru_nivcsw
}

/// Makes the memory that the resume will allocate present: what is freed here stays in this thread's arena.
#[inline(never)]
fn touch_heap() {
    std::hint::black_box(vec![1_u8; 96 * 1024]);
}

/// Makes the stack that the resume will use present.
#[inline(never)]
fn touch_stack() {
    let mut space = [0_u8; 64 * 1024];
    std::hint::black_box(&mut space);
}
