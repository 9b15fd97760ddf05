//! Waiting for a fork's acks: all of them together, each with its own deadline, on one stream.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use engine::AckStream;
use identity::{Ack, AckKey, ForkId, MailboxName, Stage, ack::MAX_LINE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

/// Most bytes a fork may send before its acks are complete: 17 acks fit ten times over.
const MAX_BYTES: usize = 1 << 20;

/// Why a fork has not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AckWaitError {
    /// The guest says that a step failed: before the thaw, and then nothing of its workload ran, or after it (host keys, services, the runtime).
    #[error("the guest could not apply {mailbox}: {reason}")]
    Failed {
        /// Which mailbox.
        mailbox: MailboxName,
        /// The guest's reason, cleaned for a terminal.
        reason: String,
    },
    /// The deadline passed.
    #[error("no valid ack of {mailbox} came within {} ms{}", limit.as_millis(), rejected_text(*rejected))]
    Timeout {
        /// Which mailbox.
        mailbox: MailboxName,
        /// The deadline.
        limit: Duration,
        /// Lines that came and were no valid ack of this fork.
        rejected: usize,
    },
    /// The fork's machine ended.
    #[error("the fork's machine ended before {0} was acknowledged")]
    Ended(MailboxName),
    /// The guest sent more than any ack needs.
    #[error("the guest flooded its ack channel")]
    Flood,
    /// The stream broke.
    #[error("the ack channel failed: {0}")]
    Stream(String),
}

fn rejected_text(rejected: usize) -> String {
    if rejected == 0 { String::new() } else { format!(" ({rejected} lines were refused as malformed or forged)") }
}

/// An ack and when it came.
#[derive(Debug, Clone)]
pub struct Received {
    /// The ack.
    pub ack: Ack,
    /// When.
    pub at: Instant,
}

/// What is awaited, and what has come.
#[derive(Debug)]
pub struct Waiter {
    fork: ForkId,
    keys: BTreeMap<MailboxName, AckKey>,
    start: Instant,
    wanted: BTreeMap<MailboxName, Duration>,
    received: BTreeMap<MailboxName, Received>,
    network_pending: Option<String>,
    rejected: usize,
    bytes: usize,
    line: Vec<u8>,
    overlong: bool,
}

impl Waiter {
    /// For a fork; `keys` are those of all mailboxes that got a payload. The clock of every deadline starts now, and again with
    /// [`Waiter::start`].
    #[must_use]
    pub fn new(fork: ForkId, keys: BTreeMap<MailboxName, AckKey>) -> Self {
        Self {
            fork,
            keys,
            start: Instant::now(),
            wanted: BTreeMap::new(),
            received: BTreeMap::new(),
            network_pending: None,
            rejected: 0,
            bytes: 0,
            line: Vec::new(),
            overlong: false,
        }
    }

    /// Adds a mailbox that must acknowledge within `limit` of the start.
    pub fn want(&mut self, mailbox: MailboxName, limit: Duration) {
        self.wanted.insert(mailbox, limit);
    }

    /// The fork runs from now on.
    pub fn start(&mut self) {
        self.start = Instant::now();
    }

    /// What a mailbox has acknowledged with, if it has.
    #[must_use]
    pub fn received(&self, mailbox: &MailboxName) -> Option<&Received> {
        self.received.get(mailbox)
    }

    /// Why the guest waits for its network to be configured again, if it said so since this was asked last.
    pub fn take_network_pending(&mut self) -> Option<String> {
        self.network_pending.take()
    }

    /// Everything that was acknowledged.
    #[must_use]
    pub fn into_received(self) -> BTreeMap<MailboxName, Received> {
        self.received
    }

    /// A line that came some other way: the ack in it if it is a good one of this fork. What is not is counted.
    pub fn check(&mut self, line: &[u8]) -> Option<Ack> {
        let parsed = Ack::parse(line, |mailbox| self.keys.get(mailbox).cloned());
        // An ack of another fork is signed with another key; the field is compared all the same.
        let ack = parsed.ok().filter(|ack| ack.fork == self.fork);
        self.rejected += usize::from(ack.is_none());
        ack
    }

    /// How many lines came that were no good acks of this fork.
    #[must_use]
    pub fn rejected(&self) -> usize {
        self.rejected
    }

    /// The key of a mailbox that got a payload.
    #[must_use]
    pub fn key(&self, mailbox: &MailboxName) -> Option<&AckKey> {
        self.keys.get(mailbox)
    }

    /// Waits until `mailbox` has acknowledged.
    ///
    /// # Errors
    /// [`AckWaitError`]; also for another mailbox whose deadline passes meanwhile.
    pub fn wait_for(&mut self, mailbox: &MailboxName, stream: &AckStream) -> Result<&Received, AckWaitError> {
        while !self.received.contains_key(mailbox) {
            self.wait(stream, None, None)?;
        }
        // Just seen.
        self.received.get(mailbox).ok_or_else(|| AckWaitError::Ended(mailbox.clone()))
    }

    /// Waits until something has come: on the stream, which is taken, or on `beside`, which is left there; or until `until`.
    ///
    /// # Errors
    /// [`AckWaitError`]; also for a mailbox whose deadline passes meanwhile.
    pub fn wait(
        &mut self,
        stream: &AckStream,
        beside: Option<BorrowedFd<'_>>,
        until: Option<Instant>,
    ) -> Result<(), AckWaitError> {
        let now = Instant::now();
        let next = self.next_deadline();
        if let Some((mailbox, limit)) = &next
            && now >= self.start + *limit
        {
            let (mailbox, limit) = (mailbox.clone(), *limit);
            return Err(AckWaitError::Timeout { mailbox, limit, rejected: self.rejected });
        }
        let deadline = next.map(|(_, limit)| self.start + limit).into_iter().chain(until).min();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
        let broken = |error: &dyn std::error::Error| AckWaitError::Stream(error.to_string());
        let left = left.map(Timespec::try_from).transpose().map_err(|error| broken(&error))?;
        let fds = [Some(stream.as_fd()), beside];
        let mut polled: Vec<_> = fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        match poll(&mut polled, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(broken(&error)),
        }
        if polled.first().is_some_and(|stream| !stream.revents().is_empty()) { self.read(stream) } else { Ok(()) }
    }

    fn read(&mut self, stream: &AckStream) -> Result<(), AckWaitError> {
        let ended = |waiter: &Self| {
            let next = waiter.next_deadline().map_or_else(MailboxName::identity, |(mailbox, _)| mailbox);
            Err(AckWaitError::Ended(next))
        };
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer, Duration::ZERO) {
            Ok(0) => ended(self),
            Ok(count) => self.take(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => ended(self),
            Err(error) => Err(AckWaitError::Stream(error.to_string())),
        }
    }

    /// The mailbox still awaited whose deadline is first.
    fn next_deadline(&self) -> Option<(MailboxName, Duration)> {
        self.wanted
            .iter()
            .filter(|(name, _)| !self.received.contains_key(*name))
            .min_by_key(|(_, limit)| **limit)
            .map(|(name, limit)| (name.clone(), *limit))
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), AckWaitError> {
        self.bytes += bytes.len();
        if self.bytes > MAX_BYTES {
            return Err(AckWaitError::Flood);
        }
        for &byte in bytes {
            if byte != b'\n' {
                self.overlong |= self.line.len() >= MAX_LINE;
                if !self.overlong {
                    self.line.push(byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if std::mem::take(&mut self.overlong) {
                self.rejected += 1;
            } else if !line.is_empty() {
                self.take_line(&line)?;
            }
        }
        Ok(())
    }

    fn take_line(&mut self, line: &[u8]) -> Result<(), AckWaitError> {
        let Some(ack) = self.check(line) else { return Ok(()) };
        // It is no fork's.
        if ack.stage == Stage::Rehearsed {
            self.rejected += 1;
            return Ok(());
        }
        if ack.stage == Stage::Failed {
            return Err(AckWaitError::Failed { mailbox: ack.mailbox, reason: reason(ack.reason) });
        }
        // No end: the guest waits for its network to be configured again, and says then what became of it.
        if ack.stage == Stage::NetworkPending {
            self.network_pending = Some(reason(ack.reason));
            return Ok(());
        }
        self.received.entry(ack.mailbox.clone()).or_insert_with(|| Received { ack, at: Instant::now() });
        Ok(())
    }
}

/// The guest's reason, cleaned for a terminal.
pub(crate) fn reason(given: Option<String>) -> String {
    let given = given.unwrap_or_else(|| "no reason given".into());
    given.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    fn name(text: &str) -> MailboxName {
        MailboxName::parse(text).unwrap()
    }

    fn fork(digit: char) -> ForkId {
        ForkId::parse(&digit.to_string().repeat(20)).unwrap()
    }

    fn ack(mailbox: &str, digit: char) -> Ack {
        Ack { stage: Stage::Applied, mailbox: name(mailbox), fork: fork(digit), steps: Vec::new(), reason: None }
    }

    fn pair() -> (UnixStream, AckStream) {
        let (guest, host) = UnixStream::pair().unwrap();
        (guest, AckStream::new(host.into()).unwrap())
    }

    /// Two forks; the line is the second's for the first, and so on.
    fn wait_for_foo(lines: &[String]) -> Result<BTreeMap<MailboxName, Received>, AckWaitError> {
        let key = AckKey::new([1; 32]);
        let keys = ["foo", "foobar"].map(|text| (name(text), key.for_mailbox(&name(text))));
        let mut waiter = Waiter::new(fork('a'), keys.into());
        waiter.want(name("foo"), Duration::from_millis(100));
        let (mut guest, host) = pair();
        for line in lines {
            guest.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        let waited = waiter.wait_for(&name("foo"), &host).map(drop);
        drop(guest);
        waited.map(|()| waiter.into_received())
    }

    #[test]
    fn i7_only_the_right_mailbox_of_the_right_fork_with_the_right_key_counts() {
        let (key, other) = (AckKey::new([1; 32]), AckKey::new([2; 32]));
        let foo = |ack: &Ack, key: &AckKey| ack.to_line(&key.for_mailbox(&ack.mailbox));
        assert!(wait_for_foo(&[foo(&ack("foo", 'a'), &key)]).is_ok());

        let refused = [
            foo(&ack("foobar", 'a'), &key),
            foo(&ack("foo", 'a'), &other),
            foo(&ack("foo", 'b'), &key),
            foo(&ack("foo", 'b'), &other),
            ack("foo", 'a').to_line(&key.for_mailbox(&name("foobar"))),
            format!("junk {}", foo(&ack("foo", 'a'), &key)),
            "x".repeat(10_000),
        ];
        for line in refused {
            let error = wait_for_foo(std::slice::from_ref(&line)).unwrap_err();
            assert!(matches!(error, AckWaitError::Timeout { .. }), "{line}: {error}");
        }
    }

    #[test]
    fn a_refused_line_does_not_hide_the_real_one() {
        let key = AckKey::new([1; 32]);
        let real = ack("foo", 'a').to_line(&key.for_mailbox(&name("foo")));
        assert!(wait_for_foo(&["y".repeat(9000), String::new(), real]).is_ok());
    }

    #[test]
    fn a_guest_that_floods_is_cut_off() {
        let lines: Vec<String> = (0..50).map(|_| "z".repeat(4000)).collect();
        let waiting = std::thread::spawn(move || {
            let mut waiter = Waiter::new(fork('a'), BTreeMap::new());
            waiter.want(name("foo"), Duration::from_secs(20));
            let (mut guest, host) = pair();
            let writer = std::thread::spawn(move || {
                for line in lines.iter().cycle().take(1000) {
                    if guest.write_all(line.as_bytes()).is_err() {
                        break;
                    }
                }
            });
            let error = waiter.wait_for(&name("foo"), &host).unwrap_err();
            drop(host);
            writer.join().unwrap();
            error
        });
        assert_eq!(waiting.join().unwrap(), AckWaitError::Flood);
    }
}
