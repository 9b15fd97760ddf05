//! Signals that ask a command to end, and the one of a terminal's new size.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Catches them from now on, until the program ends.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resize: Signal,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caught {
    /// A signal that asks to end, by its number.
    Number(i32),
    /// The terminal has another size.
    Resize,
}

impl Signals {
    /// Begins; needs a runtime.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            resize: signal(SignalKind::window_change())?,
        })
    }

    /// The next one. Nothing is lost if this is given up.
    pub async fn next(&mut self) -> Caught {
        tokio::select! {
            _ = self.interrupt.recv() => Caught::Number(SignalKind::interrupt().as_raw_value()),
            _ = self.terminate.recv() => Caught::Number(SignalKind::terminate().as_raw_value()),
            _ = self.hang_up.recv() => Caught::Number(SignalKind::hangup().as_raw_value()),
            _ = self.resize.recv() => Caught::Resize,
        }
    }

    /// The next one that asks to end.
    pub async fn end(&mut self) -> i32 {
        loop {
            if let Caught::Number(number) = self.next().await {
                return number;
            }
        }
    }
}
