//! The handoff of what callers sent to mailboxes.

use std::collections::BTreeSet;

use identity::MailboxName;

use super::{Arrival, Draft, Handoff, Post};
use crate::{
    fork::ForkError,
    record::{ForkRecord, MailboxReport},
    request::Addressed,
};

/// All payloads of one fork.
#[derive(Debug)]
pub(crate) struct MailboxesHandoff<'a> {
    letters: &'a [Addressed<'a>],
    acknowledged: BTreeSet<MailboxName>,
}

impl<'a> MailboxesHandoff<'a> {
    pub(crate) fn new(letters: &'a [Addressed<'a>]) -> Self {
        Self { letters, acknowledged: BTreeSet::new() }
    }
}

impl<'a> Handoff<'a> for MailboxesHandoff<'a> {
    fn name(&self) -> &'static str {
        "mailboxes"
    }

    fn prepare(&mut self, _: &mut Draft) -> Result<(), ForkError> {
        Ok(())
    }

    fn letters(&mut self, _: &Draft, post: &mut Post<'a>) -> Result<(), ForkError> {
        for Addressed { mailbox, request } in self.letters {
            post.add(mailbox, request.payload.clone(), request.wait_ack.then(|| request.timeout()));
        }
        Ok(())
    }

    fn after_resume(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        for Addressed { mailbox, .. } in self.letters.iter().filter(|letter| letter.request.wait_ack) {
            arrival.waiter.wait_for(&mailbox.name, arrival.stream)?;
            self.acknowledged.insert(mailbox.name.clone());
        }
        Ok(())
    }

    fn keep(&mut self, record: &mut ForkRecord) {
        let report = |letter: &Addressed<'_>| MailboxReport {
            name: letter.mailbox.name.to_string(),
            acknowledged: letter.request.wait_ack.then(|| self.acknowledged.contains(&letter.mailbox.name)),
        };
        record.mailboxes = self.letters.iter().map(report).collect();
    }
}
