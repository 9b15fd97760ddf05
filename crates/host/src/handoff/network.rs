//! The handoff of who a fork is on the wire.
//!
//! ```text
//! prepare: lease, namespace, tap, closed link; the socket for acks
//! letters: the network section goes with the identity
//! after_resume:
//!   the fork says "applied" on its ack port or in a datagram ─► the link is opened
//!   its datagram comes                                       ─► confirmed; done
//!   "network-pending" on the ack port    ─► ReconfigureNetwork over the control channel
//!   applied, and no datagram for a while ─► ReconfigureNetwork, then `ip` through exec, then the fork is destroyed
//! ```
//!
//! A datagram counts only if it came from the fork's own address, over its own link, with the key that only this fork was given.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use identity::{
    Ack, AckKey, ForkId, Inet, MacAddress, MailboxName, Network as Section, NetworkError as SectionError, Stage, Tag,
    ack::confirmation,
};
use net::{ACK_PORT, AckSocket, Addresses, ClosedLink, LinkError, MTU, Network, OpenLink, TapOptions};
use thiserror::Error;

use super::{Arrival, Draft, End, Handoff};
use crate::{
    fork::ForkError,
    guest::{GuestChannel, GuestError},
    network::{Mode, NetworkReport, NetworkRequest, NetworkState, Way},
    record::ForkRecord,
};

/// How long a datagram is waited for before the next way is tried. The guest sends it again within 20 ms at first; a busy host answers late.
const NEXT_WAY: Duration = Duration::from_secs(2);
/// Time for the guest to configure its network again.
const RECONFIGURE_LIMIT: Duration = Duration::from_secs(5);
/// How often a fork that could not apply its network is asked to do it again.
const RECONFIGURE_TRIES: usize = 3;
/// How commands in the guest call the card: the only one that a guest of ours has.
const CARD: &str = "eth0";

/// Why a fork's network is not as it was asked for.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The template was made without a card.
    #[error(
        "template {0} has no network card, so its forks can have no network; build it again with this offshoot, or leave --network out"
    )]
    NoCard(Tag),
    /// Something that only a tap can do.
    #[error("{option} needs --network tap, not {mode}")]
    NeedsTap {
        /// What was asked for.
        option: &'static str,
        /// The network it was asked with.
        mode: Mode,
    },
    /// One port of the host for several forks.
    #[error("a port of the host leads to one fork only; make the {0} forks one by one, each with a --publish of its own")]
    OnePortManyForks(usize),
    /// The host's side.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// What would be told to the guest is not valid.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// No ack, whichever way was tried.
    #[error(
        "the fork's network was not acknowledged within {} ms after its identity{}", limit.as_millis(), troubles_text(troubles)
    )]
    NoAck {
        /// The deadline.
        limit: Duration,
        /// What was tried and what became of it.
        troubles: Vec<String>,
    },
    /// The guest could not do it, and could not be helped.
    #[error("the fork could not configure its network: {0}")]
    Refused(String),
}

fn troubles_text(troubles: &[String]) -> String {
    if troubles.is_empty() { String::new() } else { format!(" ({})", troubles.join("; ")) }
}

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
pub(crate) struct NetworkHandoff<'a> {
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
    troubles: Vec<String>,
}

impl<'a> NetworkHandoff<'a> {
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
            troubles: Vec::new(),
        }
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

    /// Takes datagrams that are there. True once a good one was.
    fn take_datagrams(&self, arrival: &mut Arrival<'_>) -> Result<bool, NetworkError> {
        let Some(socket) = &self.acks else { return Ok(false) };
        let failed = |source| LinkError::Step { doing: "waiting for acknowledgements", source };
        let mut good = false;
        while let Some(datagram) = socket.take().map_err(failed)? {
            let Some(ack) = arrival.waiter.check(&datagram.bytes) else { continue };
            if let Some(answer) = answer(&ack, &datagram.bytes, arrival.waiter.key(&MailboxName::identity())) {
                good = true;
                // Lost, it is sent again, and so is the datagram.
                let _ = socket.confirm(&datagram, answer.as_bytes());
                break;
            }
        }
        Ok(good)
    }

    fn reconfigure(&mut self, arrival: &Arrival<'_>, why: &str) -> bool {
        let section = self.section.as_ref().map(Section::to_bytes).unwrap_or_default();
        let done = in_guest(async {
            let mut guest = GuestChannel::connect(arrival.dir, RECONFIGURE_LIMIT).await?;
            guest.reconfigure_network(arrival.id, section, RECONFIGURE_LIMIT).await
        });
        self.trouble(why, "ReconfigureNetwork", &done.map(drop));
        self.troubles.last().is_some_and(|trouble| trouble.ends_with("done"))
    }

    /// The last way: the commands that a person would type.
    fn run_commands(&mut self, arrival: &Arrival<'_>, why: &str) {
        let Some(section) = &self.section else { return };
        let commands = commands(section);
        let done = in_guest(async {
            let mut guest = GuestChannel::connect(arrival.dir, RECONFIGURE_LIMIT).await?;
            for command in commands {
                let text = command.join(" ");
                let result = guest.run_command(command, RECONFIGURE_LIMIT).await?;
                if result.code != 0 {
                    return Err(GuestError::Refused(format!("`{text}` ended with {}", result.code)));
                }
            }
            Ok(())
        });
        self.trouble(why, "ip", &done);
    }

    fn trouble(&mut self, why: &str, what: &str, done: &Result<(), GuestError>) {
        let end = done.as_ref().map_or_else(|error| format!("failed: {error}"), |()| "done".into());
        self.troubles.push(format!("{why}; {what}: {end}"));
    }

    fn wait(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        let resumed = Instant::now();
        let identity = MailboxName::identity();
        let mut ways = [Way::Reconfigured, Way::Commands].into_iter();
        let (mut way, mut tries, mut acked) = (Way::Datagram, 0, false);
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
                return Ok(());
            }
            if is_applied && self.request.later.is_some() {
                return Ok(());
            }
            if let Some(reason) = arrival.waiter.take_network_pending() {
                way = Way::Reconfigured;
                while !self.reconfigure(arrival, &reason) {
                    tries += 1;
                    if tries >= RECONFIGURE_TRIES {
                        return Err(NetworkError::Refused(self.troubles.join("; ")).into());
                    }
                }
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
                    let troubles = std::mem::take(&mut self.troubles);
                    return Err(NetworkError::NoAck { limit, troubles }.into());
                }
                (Some((deadline, next)), _) => {
                    if now >= *next {
                        if let Some(another) = ways.next() {
                            way = another;
                            let why = "no ack came over the network";
                            match way {
                                Way::Commands => self.run_commands(arrival, why),
                                _ => drop(self.reconfigure(arrival, why)),
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
fn answer(ack: &Ack, line: &[u8], key: Option<&AckKey>) -> Option<String> {
    let good = ack.stage == Stage::Applied && ack.mailbox == MailboxName::identity();
    good.then(|| confirmation(line, key?)).flatten()
}

/// Runs what talks to a guest, on a thread that has no runtime.
fn in_guest<T>(future: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future)
}

/// What a fork with these addresses is told.
pub(crate) fn section(addresses: &Addresses, dns: &[std::net::IpAddr]) -> Result<Section, NetworkError> {
    let mac = |mac: net::MacAddress| {
        MacAddress::new(mac.0).map_err(|_| SectionError::Field { field: "mac", rule: "locally administered" })
    };
    let section = Section {
        mac: mac(addresses.mac)?,
        mtu: MTU,
        ipv4: Some(Inet { address: addresses.v4, prefix: 32, gateway: Some(addresses.gateway_v4) }),
        ipv6: addresses.v6.map(|address| Inet { address, prefix: 128, gateway: addresses.gateway_v6 }),
        gateway_mac: Some(mac(net::MacAddress::GATEWAY)?),
        dns: dns.to_vec(),
        search: Vec::new(),
        ack: Some((addresses.gateway_v4, ACK_PORT).into()),
    };
    section.check()?;
    Ok(section)
}

/// The section as commands of iproute2 or busybox, each as its arguments: no shell reads them.
fn commands(section: &Section) -> Vec<Vec<String>> {
    let mut lines = vec![
        format!("ip link set dev {CARD} down"),
        format!("ip link set dev {CARD} address {}", section.mac),
        format!("ip link set dev {CARD} mtu {}", section.mtu),
        format!("ip link set dev {CARD} up"),
    ];
    if let Some(inet) = &section.ipv4 {
        lines.push(format!("ip addr replace {}/{} dev {CARD}", inet.address, inet.prefix));
        if let Some(gateway) = inet.gateway {
            lines.push(format!("ip route replace {gateway} dev {CARD}"));
            lines.push(format!("ip route replace default via {gateway} dev {CARD}"));
        }
    }
    lines.iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

impl<'a> Handoff<'a> for NetworkHandoff<'a> {
    fn name(&self) -> &'static str {
        "network"
    }

    fn prepare(&mut self, draft: &mut Draft) -> Result<(), ForkError> {
        self.id = Some(draft.id.clone());
        let adopted = if draft.spare { self.network.adopt(&draft.id).map(Some) } else { Ok(None) };
        let link = match adopted {
            Ok(Some(link)) => link,
            Ok(None) => self.network.prepare(&draft.id, TAP).map_err(NetworkError::from)?,
            // Somebody removed what the spare had; it is of no use without.
            Err(_) => {
                self.network.remove(&draft.id).map_err(NetworkError::from)?;
                draft.spare = false;
                self.network.prepare(&draft.id, TAP).map_err(NetworkError::from)?
            }
        };
        // Guarded by its own drop until it is put here, by this value from here on.
        let addresses = link.record().addresses;
        if draft.spare {
            self.acks = Some(link.ack_socket().map_err(NetworkError::from)?);
        } else {
            let (tap, acks) = link.ends().map_err(NetworkError::from)?;
            (self.tap, self.acks) = (Some(tap), Some(acks));
        }
        self.link = Link::Closed(link);
        let section = section(&addresses, self.request.dns.as_deref().unwrap_or_default())?;
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
            troubles: std::mem::take(&mut self.troubles),
        });
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
