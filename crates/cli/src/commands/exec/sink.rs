//! Where a command's output goes: out as it is, because it is what was asked for; with `--json`, line by line.

use std::{
    cell::Cell,
    io::{self, Write},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use tokio::io::AsyncWrite;

/// Whether the command wrote anything since it was last asked.
#[derive(Debug, Clone, Default)]
pub struct Heard(Rc<Cell<bool>>);

impl Heard {
    /// Asks, and forgets.
    pub fn take(&self) -> bool {
        self.0.replace(false)
    }
}

/// Which of the command's streams.
#[derive(Debug, Clone, Copy)]
pub enum Stream {
    /// Its standard output.
    Stdout,
    /// Its standard error.
    Stderr,
}

/// Takes what the guest sends. It writes at once: there is nothing else to do before that is out.
#[derive(Debug)]
pub struct Sink {
    stream: Stream,
    json: bool,
    heard: Heard,
}

impl Sink {
    /// For a stream.
    pub fn new(stream: Stream, json: bool, heard: &Heard) -> Self {
        Self { stream, json, heard: heard.clone() }
    }

    fn put(&self, bytes: &[u8]) -> io::Result<()> {
        self.heard.0.set(true);
        match self.stream {
            _ if self.json => {
                let mut line = serde_json::to_vec(&self.line(bytes))?;
                line.push(b'\n');
                write(io::stdout().lock(), &line)
            }
            Stream::Stdout => write(io::stdout().lock(), bytes),
            // A closed standard error must not end the command: its output may still be read.
            Stream::Stderr => write(io::stderr().lock(), bytes).or(Ok(())),
        }
    }

    fn line(&self, bytes: &[u8]) -> serde_json::Value {
        match self.stream {
            Stream::Stdout => json!({ "stdout_base64": STANDARD.encode(bytes) }),
            Stream::Stderr => json!({ "stderr_base64": STANDARD.encode(bytes) }),
        }
    }
}

fn write(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

impl AsyncWrite for Sink {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.put(bytes).map(|()| bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_survive_as_json() {
        let line = |stream| Sink::new(stream, true, &Heard::default()).line(b"\xff\x00").to_string();
        assert_eq!(line(Stream::Stdout), r#"{"stdout_base64":"/wA="}"#);
        assert_eq!(line(Stream::Stderr), r#"{"stderr_base64":"/wA="}"#);
    }
}
