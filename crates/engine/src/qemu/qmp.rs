//! QEMU's control protocol: JSON lines over a unix socket.

use std::{
    io::{self, BufRead, BufReader, IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::EngineError;

/// Longest line taken from QEMU, in bytes. Its longest answer to what we ask has some hundred.
const MAX_LINE: u64 = 1 << 20;

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub(super) struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came while waiting for an answer.
    events: Vec<Value>,
}

impl Qmp {
    /// Takes the greeting and ends the negotiation.
    pub(super) fn start(stream: UnixStream, limit: Duration) -> Result<Self, EngineError> {
        let during = "starting";
        let mut qmp = Self { reader: BufReader::new(stream), events: Vec::new() };
        let deadline = Instant::now() + limit;
        // Before the greeting: QEMU then finds it there when it gets to it.
        qmp.send(during, "qmp_capabilities", &Value::Null, None)?;
        let greeting = qmp.read(during, deadline, limit)?;
        if greeting.get("QMP").is_none() {
            return Err(EngineError::Refused { during, reason: "no QMP greeting".into() });
        }
        qmp.answer(during, limit)?;
        Ok(qmp)
    }

    /// Runs a command and returns its answer. `arguments` are an object, or null for none.
    pub(super) fn run(
        &mut self,
        during: &'static str,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, EngineError> {
        self.run_all(during, &[(command, arguments)], limit)
    }

    /// Runs commands without waiting in between and returns the last one's answer; the first that is refused is the error,
    /// though those after it have been sent.
    pub(super) fn run_all(
        &mut self,
        during: &'static str,
        commands: &[(&str, Value)],
        limit: Duration,
    ) -> Result<Value, EngineError> {
        for (command, arguments) in commands {
            self.send(during, command, arguments, None)?;
        }
        commands.iter().try_fold(Value::Null, |_, _| self.answer(during, limit))
    }

    /// Runs `getfd`: hands a descriptor over under a name.
    pub(super) fn give_fd(
        &mut self,
        during: &'static str,
        name: &str,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<(), EngineError> {
        self.send(during, "getfd", &json!({ "fdname": name }), Some(fd))?;
        self.answer(during, limit).map(drop)
    }

    /// Runs `add-fd`: hands a descriptor over as a set of its own, and gives the set's number.
    pub(super) fn add_fd(
        &mut self,
        during: &'static str,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<u64, EngineError> {
        self.send(during, "add-fd", &Value::Null, Some(fd))?;
        let answer = self.answer(during, limit)?;
        answer
            .get("fdset-id")
            .and_then(Value::as_u64)
            .ok_or_else(|| EngineError::Refused { during, reason: "no number of a set".into() })
    }

    /// Waits for the first event that `wanted` takes.
    pub(super) fn wait_event<T>(
        &mut self,
        during: &'static str,
        limit: Duration,
        mut wanted: impl FnMut(&Value) -> Option<T>,
    ) -> Result<T, EngineError> {
        for event in std::mem::take(&mut self.events) {
            if let Some(found) = wanted(&event) {
                return Ok(found);
            }
        }
        let deadline = Instant::now() + limit;
        loop {
            let message = self.read(during, deadline, limit)?;
            if let Some(found) = wanted(&message) {
                return Ok(found);
            }
        }
    }

    fn send(
        &mut self,
        during: &'static str,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), EngineError> {
        // As short as can be: QEMU reads its monitor byte by byte, with several system calls for each (seen in 7.2).
        let mut line = match arguments {
            Value::Null => json!({ "execute": command }),
            arguments => json!({ "execute": command, "arguments": arguments }),
        }
        .to_string();
        line.push('\n');
        let stream = self.reader.get_mut();
        let sent = match fd {
            None => stream.write_all(line.as_bytes()),
            Some(fd) => {
                let fds = [fd];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&fds));
                match sendmsg(stream.as_fd(), &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::NOSIGNAL) {
                    Ok(sent) if sent == line.len() => Ok(()),
                    Ok(_) => Err(io::ErrorKind::WriteZero.into()),
                    Err(error) => Err(error.into()),
                }
            }
        };
        sent.map_err(|source| EngineError::Control { during, source })
    }

    fn answer(&mut self, during: &'static str, limit: Duration) -> Result<Value, EngineError> {
        let deadline = Instant::now() + limit;
        loop {
            let mut message = self.read(during, deadline, limit)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(EngineError::Refused { during, reason: reason.chars().take(400).collect() });
            }
            self.events.push(message);
        }
    }

    fn read(&mut self, during: &'static str, deadline: Instant, limit: Duration) -> Result<Value, EngineError> {
        let control = |source| EngineError::Control { during, source };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(EngineError::Timeout { during, limit });
        }
        self.reader.get_ref().set_read_timeout(Some(left)).map_err(control)?;
        let mut line = Vec::new();
        match self.reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(_) if line.last() == Some(&b'\n') => {}
            Ok(_) => return Err(control(io::ErrorKind::UnexpectedEof.into())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(EngineError::Timeout { during, limit });
            }
            Err(error) => return Err(control(error)),
        }
        serde_json::from_slice(&line).map_err(|error| control(error.into()))
    }
}
