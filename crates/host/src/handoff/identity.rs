//! The handoff of who a fork is.

use std::time::{Duration, SystemTime};

use identity::{
    AckKey, Action, ClockNanos, Document, File, ForkId, ForkIdentity, ForkName, Limits, MailboxName,
    Network as Section, Secret, Tag,
    document::{ENTROPY_LEN, format_for},
};
use memory::Mailbox;
use store::Manifest;

use super::{Arrival, Draft, Handoff, Post};
use crate::{
    fork::{ForkError, random},
    record::{ForkRecord, StepTime},
    request::{ForkRequest, RequestError},
};

/// Least time for the identity's ack, and that of templates which do not say more. Applying takes milliseconds; services that restart at a fork take
/// what they take.
pub const IDENTITY_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for the identity's ack of a fork of this template.
pub(crate) fn ack_limit(manifest: &Manifest) -> Duration {
    Duration::from_millis(manifest.ack_limit_ms.into()).max(IDENTITY_TIMEOUT)
}

/// Everything that makes a fork itself, in one document.
#[derive(Debug)]
pub(crate) struct IdentityHandoff<'a> {
    request: &'a ForkRequest,
    mailbox: &'a Mailbox,
    template: &'a Tag,
    limit: Duration,
    identity: Option<ForkIdentity>,
    guest_steps: Vec<StepTime>,
}

impl<'a> IdentityHandoff<'a> {
    pub(crate) fn new(request: &'a ForkRequest, mailbox: &'a Mailbox, template: &'a Manifest) -> Self {
        let (template, limit) = (&template.tag, ack_limit(template));
        Self { request, mailbox, template, limit, identity: None, guest_steps: Vec::new() }
    }

    /// Whether the document of the fork with the longest name fits the mailbox: found out before any work.
    pub(crate) fn check_size(&self, network: Option<Section>) -> Result<(), ForkError> {
        let fork = self.identity_of(&ForkId::parse(&"0".repeat(20))?, &ForkName::parse(&"a".repeat(63))?)?;
        let document = self.document(fork, &AckKey::new([0; 32]), network)?;
        let (len, capacity) = (document.to_bytes().expose().len(), self.mailbox.capacity);
        if len > capacity { Err(RequestError::IdentityTooLong { len, capacity }.into()) } else { Ok(()) }
    }

    fn identity_of(&self, id: &ForkId, name: &ForkName) -> Result<ForkIdentity, ForkError> {
        Ok(ForkIdentity {
            id: id.clone(),
            hostname: name.clone(),
            name: name.clone(),
            template: self.template.clone(),
            machine_id: uuid4(random()?).replace('-', ""),
            boot_id: uuid4(random()?),
        })
    }

    fn document(&self, fork: ForkIdentity, ack_key: &AckKey, network: Option<Section>) -> Result<Document, ForkError> {
        let request = self.request;
        let files = request.files.iter().map(|(path, (content, mode))| File {
            path: path.clone(),
            mode: *mode,
            content: content.clone(),
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(Document {
            format: format_for(network.as_ref()),
            action: Action::Become,
            fork,
            labels: request.labels.clone(),
            env: request.env.clone(),
            secrets: request.secrets.clone(),
            files: files.collect(),
            wall_clock: ClockNanos(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
            entropy: Secret::new(random::<ENTROPY_LEN>()?.to_vec()),
            ack_key: ack_key.clone(),
            limits: Limits {
                pids: request.limits.pids,
                memory: request.limits.memory,
                cpu_millis: request.limits.cpu_millis,
            },
            network,
        })
    }
}

impl<'a> Handoff<'a> for IdentityHandoff<'a> {
    fn name(&self) -> &'static str {
        "identity"
    }

    fn prepare(&mut self, draft: &mut Draft) -> Result<(), ForkError> {
        self.identity = Some(self.identity_of(&draft.id, &draft.name)?);
        Ok(())
    }

    fn letters(&mut self, draft: &Draft, post: &mut Post<'a>) -> Result<(), ForkError> {
        let Some(identity) = self.identity.clone() else { return Ok(()) };
        let document = self.document(identity, &post.ack_key, draft.network.clone())?;
        post.add(self.mailbox, document.to_bytes(), Some(self.limit));
        Ok(())
    }

    fn after_resume(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        let received = arrival.waiter.wait_for(&MailboxName::identity(), arrival.stream)?;
        let clean = |text: &str| text.chars().filter(|character| !character.is_control()).take(64).collect();
        let steps = received.ack.steps.iter();
        self.guest_steps = steps
            .map(|step| StepTime { step: clean(&step.name), outcome: clean(&step.outcome), micros: step.micros })
            .collect();
        Ok(())
    }

    fn keep(&mut self, record: &mut ForkRecord) {
        if let Some(identity) = self.identity.take() {
            record.hostname = identity.hostname;
            record.machine_id = identity.machine_id;
            record.boot_id = identity.boot_id;
        }
        record.guest_steps = std::mem::take(&mut self.guest_steps);
    }
}

/// A version 4 UUID from 16 random bytes (RFC 9562, section 5.4).
fn uuid4(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let number = u128::from_be_bytes(bytes);
    let hex = format!("{number:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_have_version_and_variant() {
        let uuid = uuid4([0xff; 16]);
        assert_eq!(uuid, "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
