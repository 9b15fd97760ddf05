//! How failures reach whoever called: cause chain and next step on standard error, or one JSON object with a typed
//! code; and the exit code.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | wrong usage: nothing was begun |
//! | 124 | `exec`: the command ran into `--timeout` |
//! | 125 | `exec`: offshoot itself failed |
//! | other | `exec`: the command's own (128 + signal if a signal ended it) |
//! | 128 + signal | a signal ended it |
//! | 141 | the reader of standard output went away |

use std::{borrow::Cow, error::Error, io::Write};

pub use host::codes::Coded;
use serde::Serialize;

use crate::output::{PrintError, clean, style::Style};

/// Failed.
pub const FAILED: u8 = 1;
/// Wrong usage.
pub const USAGE: u8 = 2;
/// `exec`: the command ran into its time limit.
pub const TIMED_OUT: u8 = 124;
/// `exec`: offshoot itself failed.
pub const EXEC_FAILED: u8 = 125;
/// 128 + SIGPIPE: what a shell shows for a program that nobody reads.
const READER_LEFT: u8 = 141;

/// Why a verb failed.
#[derive(Debug)]
pub struct Failure {
    code: Cow<'static, str>,
    exit: u8,
    next: Option<String>,
    messages: Vec<String>,
    silent: bool,
}

impl Coded for PrintError {
    fn code(&self) -> &'static str {
        "output_failed"
    }
}

#[derive(Serialize)]
struct Report<'a> {
    error: Body<'a>,
}

#[derive(Debug, Serialize)]
struct Body<'a> {
    code: &'a str,
    message: &'a str,
    causes: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<&'a str>,
}

impl<E: Coded> From<E> for Failure {
    fn from(error: E) -> Self {
        let silent = (&error as &(dyn Error + 'static)).downcast_ref().is_some_and(PrintError::reader_left);
        Self {
            code: error.code().into(),
            exit: match (silent, error.is_usage()) {
                (true, _) => READER_LEFT,
                (false, true) => USAGE,
                (false, false) => FAILED,
            },
            next: error.next(),
            messages: chain(&error),
            silent,
        }
    }
}

impl Failure {
    /// With a message of the command line's own.
    #[must_use]
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            exit: FAILED,
            next: None,
            messages: vec![clean::text(&message.into())],
            silent: false,
        }
    }

    /// Wrong usage, found only after the arguments were parsed.
    #[must_use]
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: USAGE, ..Self::new("usage", message) }
    }

    /// A signal asked to end.
    #[must_use]
    pub fn interrupted(signal: i32, message: impl Into<String>) -> Self {
        let exit = u8::try_from(128 + signal).unwrap_or(FAILED);
        Self { exit, ..Self::new("interrupted", message) }
    }

    /// From an error that has no code of its own.
    #[must_use]
    pub fn of(code: &'static str, error: &(dyn Error + 'static)) -> Self {
        Self { code: code.into(), exit: FAILED, next: None, messages: chain(error), silent: false }
    }

    /// With another exit code; a reader that went away keeps its own.
    #[must_use]
    pub fn with_exit(self, exit: u8) -> Self {
        if self.silent { self } else { Self { exit, ..self } }
    }

    /// With another code.
    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: code.into(), ..self }
    }

    /// With what to do next.
    #[must_use]
    pub fn with_next(self, next: impl Into<String>) -> Self {
        Self { next: Some(next.into()), ..self }
    }

    /// With causes below its message.
    #[must_use]
    pub fn with_causes(mut self, causes: impl IntoIterator<Item = String>) -> Self {
        self.messages.extend(causes);
        self
    }

    /// The exit code.
    #[must_use]
    pub fn exit(&self) -> u8 {
        self.exit
    }

    /// The typed code.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.code
    }

    /// The message and its causes on one line.
    #[must_use]
    pub fn on_one_line(&self) -> String {
        clean::line(&self.messages.join(": "))
    }

    /// Prints it on standard error.
    pub fn report(&self, json: bool, style: Style) {
        if self.silent {
            return;
        }
        let text = if json { self.to_json() } else { self.to_text(style) };
        // Nobody is left to tell if standard error is closed.
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    /// As the value of a field.
    #[must_use]
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::to_value(self.body()).unwrap_or_default()
    }

    fn body(&self) -> Body<'_> {
        let (message, causes) = self.messages.split_first().map_or(("failed", &[][..]), |(first, rest)| (first, rest));
        Body { code: &self.code, message, causes, next: self.next.as_deref() }
    }

    fn to_json(&self) -> String {
        serde_json::to_string(&Report { error: self.body() }).unwrap_or_default()
    }

    fn to_text(&self, style: Style) -> String {
        let indent = |text: &str| text.replace('\n', "\n    ");
        let body = self.body();
        let mut lines = vec![format!("{} {}", style.bad("error:"), indent(body.message))];
        lines.extend(body.causes.iter().map(|cause| format!("  {} {}", style.bold("caused by:"), indent(cause))));
        lines.extend(body.next.map(|next| format!("  {} {next}", style.bold("next:"))));
        lines.join("\n")
    }
}

/// The messages of an error and its causes, cleaned; a cause that the message before repeats is left out.
fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut messages: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = clean::text(error.to_string().trim_end());
        if !messages.last().is_some_and(|last| last.contains(&text)) {
            messages.push(text);
        }
        next = error.source();
    }
    messages
}

#[cfg(test)]
mod tests {
    use std::io;

    use host::forks::ForksError;

    use super::*;

    #[test]
    fn o5_an_error_names_its_causes_and_its_code() {
        let source = io::Error::other("disk \x1b[2Jfull");
        let failure = Failure::from(ForksError::State { step: "reading the forks", source });
        assert_eq!(failure.to_text(Style::PLAIN), "error: reading the forks failed\n  caused by: disk \\u{1b}[2Jfull");
        let value: serde_json::Value = serde_json::from_str(&failure.to_json()).unwrap_or_default();
        assert_eq!(value["error"]["code"], "state_failed");
        assert_eq!(value["error"]["causes"][0], "disk \\u{1b}[2Jfull");
        assert_eq!(failure.exit(), FAILED);
    }

    #[test]
    fn a_cause_that_was_said_already_is_not_said_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("the fork was destroyed: {0}")]
        struct Outer(#[source] io::Error);
        assert_eq!(chain(&Outer(io::Error::other("flood"))), ["the fork was destroyed: flood"]);
    }

    #[test]
    fn a_reader_that_went_away_is_no_error_to_report() {
        let failure = Failure::from(PrintError::from(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert_eq!(failure.with_exit(EXEC_FAILED).exit(), READER_LEFT);
    }

    #[test]
    fn further_lines_of_a_message_are_set_off() {
        let failure = Failure::new("x", "the console ends with:\nerror: forged");
        assert_eq!(failure.to_text(Style::PLAIN), "error: the console ends with:\n    error: forged");
    }
}
