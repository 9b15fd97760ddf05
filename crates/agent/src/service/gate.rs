//! Holds back evaluations and restarts while the sandbox is captured and until a fork knows who it is.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// Somebody who must not be captured in the middle of what he does.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.lock().inside -= 1;
        self.0.changed.notify_all();
    }
}

#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// How many have entered, and keep it from closing.
    inside: usize,
    /// Counts identities. Who waited across one was the template's client, and is gone.
    identities: u64,
}

impl Gate {
    /// Lets nobody in any more, and waits for those who are inside; false, and open, if they are at the deadline.
    pub(crate) fn close(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        state.closed = true;
        while state.inside > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                state.closed = false;
                self.changed.notify_all();
                return false;
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Enters once it is open. `None` at the deadline.
    pub(crate) fn enter(&self, deadline: Instant) -> Option<Inside<'_>> {
        loop {
            if !self.wait_open(Some(deadline)) {
                return None;
            }
            let mut state = self.lock();
            if !state.closed {
                state.inside += 1;
                return Some(Inside(self));
            }
        }
    }

    pub(crate) fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }

    pub(crate) fn new_identity(&self) {
        self.lock().identities += 1;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    pub(crate) fn identities(&self) -> u64 {
        self.lock().identities
    }

    /// Waits until it is open; false at the deadline.
    pub(crate) fn wait_open(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.lock();
        while state.closed {
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
