//! The lines between the agent and a runtime: one request at a time, each with a deadline.
//!
//! Whoever asks also reads the answer, on its own thread: an event costs one write, one wake-up and one read, which
//! counts on a fork's way to its ack.

use std::{os::fd::OwnedFd, sync::Arc, time::Instant};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::{
    answer::{Answer, AnswerError, MAX_LINE},
    pump::left,
};
use crate::workload::Process;

#[derive(Debug)]
pub(crate) struct Conversation {
    pub(crate) life: u64,
    pub(crate) process: Arc<Process>,
    pub(crate) input: OwnedFd,
    pub(crate) output: OwnedFd,
    /// Read, but not yet a line.
    pending: Vec<u8>,
    /// Whether a request that nobody waits for any more is still being worked on. Nothing is sent before it is answered:
    /// what would stand in the pipe could not be taken back.
    owed: Option<u64>,
    /// Whether that was an event without which nothing may be asked.
    needed: bool,
    /// Why it was ended, if it failed that event.
    pub(crate) refusal: Option<String>,
    /// Whether a request was cut short. A line end makes it an error that the runtime skips.
    cut: bool,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// The process ended, or hung up.
    Died,
    /// Not in time.
    Late,
    /// Still busy with an earlier request.
    Busy,
    /// The request is longer than a line may be.
    TooLong,
    /// What it said is no answer; it was this request's.
    Invalid(AnswerError),
}

impl Conversation {
    pub(crate) fn new(life: u64, process: Arc<Process>, input: OwnedFd, output: OwnedFd) -> Self {
        Self { life, process, input, output, pending: Vec::new(), owed: None, needed: false, refusal: None, cut: false }
    }

    /// Waits for the runtime to say that it is ready; answers whether it wants to be told if a capture is given up.
    pub(crate) fn expect_ready(&mut self, deadline: Instant) -> Result<bool, NoAnswer> {
        match Answer::parse(&self.line(deadline)?) {
            Ok(Answer::Ready { told }) => Ok(told),
            Ok(_) => Err(NoAnswer::Invalid(AnswerError::Field("type"))),
            Err(error) => Err(NoAnswer::Invalid(error)),
        }
    }

    /// Sends a request (without line end) and waits for its answer.
    pub(crate) fn ask(&mut self, id: u64, request: &str, deadline: Instant) -> Result<Answer, NoAnswer> {
        self.send(id, request, deadline)?;
        let answer = self.answer(id, deadline);
        if !matches!(answer, Err(NoAnswer::Late)) {
            self.owed = None;
        }
        answer
    }

    /// Sends an event and leaves its answer to the next request, which is sent only if the event was done. A runtime that
    /// fails it is ended: it would answer as somebody else.
    pub(crate) fn announce(&mut self, id: u64, request: &str, deadline: Instant) -> Result<(), NoAnswer> {
        self.send(id, request, deadline)?;
        self.needed = true;
        Ok(())
    }

    fn send(&mut self, id: u64, request: &str, deadline: Instant) -> Result<(), NoAnswer> {
        if request.len() >= MAX_LINE {
            return Err(NoAnswer::TooLong);
        }
        if let Some(owed) = self.owed {
            match self.answer(owed, deadline) {
                Err(NoAnswer::Late) => return Err(NoAnswer::Busy),
                Err(NoAnswer::Died) => return Err(NoAnswer::Died),
                Ok(Answer::Done { .. }) => {}
                other if self.needed => {
                    self.refusal = Some(match other {
                        Ok(Answer::Error { message, .. }) => message.chars().take(300).collect(),
                        Err(NoAnswer::Invalid(error)) => error.to_string(),
                        _ => "its answer is none to an event".to_owned(),
                    });
                    let _ = self.process.kill_tree();
                    return Err(NoAnswer::Died);
                }
                _ => {}
            }
            (self.owed, self.needed) = (None, false);
        }
        if self.cut {
            self.write(b"\n", deadline)?;
            self.cut = false;
        }
        let mut line = Vec::with_capacity(request.len() + 1);
        line.extend_from_slice(request.as_bytes());
        line.push(b'\n');
        if let Err(error) = self.write(&line, deadline) {
            self.cut = true;
            return Err(error);
        }
        self.owed = Some(id);
        Ok(())
    }

    fn answer(&mut self, id: u64, deadline: Instant) -> Result<Answer, NoAnswer> {
        loop {
            let line = self.line(deadline)?;
            match Answer::parse(&line) {
                Ok(answer) if answer.id() == Some(id) => return Ok(answer),
                // Late, or never asked for.
                Ok(_) => {}
                Err(error) => return Err(NoAnswer::Invalid(error)),
            }
        }
    }

    fn write(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), NoAnswer> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.input, bytes) {
                Ok(len) => bytes = &bytes[len..],
                Err(Errno::AGAIN) => {
                    let left = left(Some(deadline)).ok_or(NoAnswer::Late)?;
                    let mut fds =
                        [PollFd::new(&self.input, PollFlags::OUT), PollFd::new(self.process.pidfd(), PollFlags::IN)];
                    let _ = poll(&mut fds, left.as_ref());
                    if !fds[1].revents().is_empty() {
                        return Err(NoAnswer::Died);
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return Err(NoAnswer::Died),
            }
        }
        Ok(())
    }

    /// The next line.
    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, NoAnswer> {
        let mut searched = 0;
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(at) = self.pending[searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.pending.split_off(searched + at + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(line);
            }
            searched = self.pending.len();
            if searched > MAX_LINE {
                // There is no telling where its next answer begins.
                return Err(NoAnswer::Died);
            }
            // Wait first: the answer is never there yet.
            let left = left(Some(deadline)).ok_or(NoAnswer::Late)?;
            let mut fds = [PollFd::new(&self.output, PollFlags::IN), PollFd::new(self.process.pidfd(), PollFlags::IN)];
            let _ = poll(&mut fds, left.as_ref());
            let ended = !fds[1].revents().is_empty();
            match rustix::io::read(&self.output, &mut buffer) {
                Ok(0) => return Err(NoAnswer::Died),
                Ok(len) => self.pending.extend_from_slice(&buffer[..len]),
                // A child of the runtime may hold the pipe open, so its end alone is not enough to go by.
                Err(Errno::AGAIN) if ended => return Err(NoAnswer::Died),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return Err(NoAnswer::Died),
            }
        }
    }
}
