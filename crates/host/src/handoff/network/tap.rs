//! By tap: a link in a namespace of the fork's own, which is opened when the fork says that it is itself.
//!
//! ```text
//! prepare: lease, namespace, tap, closed link; the socket for acks
//! after_resume:
//!   the fork says "applied" on its ack port or in a datagram ─► the link is opened
//!   its datagram comes                                       ─► confirmed; done
//!   applied, and no datagram for a while ─► ReconfigureNetwork, then `ip` through exec, then the fork is destroyed
//! ```
//!
//! A datagram counts only if it came from the fork's own address, over its own link, with the key that only this fork was given.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use identity::{Ack, AckKey, ForkId, MailboxName, Network as Section, Stage, ack::confirmation};
use net::{AckSocket, ClosedLink, Dns, LinkError, Network, OpenLink, Reach, TapOptions};

use super::{
    NetworkError, Troubles, commands,
    observer::{Observer, Task},
    tap_section,
};
use crate::{
    fork::ForkError,
    handoff::{Arrival, Draft, End, Handoff},
    network::{Mode, NetworkReport, NetworkRequest, NetworkState, Wait, Way},
    record::ForkRecord,
};

/// How long a datagram is waited for before the next way is tried. The guest sends it again within 20 ms at first; a busy host answers late.
pub(super) const NEXT_WAY: Duration = Duration::from_secs(2);

/// A fork's link, as far as it is.
#[derive(Debug)]
enum Link {
    None,
    Closed(ClosedLink),
    Open(OpenLink),
    /// Whoever ends the fork removes it.
    Kept,
}

/// A fork's network by tap.
#[derive(Debug)]
pub(crate) struct TapHandoff<'a> {
    network: &'a Network,
    request: &'a NetworkRequest,
    link: Link,
    id: Option<ForkId>,
    section: Option<Section>,
    tap: Option<OwnedFd>,
    acks: Option<AckSocket>,
    state: NetworkState,
    way: Option<Way>,
    acked_micros: Option<u64>,
    troubles: Troubles,
    observer: Option<Observer>,
    until: Option<Wait>,
}

impl<'a> TapHandoff<'a> {
    pub(crate) fn new(network: &'a Network, request: &'a NetworkRequest) -> Self {
        Self {
            network,
            request,
            link: Link::None,
            id: None,
            section: None,
            tap: None,
            acks: None,
            state: NetworkState::Waiting,
            way: None,
            acked_micros: None,
            troubles: Troubles::default(),
            observer: None,
            until: None,
        }
    }

    /// What was made for a spare ahead of time, if it is still there.
    fn adopt(&self, id: &ForkId) -> Option<(ClosedLink, AckSocket)> {
        let link = self.network.adopt(id).ok()?;
        let acks = link.ack_socket().ok()?;
        Some((link, acks))
    }

    fn closed(&self) -> Result<&ClosedLink, ForkError> {
        match &self.link {
            Link::Closed(link) => Ok(link),
            _ => Err(NetworkError::from(LinkError::Absent(self.id.clone().ok_or_else(no_fork)?)).into()),
        }
    }

    /// What the fork acknowledged is true on this side as well from now on.
    fn open(&mut self) -> Result<(), NetworkError> {
        match std::mem::replace(&mut self.link, Link::None) {
            Link::Closed(link) => self.link = Link::Open(link.open(self.request.policy.clone())?),
            other => self.link = other,
        }
        Ok(())
    }

    /// Takes some of the datagrams that are there. True once a good one was.
    fn take_datagrams(&self, arrival: &mut Arrival<'_>) -> Result<bool, NetworkError> {
        let Some(socket) = &self.acks else { return Ok(false) };
        let failed = |source| LinkError::Step { doing: "waiting for acknowledgements", source };
        for datagram in socket.take().map_err(failed)? {
            let Some(ack) = arrival.waiter.check(&datagram.bytes) else { continue };
            if let Some(answer) = answer(&ack, &datagram.bytes, arrival.waiter.key(&MailboxName::identity())) {
                // Lost, it is sent again, and so is the datagram.
                let _ = socket.confirm(&datagram, answer.as_bytes());
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn wait(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        let resumed = Instant::now();
        let identity = MailboxName::identity();
        let mut ways = [Way::Reconfigured, Way::Commands].into_iter();
        let (mut way, mut acked) = (Way::Datagram, false);
        let mut applied: Option<(Instant, Instant)> = None;
        loop {
            if !acked && self.take_datagrams(arrival)? {
                (acked, self.way) = (true, Some(way));
                self.acked_micros = Some(u64::try_from(resumed.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
            let is_applied = arrival.waiter.received(&identity).is_some();
            if acked || is_applied && self.request.later.is_none() {
                self.open()?;
            }
            if acked {
                self.state = NetworkState::Acknowledged;
                arrival.connected = Some(Instant::now());
                return Ok(());
            }
            if let Some(later) = self.request.later.as_ref().filter(|_| is_applied) {
                let key = arrival.waiter.key(&identity).ok_or_else(no_fork)?;
                let wait = Wait::of(self.request.timeout(), later.on_failure);
                self.until = Some(wait);
                let task = Task::new(arrival.id, key, wait);
                self.observer = Some(Observer::start(&later.program, task).map_err(|source| ForkError::State {
                    step: "starting what waits for the fork's network",
                    source,
                })?);
                return Ok(());
            }
            if let Some(reason) = arrival.waiter.take_network_pending() {
                way = Way::Reconfigured;
                let section = self.section.as_ref().ok_or_else(no_fork)?;
                self.troubles.help(arrival, section, &reason, Instant::now() + self.request.timeout())?;
            }
            let now = Instant::now();
            let limit = self.request.timeout();
            let until = match (&mut applied, is_applied) {
                (None, false) => None,
                (None, true) => {
                    applied = Some((now + limit, now + NEXT_WAY));
                    Some(now + NEXT_WAY.min(limit))
                }
                (Some((deadline, _)), _) if now >= *deadline => {
                    let troubles = std::mem::take(&mut self.troubles.0);
                    return Err(NetworkError::NoAck { limit, troubles }.into());
                }
                (Some((deadline, next)), _) => {
                    if now >= *next {
                        if let Some(another) = ways.next() {
                            way = another;
                            let why = "no ack came over the network";
                            let section = self.section.as_ref().ok_or_else(no_fork)?;
                            match way {
                                Way::Commands => {
                                    self.troubles.note(why, "ip", &commands::run(arrival.dir, section, *deadline));
                                }
                                _ => drop(self.troubles.reconfigure(arrival.dir, arrival.id, section, why, *deadline)),
                            }
                        }
                        *next = Instant::now() + NEXT_WAY;
                    }
                    Some(*deadline.min(next))
                }
            };
            arrival.waiter.wait(arrival.stream, self.acks.as_ref().map(AsFd::as_fd), until)?;
        }
    }
}

fn no_fork() -> ForkError {
    ForkError::State { step: "the network", source: std::io::ErrorKind::NotFound.into() }
}

/// The confirmation of a datagram that says that everything is applied; nothing else is confirmed.
pub(super) fn answer(ack: &Ack, line: &[u8], key: Option<&AckKey>) -> Option<String> {
    let good = ack.stage == Stage::Applied && ack.mailbox == MailboxName::identity();
    good.then(|| confirmation(line, key?)).flatten()
}

impl<'a> Handoff<'a> for TapHandoff<'a> {
    fn name(&self) -> &'static str {
        "network"
    }

    fn prepare(&mut self, draft: &mut Draft) -> Result<(), ForkError> {
        self.id = Some(draft.id.clone());
        let adopted = if draft.spare { self.adopt(&draft.id) } else { None };
        let (link, acks) = match adopted {
            Some(adopted) => adopted,
            None => {
                if draft.spare {
                    // Somebody removed what the spare had; it is of no use without.
                    self.network.remove(&draft.id).map_err(NetworkError::from)?;
                    draft.spare = false;
                }
                let link = self.network.prepare(&draft.id, TAP).map_err(NetworkError::from)?;
                let (tap, acks) = link.ends().map_err(NetworkError::from)?;
                self.tap = Some(tap);
                (link, acks)
            }
        };
        // Guarded by its own drop until it is put here, by this value from here on.
        let addresses = link.record().addresses;
        self.acks = Some(acks);
        self.link = Link::Closed(link);
        let asked = self.request.dns.as_deref().unwrap_or_default();
        let reach =
            Reach { mode: Mode::Tap, egress: &self.request.policy.egress, v4: true, v6: addresses.v6.is_some() };
        let dns = Dns::of(reach, asked);
        self.troubles.0.extend(dns.warning());
        let section = tap_section(&addresses, &dns.servers)?;
        draft.network = Some(section.clone());
        self.section = Some(section);
        Ok(())
    }

    fn end(&mut self) -> Result<Option<End>, ForkError> {
        // The first machine takes the tap that is open already; one after it, which nobody holds any more.
        let tap = match self.tap.take() {
            Some(tap) => tap,
            None => self.closed()?.tap().map_err(NetworkError::from)?,
        };
        Ok(Some(End::Tap(tap)))
    }

    fn after_resume(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        self.wait(arrival)
    }

    fn keep(&mut self, record: &mut ForkRecord) {
        let kept = match std::mem::replace(&mut self.link, Link::Kept) {
            Link::Open(link) => Some(link.keep()),
            Link::Closed(link) => Some(link.keep()),
            Link::None | Link::Kept => None,
        };
        let Some(addresses) = kept.map(|link| link.addresses) else { return };
        record.network = Some(NetworkReport {
            mode: Mode::Tap,
            mac: addresses.mac.to_string(),
            ipv4: Some(addresses.v4),
            ipv6: addresses.v6,
            gateway: Some(addresses.gateway_v4),
            dns: self.section.take().map(|section| section.dns).unwrap_or_default(),
            policy: self.request.policy.clone(),
            state: self.state,
            way: self.way,
            acked_micros: self.acked_micros,
            troubles: std::mem::take(&mut self.troubles.0),
            wait: self.until,
            process: None,
        });
    }

    fn published(&mut self) {
        // There may be one socket for acks; from now on it is the observer's.
        self.acks = None;
        self.observer.take().map(Observer::go_on).unwrap_or_default();
    }

    fn close(&mut self) {
        match std::mem::replace(&mut self.link, Link::None) {
            Link::Kept => {
                // What can not be removed stays recorded, and `cleanup` finds it.
                let _ = self.id.as_ref().map(|id| self.network.remove(id));
            }
            // They remove themselves.
            Link::Open(_) | Link::Closed(_) | Link::None => {}
        }
    }
}

/// Machines get their tap as an open descriptor, so nobody but root need be able to open it.
pub(crate) const TAP: TapOptions = TapOptions { owner: 0, vnet_header: false };
