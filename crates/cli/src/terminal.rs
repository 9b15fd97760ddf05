//! The caller's terminal while a command in a fork has it.

use std::io;

use rustix::termios::{self, OptionalActions, Termios};

/// Raw mode: every key goes to the fork. The mode before comes back on drop, however the command ends.
#[derive(Debug)]
pub struct RawMode(Termios);

impl RawMode {
    /// Turns it on for the terminal at standard input.
    ///
    /// # Errors
    /// If standard input is no terminal.
    pub fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Drained first: what the command printed last is shown in the mode it was meant for.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Rows and columns of the terminal; 24 × 80 where there is none.
#[must_use]
pub fn size() -> (u32, u32) {
    match termios::tcgetwinsize(io::stdout()).or_else(|_| termios::tcgetwinsize(io::stdin())) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row.into(), size.ws_col.into()),
        _ => (24, 80),
    }
}
