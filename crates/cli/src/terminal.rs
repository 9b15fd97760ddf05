//! The caller's terminal while a command in a fork has it.

use std::{io, os::fd::AsFd};

use rustix::termios::{self, OptionalActions, Termios};

/// Raw mode: every key goes to the fork. The mode before comes back on drop, however the command ends.
#[derive(Debug)]
pub struct RawMode<T: AsFd> {
    terminal: T,
    before: Termios,
}

impl<T: AsFd> RawMode<T> {
    /// Turns it on.
    ///
    /// # Errors
    /// If this is no terminal.
    pub fn enter(terminal: T) -> io::Result<Self> {
        let before = termios::tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl<T: AsFd> Drop for RawMode<T> {
    fn drop(&mut self) {
        // Drained first: what the command printed last is shown in the mode it was meant for.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::OpenOptions;

    use rustix::{
        pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
        termios::LocalModes,
    };

    use super::*;

    #[test]
    fn the_terminal_is_as_before_even_after_a_panic() {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let terminal = OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let echoes =
            || termios::tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ECHO | LocalModes::ICANON);
        assert!(echoes());
        let panicked = std::panic::catch_unwind(|| {
            let _raw = RawMode::enter(&terminal).unwrap();
            assert!(echoes(), "raw mode is on: this panics");
        });
        assert!(panicked.is_err() && echoes());
    }

    #[test]
    fn what_is_no_terminal_has_no_raw_mode() {
        assert!(RawMode::enter(OpenOptions::new().read(true).open("/dev/null").unwrap()).is_err());
    }
}
