//! The network of a fork in the life of its keeper: the one step that may be tried again.
//!
//! ```text
//!            fails                           ReconfigureNetwork fails: still waiting
//! applying ────────▶ network-pending (frozen) ────────▶ applying ─▶ thaw ─▶ running
//!                          │                  succeeds                        │
//!                          └─▶ failed: 30 s have passed     ReconfigureNetwork ┘ (as often as the host likes)
//! ```

use std::{
    borrow::Cow,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use identity::{Ack, AckKey, Action, Document, MailboxName, Network as Section, Stage, Step, ack};
use thiserror::Error;

use super::{
    Keeper, Parts,
    apply::{Failed, Log},
    lock,
    prepare::Own,
    resume,
};
use crate::{
    console,
    network::{AckSender, Letter, Network, NetworkError, Outcome, Quieted, RESOLV_CONF, resolv_conf},
    state::{AgentState, Phase},
};

/// How long a fork whose network failed waits for the host: the longest that it waits for an ack.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest's network and its second attempt.
#[derive(Debug)]
pub(super) struct Handoff {
    pub(super) network: Network,
    pub(super) acks: AckSender,
    again: Mutex<Again>,
    changed: Condvar,
}

/// What the keeper waits for.
#[derive(Debug, Default)]
struct Again {
    waiting: bool,
    /// Steps of the attempt that succeeded.
    done: Option<Vec<Step>>,
}

/// Why a network was not configured anew.
#[derive(Debug, Error)]
pub enum ReconfigureError {
    /// Not in a phase in which it may be.
    #[error(
        "the sandbox is {0}; a network is configured in a template, in a running fork, or in one that waits for it"
    )]
    Phase(&'static str),
    /// Not this fork.
    #[error("this is another fork")]
    OtherFork,
    /// There is no section to apply.
    #[error("this sandbox was given no network, and the request has none")]
    NoSection,
    /// A step failed; the text names it.
    #[error("{0}")]
    Step(String),
}

impl Handoff {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            network: Network::open()?,
            acks: AckSender::start()?,
            again: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Before a capture: see [`Network::quiesce`]. An attempt that is under way ends first, and the phase lets no other begin.
    pub(super) fn quiesce(&self, end_connections: bool) -> Result<Quieted, NetworkError> {
        let _nothing_under_way = lock(&self.again);
        self.network.quiesce(end_connections)
    }

    /// After a rehearsal: what the capture had taken is taken again, and nothing is sent any more.
    pub(super) fn take_back(&self) -> Result<(), NetworkError> {
        self.acks.recall();
        self.network.take_back()
    }

    /// What the capture took is given back, where nothing was captured, or to the source of a branch.
    pub(super) fn restore(&self, log: &mut Log) -> Result<(), Failed> {
        if self.network.applied().is_none() {
            return Ok(());
        }
        log.step("network", || self.network.restore().map(|()| Cow::from("kept")))
    }
}

/// A new fork's network, before the thaw. If it fails the workload stays frozen until the host has it applied again.
pub(super) fn take_on(
    state: &Arc<AgentState>,
    parts: &Parts,
    resolv_conf_file: Option<&Own>,
    document: &Document,
    key: &AckKey,
    log: &mut Log,
) -> Result<(), Failed> {
    let handoff = &parts.handoff;
    handoff.acks.forget();
    let Some(section) = &document.network else {
        // The file is as it was, and the card stays down.
        resolv_conf_file.map_or(Ok(()), Own::put_back).map_err(|error| Failed(format!("{RESOLV_CONF}: {error}")))?;
        return handoff.network.take_on(None).map(drop).map_err(|error| Failed(format!("network: {error}")));
    };
    let tried = log.step("network", || handoff.network.take_on(Some(section)).map(Cow::from)).and_then(|()| {
        log.step("resolv-conf", || {
            let text = resolv_conf(section);
            match resolv_conf_file {
                Some(file) => file.fill(&text)?,
                None => parts.root.write(RESOLV_CONF, 0o644, text.as_bytes())?,
            }
            Ok::<_, io::Error>("set".into())
        })
    });
    match tried {
        Ok(()) => Ok(()),
        // It is tried for the next spare, or by the fork itself.
        Err(failed) if document.action == Action::Rehearse => Err(failed),
        Err(Failed(reason)) => wait_for_the_host(state, parts, document, key, log, reason),
    }
}

fn wait_for_the_host(
    state: &Arc<AgentState>,
    parts: &Parts,
    document: &Document,
    key: &AckKey,
    log: &mut Log,
    reason: String,
) -> Result<(), Failed> {
    console::warn(&format!("{reason}; waiting for the host to configure the network again"));
    let deadline = Instant::now() + PATIENCE;
    let ack = Ack {
        stage: Stage::NetworkPending,
        mailbox: MailboxName::identity(),
        fork: document.fork.id.clone(),
        steps: log.steps.clone(),
        reason: Some(reason.clone()),
    };
    let done = parts.handoff.wait(state, deadline, || {
        parts.ack.send(&ack.to_line(key), deadline)?;
        // The control channel's thread has to run.
        resume::let_others_run(state, parts, true);
        Ok(())
    });
    resume::let_others_run(state, parts, false);
    match done {
        Ok(Some(steps)) => {
            log.steps.extend(steps);
            Ok(())
        }
        Ok(None) => Err(Failed(format!("{reason}; nobody configured it again within {} s", PATIENCE.as_secs()))),
        Err(error) => Err(Failed(format!("{reason}; and the host could not be told: {error}"))),
    }
}

impl Handoff {
    /// Waits for an attempt that succeeds, and answers with its steps; `None` if there was none until the deadline. `tell` says that it is
    /// waited for, when attempts are taken already.
    fn wait(
        &self,
        state: &AgentState,
        deadline: Instant,
        tell: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Option<Vec<Step>>> {
        *lock(&self.again) = Again { waiting: true, done: None };
        state.set_phase(Phase::NetworkPending);
        let told = tell();
        let mut again = lock(&self.again);
        while told.is_ok() && again.done.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            again = self.changed.wait_timeout(again, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        // Before the lock is free: who comes later finds a phase that refuses it.
        again.waiting = false;
        state.set_phase(Phase::Applying);
        told.map(|()| again.done.take())
    }

    /// One attempt, at the host's wish.
    fn again(
        &self,
        state: &AgentState,
        fork: &str,
        section: Option<Section>,
        apply: impl FnOnce(&Section) -> Result<Vec<Step>, Failed>,
    ) -> Result<Vec<Step>, ReconfigureError> {
        // Held until the end: the keeper does not give up in the middle of it.
        let mut again = lock(&self.again);
        let phase = state.phase();
        let is_this = match phase {
            Phase::Template => fork.is_empty(),
            Phase::Running => state.identity().is_some_and(|identity| identity.fork.id.as_str() == fork),
            // Its identity is not public yet.
            Phase::NetworkPending if again.waiting => true,
            phase => return Err(ReconfigureError::Phase(phase.as_str())),
        };
        if !is_this {
            return Err(ReconfigureError::OtherFork);
        }
        let section = section.or_else(|| self.network.applied()).ok_or(ReconfigureError::NoSection)?;
        let steps = apply(&section).map_err(|Failed(reason)| ReconfigureError::Step(reason))?;
        match (phase, section.ack) {
            (Phase::NetworkPending, _) => {
                again.done = Some(steps.clone());
                self.changed.notify_one();
            }
            (_, Some(to)) if !self.acks.send_again(to) => console::note("there is no ack to send again"),
            _ => {}
        }
        Ok(steps)
    }
}

impl Parts {
    /// Sends the ack as a datagram, if the fork's network says where to.
    pub(super) fn send_datagram(&self, document: Option<&Document>, ack: &Ack, key: &AckKey) {
        let Some(to) = document.and_then(|document| document.network.as_ref()?.ack) else { return };
        let line = ack.to_datagram(key);
        // Nobody listens to a rehearsal's, nor confirms it.
        if matches!(ack.stage, Stage::Applied | Stage::Rehearsed)
            && let Some(confirmation) = ack::confirmation(line.as_bytes(), key)
        {
            self.handoff.acks.send(Letter { line, confirmation, to });
        }
    }

    fn apply_again(&self, section: &Section) -> Result<Vec<Step>, Failed> {
        let mut log = Log::new();
        log.step("network-again", || self.handoff.network.reconfigure(section).map(Cow::from))?;
        log.step("resolv-conf", || {
            self.root.write(RESOLV_CONF, 0o644, resolv_conf(section).as_bytes()).map(|()| Cow::from("set"))
        })?;
        Ok(log.steps)
    }
}

impl Keeper {
    /// What became of the ack's datagram.
    #[must_use]
    pub fn ack_outcome(&self) -> Outcome {
        self.parts.as_ref().map_or(Outcome::None, |parts| parts.handoff.acks.outcome())
    }
}

/// Configures the network again: `section`, or the one there was. Answers with the steps. In a fork that has acknowledged, the ack's datagram is
/// sent again.
///
/// # Errors
/// [`ReconfigureError`]; it may be tried again.
pub fn reconfigure(state: &AgentState, fork: &str, section: Option<Section>) -> Result<Vec<Step>, ReconfigureError> {
    let Some(parts) = &state.keeper().parts else { return Err(ReconfigureError::Phase("not in a guest")) };
    parts.handoff.again(state, fork, section, |section| parts.apply_again(section))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use identity::{Inet, MacAddress};

    use super::*;
    use crate::{Freeze, workload::Workload};

    fn section() -> Section {
        Section {
            mac: MacAddress::new([2, 0, 0, 0, 0, 9]).unwrap(),
            mtu: 1500,
            ipv4: Some(Inet { address: [10, 0, 0, 2].into(), prefix: 32, gateway: None }),
            ipv6: None,
            gateway_mac: None,
            dns: Vec::new(),
            search: Vec::new(),
            ack: None,
        }
    }

    fn done() -> Vec<Step> {
        vec![Step { name: "network-again".into(), outcome: "arp".into(), micros: 1 }]
    }

    fn fork() -> (Arc<AgentState>, Handoff) {
        (AgentState::new(Workload::bare().unwrap(), Keeper::bare(), Freeze::On), Handoff::open().unwrap())
    }

    #[test]
    fn n2_a_fork_without_its_network_waits_through_failures_for_the_attempt_that_succeeds() {
        let (state, handoff) = fork();
        std::thread::scope(|scope| {
            let (told, is_told) = std::sync::mpsc::channel();
            let waiting = scope.spawn({
                let (state, handoff) = (&state, &handoff);
                move || {
                    handoff.wait(state, Instant::now() + PATIENCE, || {
                        told.send(()).unwrap();
                        Ok(())
                    })
                }
            });
            is_told.recv().unwrap();
            assert_eq!(state.phase(), Phase::NetworkPending);
            // Nothing is started in the meantime, and nothing was thawed: the phase is not one that runs.
            for _ in 0..2 {
                let failed = handoff.again(&state, "", Some(section()), |_| Err(Failed("no".into())));
                assert!(matches!(failed, Err(ReconfigureError::Step(_))));
            }
            assert!(matches!(handoff.again(&state, "", None, |_| Ok(done())), Err(ReconfigureError::NoSection)));
            assert_eq!(state.phase(), Phase::NetworkPending);
            assert_eq!(handoff.again(&state, "", Some(section()), |_| Ok(done())).unwrap(), done());
            assert_eq!(waiting.join().unwrap().unwrap(), Some(done()));
        });
        assert_eq!(state.phase(), Phase::Applying, "the keeper goes on");
    }

    #[test]
    fn n2_after_the_deadline_nothing_is_configured_any_more() {
        let (state, handoff) = fork();
        assert_eq!(handoff.wait(&state, Instant::now() + Duration::from_millis(20), || Ok(())).unwrap(), None);
        state.set_phase(Phase::Failed);
        let late = handoff.again(&state, "", Some(section()), |_| unreachable!("applied too late"));
        assert!(matches!(late, Err(ReconfigureError::Phase("failed"))));
        // Nor where the host can not know that it is waited for.
        let broken = || Err(io::ErrorKind::BrokenPipe.into());
        assert!(handoff.wait(&state, Instant::now() + PATIENCE, broken).is_err());
    }

    #[test]
    fn n2_only_the_sandbox_that_is_meant_is_configured_and_only_where_it_may_be() {
        let (state, handoff) = fork();
        // A template.
        assert!(handoff.again(&state, "", Some(section()), |_| Ok(done())).is_ok());
        let other = "0123456789abcdef0123";
        let refused = handoff.again(&state, other, Some(section()), |_| unreachable!("it is no fork"));
        assert!(matches!(refused, Err(ReconfigureError::OtherFork)));
        for phase in [Phase::Quiesced, Phase::Applying, Phase::Failed] {
            state.set_phase(phase);
            let refused = handoff.again(&state, "", Some(section()), |_| unreachable!("not in this phase"));
            assert!(matches!(refused, Err(ReconfigureError::Phase(_))), "{phase:?}");
        }
    }
}
