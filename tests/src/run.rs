//! One run of `offshoot` and what is expected of it.

use std::{
    io::Write,
    process::{Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::processes;

/// Longest time one command may take, on a machine that has other work too: a build of Python is the slowest.
const LIMIT: Duration = Duration::from_secs(600);

/// A run that has ended.
#[derive(Debug)]
pub struct Run {
    /// Its arguments, for messages.
    pub args: String,
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Run {
    /// Runs it to its end, with this on standard input.
    #[must_use]
    pub fn of(mut command: Command, input: &[u8]) -> Self {
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        command.stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("offshoot can be started");
        let writer = child.stdin.take().map(|mut stdin| {
            let input = input.to_vec();
            // What is not read is no failure of this run: it may have refused its arguments.
            thread::spawn(move || drop(stdin.write_all(&input)))
        });
        // A command that hangs fails its test; it does not stop all of them.
        let (ended, end) = channel::<()>();
        let pid = child.id();
        let watchdog = thread::spawn(move || {
            if end.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                processes::kill(pid);
            }
        });
        let output = child.wait_with_output().expect("offshoot can be waited for");
        drop(ended);
        watchdog.join().expect("the watchdog does not panic");
        if let Some(writer) = writer {
            writer.join().expect("the writer does not panic");
        }
        Self { args: args.join(" "), code: output.status.code(), stdout: output.stdout, stderr: output.stderr }
    }

    /// Standard output as text.
    #[must_use]
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Expects success.
    #[must_use]
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.code == Some(0), "{self:#}");
        self
    }

    /// Expects this exit code.
    #[must_use]
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(self.code == Some(code), "expected exit code {code}: {self:#}");
        self
    }

    /// Standard output as one JSON document.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {self:#}"))
    }

    /// The error object; expects failure.
    #[must_use]
    #[track_caller]
    pub fn error(&self) -> Value {
        assert!(self.code != Some(0), "expected a failure: {self:#}");
        let last = self.stderr.split(|&byte| byte == b'\n').rfind(|line| !line.is_empty()).unwrap_or_default();
        let report: Value = serde_json::from_slice(last).unwrap_or_else(|_| panic!("no error object: {self:#}"));
        report["error"].clone()
    }

    /// Expects an error with this code, and a text that says something.
    #[track_caller]
    pub fn refused(&self, code: &str) -> Value {
        let error = self.error();
        assert!(error["code"] == code, "expected {code}: {self:#}");
        assert!(error["message"].as_str().is_some_and(|text| text.len() > 10), "{self:#}");
        error
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cut = |text: String| text.chars().take(4000).collect::<String>();
        let (out, err) = (cut(self.out()), cut(self.err()));
        write!(f, "`offshoot {}` ended with {:?}\n--- stdout\n{out}\n--- stderr\n{err}", self.args, self.code)
    }
}
