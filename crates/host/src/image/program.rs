//! Running the distribution's programs: what is missing is named with its package, what fails with its last words.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, ErrorKind, Read},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
};

use thiserror::Error;

/// Lines of a failed program's output that are worth showing.
const LAST_LINES: usize = 12;
/// Bytes of one line, and of the whole standard output, that are kept.
const MAX_LINE: u64 = 4096;
const MAX_OUTPUT: u64 = 4 << 20;

/// Why a program did not do its work.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// It is not there.
    #[error("{program} is not installed; run: sudo apt-get install {package}")]
    Missing {
        /// The program.
        program: String,
        /// The Debian package it comes in.
        package: &'static str,
    },
    /// It could not be started or listened to.
    #[error("{program} could not be run: {source}")]
    Start {
        /// The program.
        program: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// It ended badly.
    #[error("{program} failed ({status}):\n{output}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it wrote to standard error.
        output: String,
    },
}

/// A program to run and the package it comes in.
#[derive(Debug)]
pub(crate) struct Program {
    command: Command,
    name: String,
    package: &'static str,
}

/// Ends the child if we leave early.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

impl Program {
    pub(crate) fn new(name: &str, package: &'static str) -> Self {
        let mut command = Command::new(find(name).unwrap_or_else(|| PathBuf::from(name)));
        // Messages are shown to people and never parsed, but packagers' tools warn about a locale the machine lacks.
        command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        Self { command, name: name.to_owned(), package }
    }

    pub(crate) fn with(mut self, set: impl FnOnce(&mut Command)) -> Self {
        set(&mut self.command);
        self
    }

    /// Runs it and returns its standard output, at most 4 MiB of it.
    pub(crate) fn output(self) -> Result<Vec<u8>, ProgramError> {
        self.run(&mut |_| ())
    }

    /// Runs it, passing on each line of its standard error; returns its standard output.
    pub(crate) fn run(mut self, line: &mut dyn FnMut(&str)) -> Result<Vec<u8>, ProgramError> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = self.name;
        let child = self.command.spawn().map_err(|source| match source.kind() {
            ErrorKind::NotFound => ProgramError::Missing { program: program.clone(), package: self.package },
            _ => ProgramError::Start { program: program.clone(), source },
        })?;
        let mut child = Running(child);
        let stdout = child.0.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stdout) = stdout {
                let _ = stdout.by_ref().take(MAX_OUTPUT).read_to_end(&mut bytes);
                let _ = std::io::copy(&mut stdout, &mut std::io::sink());
            }
            bytes
        });
        let mut last = VecDeque::new();
        if let Some(stderr) = child.0.stderr.take() {
            let mut stderr = BufReader::new(stderr);
            let mut bytes = Vec::new();
            while matches!(stderr.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes), Ok(read) if read > 0) {
                let text = String::from_utf8_lossy(&bytes).trim_end().replace(|c: char| c.is_control(), " ");
                line(&text);
                if last.len() == LAST_LINES {
                    last.pop_front();
                }
                last.push_back(text);
                bytes.clear();
            }
        }
        let status = child.0.wait().map_err(|source| ProgramError::Start { program: program.clone(), source })?;
        let output = reader.join().unwrap_or_default();
        if status.success() {
            Ok(output)
        } else {
            Err(ProgramError::Failed { program, status, output: Vec::from(last).join("\n") })
        }
    }
}

/// Where a program is: in PATH, or in the system directories that an ordinary user's PATH leaves out (mke2fs is there).
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = Program::new("offshoot-no-such-program", "some-package").output().unwrap_err();
        assert!(error.to_string().contains("apt-get install some-package"), "{error}");
    }

    #[test]
    fn a_failure_shows_the_last_words() {
        let program = Program::new("sh", "dash").with(|c| {
            c.args(["-c", "echo out; for i in 1 2 3; do echo line $i >&2; done; exit 3"]);
        });
        let mut seen = Vec::new();
        let error = program.run(&mut |line| seen.push(line.to_owned())).unwrap_err();
        assert_eq!(seen, ["line 1", "line 2", "line 3"]);
        assert!(error.to_string().contains("line 3"), "{error}");
        let echo = Program::new("echo", "coreutils").with(|c| {
            c.arg("hello");
        });
        assert_eq!(echo.output().unwrap(), b"hello\n");
    }
}
