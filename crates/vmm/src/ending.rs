//! How a machine comes to its end: the first reason counts, and everybody who waits hears of it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};

use crate::machine::Exit;

/// The end of one machine.
#[derive(Debug)]
pub struct Ending {
    exit: Mutex<Option<Exit>>,
    changed: Condvar,
    event: OwnedFd,
}

impl Ending {
    /// Of a machine that has not ended.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { exit: Mutex::new(None), changed: Condvar::new(), event })
    }

    /// Ends the machine, if it has not ended.
    pub fn end(&self, exit: Exit) {
        let mut ended = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_none() {
            *ended = Some(exit);
            // Fails only when the counter is full, which is readable too.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
            self.changed.notify_all();
        }
    }

    /// How the machine ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the end, at most for `limit`.
    pub fn wait(&self, limit: Option<Duration>) -> Option<Exit> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut ended = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if ended.is_some() {
                return ended.clone();
            }
            ended = match deadline {
                None => self.changed.wait(ended).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.changed.wait_timeout(ended, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl AsFd for Ending {
    /// Readable from the end on. Not to be read from.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
