//! Rehearsals: a spare machine applies an identity once, all but the thaw, before it is set aside.
//!
//! Most of a fork's way to its ack is code that runs for the first time in its machine's process: under emulation all of it has to be
//! translated. A machine that has rehearsed has done that. Its guest has put everything back and waits with the same mailbox; of its workload
//! nobody has run (docs/identity.md).

use std::{
    io,
    time::{Duration, Instant, SystemTime},
};

use engine::{AckStream, Rehearsal, RehearseError, SpareVm};
use identity::{
    Ack, AckKey, Action, ClockNanos, Document, ForkId, ForkIdentity, ForkName, Limits, MailboxName, Network as Section,
    Secret, Stage,
    document::{ENTROPY_LEN, format_for},
};
use store::Manifest;
use thiserror::Error;

use crate::{
    acks,
    build::ARMED,
    fault,
    fork::{ForkError, random},
};

/// Time for a rehearsal, which takes some hundred milliseconds of an idle machine.
const LIMIT: Duration = Duration::from_secs(30);
/// Most bytes that a guest says in one: an ack, and that it is armed, fit many times.
const MAX_BYTES: usize = 64 << 10;

/// Who a guest is in a rehearsal. Fixed, so that it is known wherever it should turn up: no fork has any of it. The name is as long as a name
/// can be, so that no fork's is the first that needs so much room.
const NAME: &str = "rehearsal-of-the-fork-that-is-still-to-come-and-has-no-name-yet";
const ID: &str = "0ff50ff50ff50ff50ff5";
const MACHINE_ID: &str = "0ff50ff50ff50ff50ff50ff50ff50ff5";
const BOOT_ID: &str = "0ff50ff5-0ff5-40ff-80ff-0ff50ff50ff5";

/// Why a spare machine did not rehearse. It is gone.
#[derive(Debug, Error)]
pub enum RehearsalError {
    /// Its letter could not be made.
    #[error(transparent)]
    Letter(#[from] ForkError),
    /// The template has no mailbox for it.
    #[error("the template has no identity mailbox; build it again")]
    NoMailbox,
    /// The machine could not be run, or stopped again.
    #[error(transparent)]
    Machine(#[from] RehearseError),
    /// The guest says that a step failed.
    #[error("the guest failed: {0}; build the template again")]
    Guest(String),
    /// It did not say that it is done.
    #[error("the guest was not done within {} ms", limit.as_millis())]
    Late {
        /// The deadline.
        limit: Duration,
    },
    /// The machine ended.
    #[error("its machine ended")]
    Ended,
    /// It said more than there is to say.
    #[error("the guest flooded its ack channel")]
    Flood,
    /// Its ack port broke, or a test made the step fail.
    #[error("its ack channel failed")]
    Stream(#[source] io::Error),
}

/// Has a spare machine rehearse, with what it will have of a network.
///
/// # Errors
/// [`RehearsalError`].
pub(crate) fn rehearse(
    spare: SpareVm,
    manifest: &Manifest,
    network: Option<Section>,
) -> Result<SpareVm, RehearsalError> {
    let mailbox = manifest.mailboxes.iter().find(|mailbox| mailbox.name.as_str() == MailboxName::IDENTITY);
    let mailbox = mailbox.ok_or(RehearsalError::NoMailbox)?;
    let document = document(manifest, network)?;
    let key = document.ack_key.for_mailbox(&mailbox.name);
    let rehearsal = Rehearsal::of(mailbox, &document).ok_or(RehearsalError::NoMailbox)?;
    let process = spare.process().clone();
    spare.rehearse(&rehearsal, |stream| {
        fault::point("pool.rehearsing", Some(&process)).map_err(RehearsalError::Stream)?;
        wait_until_it_waits(stream, &document.fork.id, &key, LIMIT)
    })
}

/// An identity with nothing in it that anybody gave, and with randomness of its own.
fn document(manifest: &Manifest, network: Option<Section>) -> Result<Document, ForkError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(Document {
        format: format_for(network.as_ref()),
        action: Action::Rehearse,
        fork: ForkIdentity {
            id: ForkId::parse(ID)?,
            name: ForkName::parse(NAME)?,
            hostname: ForkName::parse(NAME)?,
            template: manifest.tag.clone(),
            machine_id: MACHINE_ID.into(),
            boot_id: BOOT_ID.into(),
        },
        labels: [].into(),
        env: [].into(),
        secrets: [].into(),
        files: Vec::new(),
        wall_clock: ClockNanos(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
        entropy: Secret::new(random::<ENTROPY_LEN>()?.to_vec()),
        ack_key: AckKey::new(random()?),
        limits: Limits::default(),
        network,
    })
}

/// Until the guest has said, signed, that it has rehearsed, and after that that it waits.
fn wait_until_it_waits(stream: &AckStream, id: &ForkId, key: &AckKey, limit: Duration) -> Result<(), RehearsalError> {
    let deadline = Instant::now() + limit;
    let (mut rehearsed, mut bytes, mut line) = (false, 0, Vec::new());
    let mut buffer = [0; 4096];
    loop {
        let count = match stream.read(&mut buffer, deadline.saturating_duration_since(Instant::now())) {
            Ok(0) => return Err(RehearsalError::Ended),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(RehearsalError::Late { limit }),
            Err(error) => return Err(RehearsalError::Stream(error)),
        };
        bytes += count;
        if bytes > MAX_BYTES {
            return Err(RehearsalError::Flood);
        }
        for &byte in &buffer[..count] {
            line.push(byte);
            if byte != b'\n' {
                continue;
            }
            if rehearsed && line == ARMED {
                return Ok(());
            }
            rehearsed |= is_rehearsed(line.trim_ascii_end(), id, key)?;
            line.clear();
        }
    }
}

fn is_rehearsed(line: &[u8], id: &ForkId, key: &AckKey) -> Result<bool, RehearsalError> {
    let key_of = |mailbox: &MailboxName| (*mailbox == MailboxName::identity()).then(|| key.clone());
    match Ack::parse(line, key_of) {
        Ok(ack) if ack.fork == *id && ack.stage == Stage::Failed => {
            Err(RehearsalError::Guest(acks::reason(ack.reason)))
        }
        Ok(ack) => Ok(ack.fork == *id && ack.stage == Stage::Rehearsed),
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    fn ack(stage: Stage, digit: char) -> Ack {
        let fork = ForkId::parse(&digit.to_string().repeat(20)).unwrap();
        Ack { stage, mailbox: MailboxName::identity(), fork, steps: Vec::new(), reason: None }
    }

    /// What becomes of a spare whose guest says these lines.
    fn said(lines: &[String]) -> Result<(), RehearsalError> {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let host = AckStream::new(host.into()).unwrap();
        for line in lines {
            guest.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        let id = ack(Stage::Rehearsed, 'a').fork;
        wait_until_it_waits(&host, &id, &AckKey::new([1; 32]), Duration::from_millis(50))
    }

    #[test]
    fn only_a_guest_that_says_that_it_has_rehearsed_and_then_waits_is_set_aside() {
        let (key, other) = (AckKey::new([1; 32]), AckKey::new([2; 32]));
        let line = |stage, digit, key: &AckKey| ack(stage, digit).to_line(key);
        let armed = || String::from_utf8_lossy(ARMED).trim_end().to_owned();
        said(&["a warning".into(), line(Stage::Rehearsed, 'a', &key), armed()]).unwrap();
        let others = [
            vec![armed()],
            vec![armed(), line(Stage::Rehearsed, 'a', &key)],
            vec![line(Stage::Rehearsed, 'b', &key), armed()],
            vec![line(Stage::Rehearsed, 'a', &other), armed()],
            vec![line(Stage::Applied, 'a', &key), armed()],
        ];
        for lines in others {
            let error = said(&lines).unwrap_err();
            assert!(matches!(error, RehearsalError::Late { .. }), "{lines:?}: {error}");
        }
        let failed = said(&[line(Stage::Failed, 'a', &key), armed()]).unwrap_err();
        assert!(matches!(failed, RehearsalError::Guest(_)), "{failed}");
        let flood = said(&vec!["z".repeat(4096); 20]).unwrap_err();
        assert!(matches!(flood, RehearsalError::Flood), "{flood}");
    }
}
