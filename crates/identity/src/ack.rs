//! The ack: one line of `key=value` fields with which a fork answers.
//!
//! ```text
//! offshoot-ack v=1 stage=applied mailbox=offshoot:identity fork=0123456789abcdef0123 steps=clock:set:41,entropy:credited:230 hmac=…
//! ```
//!
//! Fields are separated by single spaces; a key stands at most once; `hmac`, the lower-case hexadecimal HMAC-SHA256 of
//! everything before ` hmac=`, is last. Values are printable ASCII without space and `=`; other bytes of a value are
//! written as `%XX`. The key of a mailbox is [`AckKey::for_mailbox`]. A line is at most [`MAX_LINE`] bytes. It is
//! parsed as fields and compared as fields: `mailbox=foobar` is no answer for `foo`.
//!
//! Over a network the same line travels in one datagram ([`Ack::to_datagram`]), of at most [`MAX_DATAGRAM`] bytes: without `steps`, and with a reason
//! cut short. It is sent again until it is confirmed:
//!
//! ```text
//! offshoot-ack-confirmed v=1 of=<the ack's hmac> hmac=…
//! ```
//!
//! There is exactly one confirmation of an ack ([`confirmation`]), signed with the same key; nothing else is one.

use thiserror::Error;

use crate::{
    key::AckKey,
    name::{ForkId, MailboxName},
};

/// Longest ack line, in bytes, without its newline.
pub const MAX_LINE: usize = 4096;

/// Longest ack in a datagram, in bytes: with every header it is below the packet size of every link, so it is never in two pieces.
pub const MAX_DATAGRAM: usize = 1024;

const PREFIX: &str = "offshoot-ack v=1";
const CONFIRMED: &str = "offshoot-ack-confirmed v=1 of=";

/// How far the guest got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Everything was applied.
    Applied,
    /// Everything up to the network was applied, and that was not: the workload stays frozen until the host has it applied again, or a
    /// deadline passes. It is no end: `applied` or `failed` follows.
    NetworkPending,
    /// Everything was done but the thaw, and is put back now: a rehearsal. It is no end either: the guest says when it waits again.
    Rehearsed,
    /// A step failed. If it was one before the thaw, nothing of the workload has run; SSH host keys, services and the runtime come after it.
    Failed,
}

impl Stage {
    /// The stage as it stands in the line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::NetworkPending => "network-pending",
            Self::Rehearsed => "rehearsed",
            Self::Failed => "failed",
        }
    }
}

/// One step of applying an identity: what was refreshed, by what means, and how long it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What was refreshed: `clock`, `entropy`, `hostname`…
    pub name: String,
    /// What was really done: `set`, `credited+reseeded`, `absent`…
    pub outcome: String,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// An ack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// How far the guest got.
    pub stage: Stage,
    /// The mailbox this answers for.
    pub mailbox: MailboxName,
    /// The fork that answers.
    pub fork: ForkId,
    /// What was done, in order.
    pub steps: Vec<Step>,
    /// Why it failed, for [`Stage::Failed`] and [`Stage::NetworkPending`].
    pub reason: Option<String>,
}

/// Why a line is no valid ack. The line itself, which a hostile guest wrote, is not repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AckError {
    /// Longer than [`MAX_LINE`].
    #[error("the ack is longer than {MAX_LINE} bytes")]
    TooLong,
    /// Not an ack of this version.
    #[error("the line is not an ack of version 1")]
    NotAnAck,
    /// A field is malformed, unknown, doubled or absent.
    #[error("the ack's field {0} is malformed, doubled or absent")]
    Field(&'static str),
    /// The HMAC does not match.
    #[error("the ack is not signed with this fork's key")]
    Forged,
}

impl Ack {
    /// The line for this ack, signed, without newline. `key` is the mailbox's key ([`AckKey::for_mailbox`]).
    ///
    /// Steps are kept, and the reason is cut, such that the line stays within [`MAX_LINE`].
    #[must_use]
    pub fn to_line(&self, key: &AckKey) -> String {
        self.line(key, &self.steps, 200)
    }

    /// The line for a datagram: without steps, at most [`MAX_DATAGRAM`] bytes.
    #[must_use]
    pub fn to_datagram(&self, key: &AckKey) -> String {
        self.line(key, &[], 60)
    }

    fn line(&self, key: &AckKey, steps: &[Step], reason_chars: usize) -> String {
        // Put together by hand: a fork's agent does this, where the code of formatting is cold.
        let mut line = String::with_capacity(1024);
        for text in
            [PREFIX, " stage=", self.stage.as_str(), " mailbox=", self.mailbox.as_str(), " fork=", self.fork.as_str()]
        {
            line.push_str(text);
        }
        let mut before = " steps=";
        for step in steps {
            let start = line.len();
            line.push_str(before);
            encode(&step.name, &mut line);
            line.push(':');
            encode(&step.outcome, &mut line);
            line.push(':');
            line.push_str(&step.micros.to_string());
            if line.len() > MAX_LINE - 1024 {
                line.truncate(start);
                break;
            }
            before = ",";
        }
        if let Some(reason) = &self.reason {
            let short: String = reason.chars().take(reason_chars).collect();
            let mut text = String::new();
            encode(&short, &mut text);
            text.truncate(text.len().min(900));
            // Do not leave half an escape at the end.
            if let Some(at) = text.rfind('%').filter(|&at| at + 3 > text.len()) {
                text.truncate(at);
            }
            line.push_str(" reason=");
            line.push_str(&text);
        }
        sign(&mut line, key);
        line
    }

    /// Parses a line (without newline) and checks its signature with the mailbox's key, which `key_of` finds.
    ///
    /// # Errors
    /// [`AckError`]; a line for a mailbox that `key_of` does not know is [`AckError::Forged`].
    pub fn parse(line: &[u8], key_of: impl FnOnce(&MailboxName) -> Option<AckKey>) -> Result<Self, AckError> {
        if line.len() > MAX_LINE {
            return Err(AckError::TooLong);
        }
        let line = str::from_utf8(line).map_err(|_| AckError::NotAnAck)?;
        let fields = line.strip_prefix(PREFIX).ok_or(AckError::NotAnAck)?;
        let (fields, tag) = fields.rsplit_once(" hmac=").ok_or(AckError::Field("hmac"))?;
        let signed = &line[..PREFIX.len() + fields.len()];

        let (mut stage, mut mailbox, mut fork, mut steps, mut reason) = (None, None, None, None, None);
        let mut rest = fields.split(' ');
        if rest.next() != Some("") {
            return Err(AckError::NotAnAck);
        }
        for field in rest {
            let (key, value) = field.split_once('=').ok_or(AckError::Field("(no '=')"))?;
            let doubled = match key {
                "stage" => stage.replace(parse_stage(value)?).is_some(),
                "mailbox" => {
                    let name = MailboxName::parse(value).map_err(|_| AckError::Field("mailbox"))?;
                    mailbox.replace(name).is_some()
                }
                "fork" => fork.replace(ForkId::parse(value).map_err(|_| AckError::Field("fork"))?).is_some(),
                "steps" => steps.replace(parse_steps(value)?).is_some(),
                "reason" => reason.replace(decode(value).ok_or(AckError::Field("reason"))?).is_some(),
                _ => return Err(AckError::Field("(unknown)")),
            };
            if doubled {
                return Err(AckError::Field("(doubled)"));
            }
        }
        let ack = Self {
            stage: stage.ok_or(AckError::Field("stage"))?,
            mailbox: mailbox.ok_or(AckError::Field("mailbox"))?,
            fork: fork.ok_or(AckError::Field("fork"))?,
            steps: steps.unwrap_or_default(),
            reason,
        };
        let tag = unhex(tag).ok_or(AckError::Field("hmac"))?;
        let key = key_of(&ack.mailbox).ok_or(AckError::Forged)?;
        if key.verify(signed.as_bytes(), &tag) { Ok(ack) } else { Err(AckError::Forged) }
    }
}

/// The one confirmation of an ack, signed with the same key. `None` if `line` does not end as an ack does; whether it is a good one is for
/// [`Ack::parse`] to say.
#[must_use]
pub fn confirmation(line: &[u8], key: &AckKey) -> Option<String> {
    let line = str::from_utf8(line).ok()?;
    let (_, tag) = line.rsplit_once(" hmac=")?;
    unhex(tag)?;
    let mut confirmation = [CONFIRMED, tag].concat();
    sign(&mut confirmation, key);
    Some(confirmation)
}

fn sign(line: &mut String, key: &AckKey) {
    let tag = key.sign(line.as_bytes());
    line.push_str(" hmac=");
    tag.iter().for_each(|&byte| push_hex(byte, b"0123456789abcdef", line));
}

fn parse_stage(value: &str) -> Result<Stage, AckError> {
    [Stage::Applied, Stage::NetworkPending, Stage::Rehearsed, Stage::Failed]
        .into_iter()
        .find(|stage| stage.as_str() == value)
        .ok_or(AckError::Field("stage"))
}

fn parse_steps(value: &str) -> Result<Vec<Step>, AckError> {
    let step = |text: &str| {
        let mut parts = text.split(':');
        let (name, outcome, micros) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || name.is_empty() || outcome.is_empty() {
            return None;
        }
        Some(Step { name: decode(name)?, outcome: decode(outcome)?, micros: micros.parse().ok()? })
    };
    value.split(',').map(step).collect::<Option<_>>().ok_or(AckError::Field("steps"))
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'=' | b'%' | b',' | b':')
}

fn encode(text: &str, into: &mut String) {
    for byte in text.bytes() {
        if is_plain(byte) {
            into.push(char::from(byte));
        } else {
            into.push('%');
            push_hex(byte, b"0123456789ABCDEF", into);
        }
    }
}

fn push_hex(byte: u8, digits: &[u8; 16], into: &mut String) {
    for digit in [byte >> 4, byte & 15] {
        into.push(char::from(digits[usize::from(digit)]));
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let (high, low) = (rest.next()?, rest.next()?);
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                bytes.push(digit(high)? << 4 | digit(low)?);
            }
            byte if is_plain(byte) => bytes.push(byte),
            _ => return None,
        }
    }
    // A reason is cut at a byte, perhaps inside a character.
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if text.len() != 64 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    (0..64).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}
