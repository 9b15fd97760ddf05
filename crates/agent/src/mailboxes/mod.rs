//! Mailboxes of guest software: planted by the agent for a program that asks on the local socket, or announced by a
//! program that planted its own. `docs/mailbox.md` tells how to use them.

pub mod protocol;
pub mod socket;

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use identity::{
    Ack, AckKey, ForkId, MailboxName, Secret, Stage,
    mailbox::{MAX_CALLER_MAILBOXES, Nonce},
};

use self::{protocol::Refusal, socket::Writer};
use crate::{
    console,
    keeper::{Pages, Planted, fresh_nonce},
    state::AgentState,
};

/// How long the host may take to read an ack.
const ACK_DEADLINE: Duration = Duration::from_secs(30);

/// The mailboxes of guest software, at most 16 of them.
#[derive(Debug, Default)]
pub struct Mailboxes {
    list: Mutex<Vec<Mailbox>>,
}

/// Which connection a mailbox belongs to; it goes with it.
pub(crate) type Owner = u64;

#[derive(Debug)]
struct Mailbox {
    owner: Owner,
    name: MailboxName,
    capacity: usize,
    kind: Kind,
    /// What the program has been told of and has not answered yet.
    unanswered: Option<Unanswered>,
}

#[derive(Debug)]
enum Kind {
    Socket { pages: Pages, token: Vec<u8>, writer: Arc<Writer> },
    Own { nonce: Nonce },
}

#[derive(Debug)]
struct Unanswered {
    fork: ForkId,
    key: AckKey,
}

/// A payload that has come for a program, on its way from the page to the program.
#[derive(Debug)]
pub(crate) struct Taken {
    name: MailboxName,
    payload: Secret,
    key: AckKey,
}

impl Mailboxes {
    pub(crate) fn plant(
        &self,
        owner: Owner,
        name: MailboxName,
        capacity: usize,
        token: Vec<u8>,
        writer: Arc<Writer>,
    ) -> Result<(), Refusal> {
        let pages = Pages::new(capacity).map_err(|_| Refusal::NoMemory)?;
        self.add(Mailbox { owner, name, capacity, kind: Kind::Socket { pages, token, writer }, unanswered: None })
    }

    pub(crate) fn announce(
        &self,
        owner: Owner,
        name: MailboxName,
        capacity: usize,
        nonce: Nonce,
    ) -> Result<(), Refusal> {
        // A program that arms anew announces anew.
        self.lock().retain(|m| !(m.owner == owner && m.name == name && matches!(m.kind, Kind::Own { .. })));
        self.add(Mailbox { owner, name, capacity, kind: Kind::Own { nonce }, unanswered: None })
    }

    fn add(&self, mailbox: Mailbox) -> Result<(), Refusal> {
        let mut list = self.lock();
        if mailbox.name.is_reserved() {
            return Err(Refusal::Reserved);
        }
        if list.iter().any(|other| other.name == mailbox.name) {
            return Err(Refusal::Duplicate);
        }
        if list.len() >= MAX_CALLER_MAILBOXES {
            return Err(Refusal::TooMany);
        }
        list.push(mailbox);
        Ok(())
    }

    /// Arms every mailbox that the agent planted, each with a fresh nonce; answers with all.
    pub(crate) fn arm(&self) -> io::Result<Vec<Planted>> {
        let arm = |mailbox: &mut Mailbox| {
            // An answer that is still owed is owed by the fork before, with a key that this capture must not carry.
            mailbox.unanswered = None;
            let (nonce, planted_by) = match &mut mailbox.kind {
                Kind::Own { nonce } => (*nonce, "self"),
                Kind::Socket { pages, token, .. } => {
                    let nonce = fresh_nonce()?;
                    pages.arm(&mailbox.name, token, nonce, mailbox.capacity).map_err(io::Error::other)?;
                    (nonce, "socket")
                }
            };
            Ok(Planted { name: mailbox.name.clone(), nonce, capacity: mailbox.capacity, planted_by })
        };
        self.lock().iter_mut().map(arm).collect()
    }

    /// Takes the payloads that have come, and wipes them from the pages.
    pub(crate) fn take(&self) -> Vec<Taken> {
        let mut taken = Vec::new();
        for mailbox in self.lock().iter_mut() {
            let Kind::Socket { pages, .. } = &mut mailbox.kind else { continue };
            match pages.take() {
                Ok(Some((payload, key))) => taken.push(Taken { name: mailbox.name.clone(), payload, key }),
                Ok(None) => {}
                // Without the page there is no key to sign an answer with; the host's deadline tells its caller.
                Err(error) => console::warn(&format!("mailbox {}: {error}", mailbox.name)),
            }
        }
        taken
    }

    /// Tells the programs, once the workload runs. What can not be delivered is answered as failed.
    pub(crate) fn deliver(&self, state: &Arc<AgentState>, fork: &ForkId, taken: Vec<Taken>) {
        for Taken { name, payload, key } in taken {
            let event = protocol::filled(&name, fork, payload.expose());
            drop(payload);
            let mut list = self.lock();
            let Some(mailbox) = list.iter_mut().find(|mailbox| mailbox.name == name) else { continue };
            let Kind::Socket { writer, .. } = &mailbox.kind else { continue };
            let writer = Arc::clone(writer);
            let owner = mailbox.owner;
            mailbox.unanswered = Some(Unanswered { fork: fork.clone(), key });
            drop(list);
            let failure = match event {
                None => Some("the payload is no JSON object"),
                Some(event) => writer.send(event.expose()).err().map(|_| "the program does not read its connection"),
            };
            if let Some(reason) = failure {
                // Refused only if the program has gone meanwhile, which has been answered then.
                let _ = self.answer(state, owner, Some(&name), Some(reason.to_owned()));
            }
        }
    }

    /// A program's answer: signs it, and sends it to the host.
    pub(crate) fn answer(
        &self,
        state: &Arc<AgentState>,
        owner: Owner,
        name: Option<&MailboxName>,
        reason: Option<String>,
    ) -> Result<(), Refusal> {
        let (name, unanswered) = {
            let mut list = self.lock();
            let mut open = list.iter_mut().filter(|mailbox| {
                mailbox.owner == owner && mailbox.unanswered.is_some() && name.is_none_or(|name| mailbox.name == *name)
            });
            let mailbox = open.next().ok_or(Refusal::NothingToAnswer)?;
            if open.next().is_some() {
                return Err(Refusal::Ambiguous);
            }
            (mailbox.name.clone(), mailbox.unanswered.take().ok_or(Refusal::NothingToAnswer)?)
        };
        let stage = if reason.is_some() { Stage::Failed } else { Stage::Applied };
        let ack = Ack { stage, mailbox: name, fork: unanswered.fork, steps: Vec::new(), reason };
        let line = ack.to_line(&unanswered.key);
        state.keeper().send_ack(&line, Instant::now() + ACK_DEADLINE).map_err(|_| Refusal::HostAway)
    }

    /// The connection is gone, and its mailboxes with it.
    pub(crate) fn remove(&self, state: &Arc<AgentState>, owner: Owner) {
        while self.answer_any(state, owner) {}
        self.lock().retain(|mailbox| mailbox.owner != owner);
    }

    fn answer_any(&self, state: &Arc<AgentState>, owner: Owner) -> bool {
        let name = self.lock().iter().find(|m| m.owner == owner && m.unanswered.is_some()).map(|m| m.name.clone());
        name.is_some_and(|name| {
            let reason = "the program closed its connection and did not answer".to_owned();
            self.answer(state, owner, Some(&name), Some(reason)).is_ok()
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Mailbox>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn name(text: &str) -> MailboxName {
        MailboxName::parse(text).unwrap()
    }

    fn plant(mailboxes: &Mailboxes, owner: Owner, text: &str) -> Result<(), Refusal> {
        let (writer, _) = std::os::unix::net::UnixStream::pair().unwrap();
        mailboxes.plant(owner, name(text), 100, Vec::new(), Arc::new(Writer::new(writer)))
    }

    #[test]
    fn i5_reserved_and_doubled_names_and_a_seventeenth_mailbox_are_refused() {
        let mailboxes = Mailboxes::default();
        assert_eq!(plant(&mailboxes, 0, "offshoot:identity"), Err(Refusal::Reserved));
        for index in 0..16 {
            plant(&mailboxes, index, &format!("app:{index}")).unwrap();
        }
        assert_eq!(plant(&mailboxes, 99, "app:0"), Err(Refusal::Duplicate));
        assert_eq!(plant(&mailboxes, 99, "app:16"), Err(Refusal::TooMany));
        assert_eq!(mailboxes.announce(99, name("app:0"), 1, [1; 16]), Err(Refusal::Duplicate));
    }

    #[test]
    fn i4_every_arming_lists_all_mailboxes_with_fresh_nonces() {
        let mailboxes = Mailboxes::default();
        plant(&mailboxes, 1, "a").unwrap();
        mailboxes.announce(2, name("b"), 77, [9; 16]).unwrap();
        mailboxes.announce(2, name("b"), 78, [8; 16]).unwrap();
        let (first, second) = (mailboxes.arm().unwrap(), mailboxes.arm().unwrap());
        assert_ne!(first[0].nonce, second[0].nonce);
        assert_eq!((first[0].planted_by, first[0].capacity), ("socket", 100));
        assert_eq!((first[1].planted_by, first[1].capacity, first[1].nonce), ("self", 78, [8; 16]));
    }
}
