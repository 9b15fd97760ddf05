//! What the agent's audit of a template has found, on its way into the manifest: the guest's words, so they are bounded and cleaned.

use std::{error::Error, fmt};

use guest_api::proto;
use store::{Finding, FoundProcess};

/// Most findings, and most characters of their parts.
const MAX_FINDINGS: usize = 64;
const MAX_NAME: usize = 64;
const MAX_TEXT: usize = 1000;

/// All of one audit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    /// At most 64.
    pub(crate) list: Vec<Finding>,
    /// How many more there were.
    pub(crate) left_out: u32,
}

impl Findings {
    pub(crate) fn of(reply: &proto::QuiesceReply) -> Self {
        let list: Vec<Finding> = reply.findings.iter().take(MAX_FINDINGS).map(finding).collect();
        let over = u32::try_from(reply.findings.len() - list.len()).unwrap_or(u32::MAX);
        Self { list, left_out: reply.findings_left_out.saturating_add(over) }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.list.len() + self.left_out as usize
    }
}

fn finding(told: &proto::Finding) -> Finding {
    let process = (told.pid != 0).then(|| FoundProcess {
        pid: told.pid,
        name: line(&told.process, MAX_NAME),
        service: Some(line(&told.service, MAX_NAME)).filter(|service| !service.is_empty()),
    });
    let kind: String = told.kind.chars().filter(|c| c.is_ascii_lowercase() || *c == '_').take(MAX_NAME).collect();
    let kind = if kind.is_empty() { "unknown".to_owned() } else { kind };
    Finding { kind, process, reason: line(&told.reason, MAX_TEXT), cure: line(&told.cure, MAX_TEXT) }
}

/// A text of a guest as one line of bounded length that drives no terminal.
fn line(text: &str, longest: usize) -> String {
    text.chars().take(longest).map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}

/// Findings as the causes of an error: each is the source of the one before.
#[derive(Debug)]
pub struct FindingsError {
    text: String,
    next: Option<Box<Self>>,
}

impl FindingsError {
    /// `None` if there is none.
    pub(crate) fn of(findings: &Findings) -> Option<Box<Self>> {
        let more = (findings.left_out > 0).then(|| format!("and {} more", findings.left_out));
        let texts = findings.list.iter().map(|finding| format!("{finding}\ncure: {}", finding.cure)).chain(more);
        texts.collect::<Vec<_>>().into_iter().rev().fold(None, |next, text| Some(Box::new(Self { text, next })))
    }
}

impl fmt::Display for FindingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for FindingsError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.next.as_deref().map(|next| next as &(dyn Error + 'static))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn told(reason: &str) -> proto::Finding {
        proto::Finding {
            kind: "tcp_connection".into(),
            pid: 7,
            process: "nc".into(),
            service: "web".into(),
            reason: reason.into(),
            cure: "close it".into(),
        }
    }

    #[test]
    fn i17_what_a_guest_tells_is_bounded_and_cleaned() {
        let mut findings = vec![told(&"x".repeat(5000)); 70];
        findings[0] = proto::Finding {
            kind: "\u{1b}[2J".into(),
            pid: 0,
            reason: "a\nb\u{1b}".into(),
            ..proto::Finding::default()
        };
        let found = Findings::of(&proto::QuiesceReply { findings, findings_left_out: 3, ..Default::default() });
        assert_eq!((found.list.len(), found.left_out, found.count()), (64, 9, 73));
        assert_eq!(found.list[0].to_string(), "unknown: a\u{fffd}b\u{fffd}");
        assert_eq!(found.list[1].reason.len(), MAX_TEXT);
    }

    #[test]
    fn i17_an_error_has_every_finding_among_its_causes() {
        let reply = proto::QuiesceReply {
            findings: vec![told("has one"), told("has another")],
            findings_left_out: 2,
            ..Default::default()
        };
        let error = FindingsError::of(&Findings::of(&reply)).unwrap();
        let mut texts = vec![error.to_string()];
        let mut next = error.source();
        while let Some(error) = next {
            texts.push(error.to_string());
            next = error.source();
        }
        assert_eq!(texts[0], "tcp_connection: nc (process 7 of service web) has one\ncure: close it");
        assert_eq!(
            texts[1..],
            ["tcp_connection: nc (process 7 of service web) has another\ncure: close it", "and 2 more"]
        );
        assert!(FindingsError::of(&Findings::default()).is_none());
    }
}
