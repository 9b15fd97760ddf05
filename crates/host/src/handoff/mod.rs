//! What a fork is given over when it resumes: its network, its identity, what callers sent to its mailboxes.
//!
//! ```text
//! prepare ─► (machine loaded) ─► letters ─► (machine runs) ─► after_resume ─► keep ─► (record published)
//!    └───────────────┴──────────────┴──── any failure: close, in reverse order ──┘
//! ```
//!
//! Each is one implementation of [`Handoff`], all are in one list ([`Handoffs`]), and the list's end is their one teardown: whatever fails, and
//! wherever, everything that was prepared is closed. What a handoff makes outside of the guest registers its undo as it is made.

mod identity;
mod mailboxes;
pub mod network;

use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use ::identity::{AckKey, ForkId, ForkName, MailboxName, Network as Section, Secret};
use engine::{AckStream, Letter, NetworkEnd};
use memory::Mailbox;

pub(crate) use self::{
    identity::{IDENTITY_TIMEOUT, IdentityHandoff, ack_limit},
    mailboxes::MailboxesHandoff,
};
use crate::{acks::Waiter, fault, fork::ForkError, record::ForkRecord};

/// A fork that is being made, as far as its handoffs have to know it.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Its id.
    pub(crate) id: ForkId,
    /// Its name.
    pub(crate) name: ForkName,
    /// Whether its machine was started ahead of time, with what was prepared for it then.
    pub(crate) spare: bool,
    /// Who it is on the wire; none without a network.
    pub(crate) network: Option<Section>,
}

/// What a machine's network card is connected to.
#[derive(Debug)]
pub(crate) enum End {
    Tap(OwnedFd),
    Stream(OwnedFd),
}

impl End {
    pub(crate) fn as_network_end(&self) -> NetworkEnd<'_> {
        match self {
            Self::Tap(tap) => NetworkEnd::Tap(tap.as_fd()),
            Self::Stream(socket) => NetworkEnd::Stream(socket.as_fd()),
        }
    }
}

/// What goes into the fork's memory.
#[derive(Debug)]
pub(crate) struct Post<'a> {
    /// All keys of acks are made of this one.
    pub(crate) ack_key: AckKey,
    identity: Option<Letter<'a>>,
    others: Vec<Letter<'a>>,
    wanted: Vec<(MailboxName, Duration)>,
    keys: BTreeMap<MailboxName, AckKey>,
}

impl<'a> Post<'a> {
    pub(crate) fn new(ack_key: AckKey) -> Self {
        Self { ack_key, identity: None, others: Vec::new(), wanted: Vec::new(), keys: BTreeMap::new() }
    }

    /// Adds a letter; with `wait`, it must be acknowledged within that time of the resume.
    fn add(&mut self, mailbox: &'a Mailbox, payload: Secret, wait: Option<Duration>) {
        let name = &mailbox.name;
        let ack_key = self.ack_key.for_mailbox(name);
        self.keys.insert(name.clone(), ack_key.clone());
        self.wanted.extend(wait.map(|limit| (name.clone(), limit)));
        let letter = Letter { mailbox, payload, ack_key };
        if *name == MailboxName::identity() { self.identity = Some(letter) } else { self.others.push(letter) }
    }

    /// The identity's letter, the others, and who waits for their acks. `None` without an identity.
    pub(crate) fn close(self, fork: &ForkId) -> Option<(Letter<'a>, Vec<Letter<'a>>, Waiter)> {
        let mut waiter = Waiter::new(fork.clone(), self.keys);
        self.wanted.into_iter().for_each(|(mailbox, limit)| waiter.want(mailbox, limit));
        Some((self.identity?, self.others, waiter))
    }
}

/// A fork that runs and has not been published yet.
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    /// What it has acknowledged so far.
    pub(crate) waiter: Waiter,
    /// Its ack port.
    pub(crate) stream: &'a AckStream,
    /// Its directory, where its control channels are.
    pub(crate) dir: &'a Path,
    /// Its id.
    pub(crate) id: &'a ForkId,
    /// When its network was acknowledged and open, if that was awaited.
    pub(crate) connected: Option<Instant>,
}

/// One thing that a fork is given over.
pub(crate) trait Handoff<'a>: std::fmt::Debug {
    /// For messages and tests.
    fn name(&self) -> &'static str;

    /// Makes what has to be there before the machine is.
    fn prepare(&mut self, draft: &mut Draft) -> Result<(), ForkError>;

    /// What a machine's network card is to be connected to. Asked for whenever a machine is started.
    fn end(&mut self) -> Result<Option<End>, ForkError> {
        Ok(None)
    }

    /// What goes into the fork's memory, at the last moment before it does.
    fn letters(&mut self, draft: &Draft, post: &mut Post<'a>) -> Result<(), ForkError> {
        let _ = (draft, post);
        Ok(())
    }

    /// The fork runs: waits for what it has to say, and does what may be done only now.
    fn after_resume(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError>;

    /// From now on the fork's record is all there is to find its parts by.
    fn keep(&mut self, record: &mut ForkRecord) {
        let _ = record;
    }

    /// The fork is published.
    fn published(&mut self) {}

    /// Undoes what there is, kept or not.
    fn close(&mut self) {}
}

/// All handoffs of one fork. They are closed with this value, in reverse order, unless it is released.
#[derive(Debug)]
pub(crate) struct Handoffs<'a> {
    list: Vec<Box<dyn Handoff<'a> + 'a>>,
    released: bool,
}

impl<'a> Handoffs<'a> {
    /// In the order in which they are prepared and awaited.
    pub(crate) fn new(list: Vec<Box<dyn Handoff<'a> + 'a>>) -> Self {
        Self { list, released: false }
    }

    pub(crate) fn prepare(&mut self, draft: &mut Draft) -> Result<(), ForkError> {
        for handoff in &mut self.list {
            handoff.prepare(draft)?;
            point(handoff.name(), "prepared")?;
        }
        Ok(())
    }

    pub(crate) fn end(&mut self) -> Result<Option<End>, ForkError> {
        for handoff in &mut self.list {
            if let Some(end) = handoff.end()? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    pub(crate) fn letters(&mut self, draft: &Draft, post: &mut Post<'a>) -> Result<(), ForkError> {
        for handoff in &mut self.list {
            handoff.letters(draft, post)?;
            point(handoff.name(), "written")?;
        }
        Ok(())
    }

    pub(crate) fn after_resume(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        for handoff in &mut self.list {
            handoff.after_resume(arrival)?;
            point(handoff.name(), "arrived")?;
        }
        Ok(())
    }

    pub(crate) fn keep(&mut self, record: &mut ForkRecord) {
        self.list.iter_mut().for_each(|handoff| handoff.keep(record));
    }

    /// The fork is published: it is for whoever ends it to close them.
    pub(crate) fn release(mut self) {
        self.released = true;
        self.list.iter_mut().for_each(|handoff| handoff.published());
    }
}

impl Drop for Handoffs<'_> {
    fn drop(&mut self) {
        if !self.released {
            self.list.iter_mut().rev().for_each(|handoff| handoff.close());
        }
    }
}

fn point(name: &str, step: &str) -> Result<(), ForkError> {
    let state = |source| ForkError::State { step: "a handoff", source };
    fault::point(&format!("handoff.{name}.{step}"), None).map_err(state)
}
