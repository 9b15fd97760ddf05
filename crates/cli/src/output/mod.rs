//! What is printed, and how: text for people, JSON for programs; results on standard output, the rest on standard error.

pub mod clean;
pub mod format;
pub mod progress;
pub mod style;
pub mod table;
mod wrap;

use std::{
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
};

use rustix::termios;
use serde::Serialize;
use thiserror::Error;

use style::Style;
use table::Table;

/// Standard output is closed or full.
#[derive(Debug, Error)]
#[error("the result could not be written to standard output")]
pub struct PrintError(#[from] io::Error);

impl PrintError {
    /// Whether the reader went away (`offshoot … | head`): no failure to speak of.
    #[must_use]
    pub fn reader_left(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// JSON instead of text.
    pub json: bool,
    /// Results and errors only.
    pub quiet: bool,
    /// Of standard output.
    pub style: Style,
    /// Columns of the terminal; `None` where standard output is none.
    width: Option<usize>,
    /// The same of standard error.
    notes_width: Option<usize>,
}

impl Output {
    /// For this process' standard output.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        let stdout = io::stdout();
        let (width, notes_width) = (columns(&stdout), columns(&io::stderr()));
        Self { json, quiet, style: Style::of(stdout.is_terminal()), width, notes_width }
    }

    /// Prints `value` as one JSON document.
    ///
    /// # Errors
    /// [`PrintError`].
    pub fn document<T: Serialize>(&self, value: &T) -> Result<(), PrintError> {
        let mut text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
        text.push('\n');
        raw(text.as_bytes())
    }

    /// Prints `value` as one line of JSON, at once.
    ///
    /// # Errors
    /// [`PrintError`].
    pub fn json_line<T: Serialize>(&self, value: &T) -> Result<(), PrintError> {
        let mut text = serde_json::to_string(value).map_err(io::Error::from)?;
        text.push('\n');
        raw(text.as_bytes())
    }

    /// Prints a line of a result. What came from a guest must have been cleaned.
    ///
    /// # Errors
    /// [`PrintError`].
    pub fn line(&self, text: &str) -> Result<(), PrintError> {
        raw(format!("{text}\n").as_bytes())
    }

    /// Prints a table that fits the terminal.
    ///
    /// # Errors
    /// [`PrintError`].
    pub fn table(&self, table: &Table) -> Result<(), PrintError> {
        raw(table.render(self.width, self.style).as_bytes())
    }

    /// Says something on standard error that is no result: not with `--quiet`, not with `--json`.
    pub fn note(&self, text: &str) {
        if !self.quiet && !self.json {
            // Nobody is left to tell if standard error is closed.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// The same for a long text of one line: it is broken between words to fit the terminal, and set off from its second line on.
    pub fn note_wrapped(&self, text: &str, indent: usize) {
        match self.notes_width {
            Some(width) => self.note(&wrap::wrap(text, width, indent)),
            None => self.note(text),
        }
    }
}

fn columns<T: AsFd + IsTerminal>(stream: &T) -> Option<usize> {
    let columns = || termios::tcgetwinsize(stream).map_or(80, |size| usize::from(size.ws_col));
    stream.is_terminal().then(columns).map(|columns| if columns == 0 { 80 } else { columns })
}

/// Writes bytes to standard output, at once and as they are.
///
/// # Errors
/// [`PrintError`].
pub fn raw(bytes: &[u8]) -> Result<(), PrintError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}
