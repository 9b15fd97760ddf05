//! A guest's network: given to a fork before its thaw, taken from a template before its capture.
//!
//! ```text
//! capture   connections end ─ card down ─ addresses go ─ looked whether any is left
//! fork      card: MAC, MTU, up ─ addresses ─ gateway's card ─ default routes   (one datagram to the kernel)
//!           announced (ARP, neighbour advertisement) ─ resolv.conf
//! ack       as a datagram too, until it is confirmed
//! ```
//!
//! What the capture takes, no fork has to look for: its way to the ack has no list of sockets or neighbours in it.

mod ack;
mod announce;
mod card;
mod connections;
mod netlink;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use identity::Network as Section;
use thiserror::Error;

pub use self::{
    ack::{AckSender, Letter, Outcome},
    card::Card,
    netlink::NetlinkError,
};
use self::{announce::Announcer, netlink::Socket};

/// Where programs look for their DNS servers.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Why a network was not applied.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// There is nothing to apply it to.
    #[error("the machine has no virtio network card")]
    NoCard,
    /// The kernel refused something.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// It could not be announced.
    #[error("announcing the addresses: {0}")]
    Announce(#[source] io::Error),
}

/// The guest's network. Its sockets belong to the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Network(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    route: Socket,
    announcer: Announcer,
    card: Option<Card>,
    /// What was applied last; what a fork was not given, it has not.
    applied: Option<Section>,
    /// The capture left the source of a branch its connections.
    connections_kept: bool,
    /// The card's MAC address when its template was captured.
    captured_mac: Option<[u8; 6]>,
}

/// What a capture did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quieted {
    /// Whether there is a card.
    pub card: bool,
    /// Connections that were ended.
    pub ended: usize,
}

impl Network {
    /// Opens what is needed later.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        let (route, announcer) = (Socket::route()?, Announcer::open());
        Ok(Self(Mutex::new(Inner {
            route,
            announcer,
            card: None,
            applied: None,
            connections_kept: false,
            captured_mac: None,
        })))
    }

    /// Whether there is a card, looked for anew if none is known: a driver may take its time.
    #[must_use]
    pub fn has_card(&self) -> bool {
        self.lock().find().is_some()
    }

    /// Uses this card: for tests, whose cards are not virtio's.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn use_card(&self, name: &str) -> io::Result<()> {
        let mut inner = self.lock();
        let index = inner.route.index_of(name)?;
        inner.card = Some(Card { name: name.to_owned(), index });
        Ok(())
    }

    /// What was applied last.
    #[must_use]
    pub fn applied(&self) -> Option<Section> {
        self.lock().applied.clone()
    }

    /// Before a capture: no address, no connection that has one, card down. `end_connections` is for a template; the source of a branch keeps
    /// its own, and [`take_on`](Self::take_on) ends them in the forks.
    ///
    /// # Errors
    /// Something is left. The caller calls [`restore`](Self::restore).
    pub fn quiesce(&self, end_connections: bool) -> Result<Quieted, NetworkError> {
        let mut inner = self.lock();
        let Some(card) = inner.find().cloned() else { return Ok(Quieted { card: false, ended: 0 }) };
        card.silence()?;
        let mut ended = 0;
        // The other side is told while the card is up; what came in meanwhile ends when nothing can come any more.
        let had_address = inner.has_address(&card)?;
        if end_connections {
            ended += inner.end_connections(&card, had_address)?;
        }
        card.down(&mut inner.route)?;
        if end_connections {
            ended += inner.end_connections(&card, had_address)?;
            card.forget_groups(&mut inner.route)?;
            card.silence()?;
            inner.captured_mac = card.mac(&mut inner.route)?;
        }
        card.clear(&mut inner.route, None)?;
        inner.connections_kept = !end_connections && had_address;
        Ok(Quieted { card: true, ended })
    }

    /// Addresses whose connections the capture of a template leaves as they are, besides those of the loopback; `None` where there is no card, so that it
    /// ends none.
    ///
    /// # Errors
    /// The kernel can not list addresses.
    pub fn staying_addresses(&self) -> Result<Option<BTreeSet<std::net::IpAddr>>, NetworkError> {
        let mut inner = self.lock();
        let Some(card) = inner.find().cloned() else { return Ok(None) };
        Ok(Some(inner.addresses_elsewhere(&card)?))
    }

    /// Gives back what a capture took, for who goes on as before.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn restore(&self) -> Result<(), NetworkError> {
        let mut inner = self.lock();
        inner.connections_kept = false;
        match inner.applied.clone() {
            Some(section) => inner.put_on(&section).map(drop),
            None => Ok(()),
        }
    }

    /// Takes back what [`take_on`](Self::take_on) has done: the card is as the capture of its template left it.
    ///
    /// # Errors
    /// Something is left.
    pub fn take_back(&self) -> Result<(), NetworkError> {
        let mut inner = self.lock();
        let (Some(_), Some(card)) = (inner.applied.take(), inner.card.clone()) else { return Ok(()) };
        card.down(&mut inner.route)?;
        card.forget_groups(&mut inner.route)?;
        card.silence()?;
        card.clear(&mut inner.route, None)?;
        match inner.captured_mac {
            Some(mac) => Ok(card.set_mac(&mut inner.route, mac)?),
            None => Ok(()),
        }
    }

    /// Takes on a fork's network, or that it has none. Answers with what was done.
    ///
    /// # Errors
    /// What was not done; the card may then have a part of it. It may be tried again.
    pub fn take_on(&self, section: Option<&Section>) -> Result<&'static str, NetworkError> {
        let mut inner = self.lock();
        inner.applied = section.cloned();
        if std::mem::take(&mut inner.connections_kept)
            && let Some(card) = inner.card.clone()
        {
            // Another's: a branch is not its source.
            let kept = inner.addresses_elsewhere(&card)?;
            connections::end(&kept)?;
            // So are its groups, which the source went on being in.
            card.forget_groups(&mut inner.route)?;
            card.silence()?;
        }
        match section {
            Some(section) => inner.put_on(section),
            None => Ok("none"),
        }
    }

    /// Applies a section again, or another one: what the card has and the section has not is removed. What is right already is left as it is.
    ///
    /// # Errors
    /// What was not done.
    pub fn reconfigure(&self, section: &Section) -> Result<&'static str, NetworkError> {
        let mut inner = self.lock();
        let card = inner.find().cloned().ok_or(NetworkError::NoCard)?;
        card.silence()?;
        card.clear(&mut inner.route, Some(section))?;
        inner.applied = Some(section.clone());
        inner.put_on(section)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn find(&mut self) -> Option<&Card> {
        if self.card.is_none() {
            self.card = Card::find();
        }
        self.card.as_ref()
    }

    fn put_on(&mut self, section: &Section) -> Result<&'static str, NetworkError> {
        let card = self.card.as_ref().ok_or(NetworkError::NoCard)?;
        card.take_on(&mut self.route, section)?;
        self.announcer.announce(card.index, section).map_err(NetworkError::Announce)
    }

    /// Ends what has an address of the card. A kernel that can not say what there is will do where the card has none; where it has, that
    /// is an error.
    fn end_connections(&mut self, card: &Card, had_address: bool) -> Result<usize, NetlinkError> {
        match connections::end(&self.addresses_elsewhere(card)?) {
            Err(_) if !had_address => Ok(0),
            ended => ended,
        }
    }

    fn has_address(&mut self, card: &Card) -> Result<bool, NetlinkError> {
        Ok(card::addresses(&mut self.route)?.iter().any(|assigned| assigned.index == card.index))
    }

    /// Addresses of the guest's other cards: connections between them never leave it.
    fn addresses_elsewhere(&mut self, card: &Card) -> Result<BTreeSet<std::net::IpAddr>, NetlinkError> {
        let elsewhere = card::addresses(&mut self.route)?.into_iter().filter(|assigned| assigned.index != card.index);
        Ok(elsewhere.map(|assigned| assigned.address).collect())
    }
}

/// What stands in [`RESOLV_CONF`].
#[must_use]
pub fn resolv_conf(section: &Section) -> String {
    let mut text = String::with_capacity(256);
    for server in &section.dns {
        for part in ["nameserver ", &server.to_string(), "\n"] {
            text.push_str(part);
        }
    }
    if !section.search.is_empty() {
        text.push_str("search");
        for domain in &section.search {
            text.push(' ');
            text.push_str(domain);
        }
        text.push('\n');
    }
    text
}
