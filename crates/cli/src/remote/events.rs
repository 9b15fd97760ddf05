//! Server-sent events, as they come.

use http_body_util::BodyExt;
use hyper::{Response, body::Incoming};

use super::client::lost;
use crate::error::Failure;

/// Most bytes of one event: a verdict on a hundred forks has some hundred kilobytes.
const MOST: usize = 64 << 20;

/// An event.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// What it is.
    pub kind: String,
    /// What it says.
    pub data: String,
}

/// A stream of them.
pub struct Events {
    body: Incoming,
    lines: Lines,
}

impl Events {
    /// Of an answer.
    pub fn of(answer: Response<Incoming>) -> Self {
        Self { body: answer.into_body(), lines: Lines::default() }
    }

    /// The next one; none at the end.
    pub async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(event) = self.lines.event() {
                return Ok(Some(event));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(lost(&error)),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.lines.add(&bytes)?;
                    }
                }
            }
        }
    }
}

/// What has come and is no whole event yet.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    /// So many of them have no line end.
    searched: usize,
    event: Event,
}

impl Lines {
    fn add(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.bytes.len() + self.event.data.len() + bytes.len() > MOST {
            return Err(Failure::new("host_answer", "the daemon sent an event without end"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn event(&mut self) -> Option<Event> {
        while let Some(end) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=self.searched + end).collect();
            self.searched = 0;
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                // A comment that keeps the connection alive has neither.
                if !event.kind.is_empty() || !event.data.is_empty() {
                    return Some(event);
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut self.event.kind),
                "data" => {
                    if !self.event.data.is_empty() {
                        self.event.data.push('\n');
                    }
                    self.event.data.push_str(value);
                }
                _ => {}
            }
        }
        self.searched = self.bytes.len();
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_their_bytes_arrive() {
        let text = ": alive\n\nevent: log\ndata: {\"a\":\ndata: 1}\n\n:\r\n\r\nid: 7\r\nevent:end\r\ndata:{}\r\n\r\nevent: torn\n";
        let event = |kind: &str, data: &str| Event { kind: kind.into(), data: data.into() };
        for size in [1, 2, 3, 7, text.len()] {
            let (mut lines, mut events) = (Lines::default(), Vec::new());
            for part in text.as_bytes().chunks(size) {
                lines.add(part).unwrap();
                events.extend(std::iter::from_fn(|| lines.event()));
            }
            assert_eq!(events, [event("log", "{\"a\":\n1}"), event("end", "{}")], "in pieces of {size}");
        }
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut lines = Lines::default();
        let part = vec![b'x'; 8 << 20];
        assert!((0..9).any(|_| lines.add(&part).is_err()));
    }
}
