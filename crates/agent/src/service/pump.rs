//! Carries a process' output into the log until the process ends. One thread for each process, which blocks.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::log::{Filled, Logs};
use crate::workload::Process;

/// Why [`Pump::until_exit`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Exit,
    Deadline,
}

#[derive(Debug)]
pub(crate) struct Pump<'a> {
    pub(crate) logs: &'a Logs,
    pub(crate) source: &'a str,
    pub(crate) output: &'a OwnedFd,
    at_end: bool,
}

impl<'a> Pump<'a> {
    pub(crate) fn new(logs: &'a Logs, source: &'a str, output: &'a OwnedFd) -> Self {
        Self { logs, source, output, at_end: false }
    }

    /// Carries output until the process has ended, then what is still in the pipe. `wrote` is called after new bytes.
    pub(crate) fn until_exit(
        &mut self,
        process: &Process,
        deadline: Option<Instant>,
        mut wrote: impl FnMut(),
    ) -> Ended {
        loop {
            let Some(left) = left(deadline) else { return Ended::Deadline };
            let mut fds = vec![PollFd::new(process.pidfd(), PollFlags::IN)];
            if !self.at_end {
                fds.push(PollFd::new(self.output, PollFlags::IN));
            }
            // EINTR and the like: look again.
            let _ = poll(&mut fds, left.as_ref());
            let exited = !fds[0].revents().is_empty();
            let drained = self.drain();
            if drained {
                wrote();
            }
            if exited {
                return Ended::Exit;
            }
        }
    }

    /// Carries what others of the process' family still write, until they are gone too.
    pub(crate) fn until_end(&mut self) {
        while !self.at_end {
            let _ = poll(&mut [PollFd::new(self.output, PollFlags::IN)], None);
            self.drain();
        }
    }

    /// Whether there was anything.
    fn drain(&mut self) -> bool {
        let mut any = false;
        // Bounded: a process that writes without end must not keep us from seeing that it ended.
        for _ in 0..64 {
            if self.at_end {
                break;
            }
            match self.logs.fill(self.source, self.output) {
                Filled::Bytes => any = true,
                Filled::Nothing => break,
                Filled::End => self.at_end = true,
            }
        }
        any
    }
}

/// The time left as poll wants it: `Some(None)` without a deadline, `None` once it has passed.
#[allow(clippy::option_option)]
pub(crate) fn left(deadline: Option<Instant>) -> Option<Option<Timespec>> {
    let Some(deadline) = deadline else { return Some(None) };
    let left = deadline.checked_duration_since(Instant::now()).filter(|left| *left > Duration::ZERO)?;
    Some(Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 })))
}
