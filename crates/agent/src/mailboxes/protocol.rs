//! The local socket's protocol: one JSON object a line, in both directions.

use identity::{ForkId, MailboxName, Secret, ack, mailbox};
use serde::{Deserialize, de::IgnoredAny};
use thiserror::Error;

/// Longest line that a program may send, in bytes.
pub const MAX_LINE: usize = 16 * 1024;

/// What a program asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Plant a mailbox for it.
    Plant {
        /// Its name.
        name: MailboxName,
        /// Most bytes of a payload.
        capacity: usize,
        /// What a caller must know to send to it; empty for nothing.
        token: Vec<u8>,
    },
    /// It has planted one itself.
    Announce {
        /// Its name.
        name: MailboxName,
        /// Most bytes of a payload.
        capacity: usize,
        /// Its nonce.
        nonce: mailbox::Nonce,
    },
    /// It has applied what came; or it could not, for this reason.
    Answer {
        /// Which mailbox; `None` if it has one only.
        name: Option<MailboxName>,
        /// Why it failed.
        failure: Option<String>,
    },
    /// Pass on an ack that it signed itself.
    Relay(String),
}

/// Why a request was refused. `code` is for programs.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Not a request.
    #[error("the line is no request: {0}")]
    Malformed(String),
    /// A line that is too long; the connection ends.
    #[error("a line has at most {MAX_LINE} bytes")]
    TooLong,
    /// The agent's own names.
    #[error("names that start with offshoot: belong to the agent; choose another")]
    Reserved,
    /// The name is taken.
    #[error("a mailbox of this name is planted already; choose another name, or close the connection that has it")]
    Duplicate,
    /// Sixteen are planted.
    #[error("there are 16 mailboxes already, which is the most; close a connection that has one")]
    TooMany,
    /// No memory, or none that can be locked.
    #[error("there is no memory for the mailbox")]
    NoMemory,
    /// Nothing came that waits for an answer.
    #[error("nothing has come that waits for an answer")]
    NothingToAnswer,
    /// Several wait.
    #[error("several mailboxes of this connection wait for an answer; give the name")]
    Ambiguous,
    /// The host did not take the line.
    #[error("the host did not take the ack in time")]
    HostAway,
}

impl Refusal {
    /// For programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::TooLong => "too-long",
            Self::Reserved => "reserved-name",
            Self::Duplicate => "duplicate-name",
            Self::TooMany => "too-many",
            Self::NoMemory => "no-memory",
            Self::NothingToAnswer => "nothing-to-answer",
            Self::Ambiguous => "name-needed",
            Self::HostAway => "host-away",
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum Line {
    Plant { name: String, capacity: usize, token: Option<String> },
    Announce { name: String, capacity: usize, nonce: String },
    Ack { name: Option<String> },
    Fail { name: Option<String>, reason: String },
    Relay { line: String },
}

/// Reads a request.
///
/// # Errors
/// [`Refusal::Malformed`], which names the field.
pub fn parse(line: &[u8]) -> Result<Request, Refusal> {
    let malformed = |text: &str| Refusal::Malformed(text.to_owned());
    // serde's text is of the form, with names of fields, and perhaps a cut of the program's own line: it may know that.
    let line: Line = serde_json::from_slice(line).map_err(|error| Refusal::Malformed(error.to_string()))?;
    let name = |text: &str| MailboxName::parse(text).map_err(|error| Refusal::Malformed(error.to_string()));
    let capacity = |bytes: usize| match bytes {
        1..=mailbox::MAX_CAPACITY => Ok(bytes),
        _ => Err(malformed("capacity must be 1 to 65536")),
    };
    match line {
        Line::Plant { name: text, capacity: bytes, token } => {
            if token.as_ref().is_some_and(|token| !(1..=mailbox::MAX_TOKEN).contains(&token.len())) {
                return Err(malformed("a token has 1 to 128 bytes"));
            }
            Ok(Request::Plant {
                name: name(&text)?,
                capacity: capacity(bytes)?,
                token: token.unwrap_or_default().into_bytes(),
            })
        }
        Line::Announce { name: text, capacity: bytes, nonce } => Ok(Request::Announce {
            name: name(&text)?,
            capacity: capacity(bytes)?,
            nonce: unhex(&nonce).ok_or_else(|| malformed("nonce must be 32 hexadecimal digits, not all 0"))?,
        }),
        Line::Ack { name: text } => Ok(Request::Answer { name: text.as_deref().map(name).transpose()?, failure: None }),
        Line::Fail { name: text, reason } => {
            Ok(Request::Answer { name: text.as_deref().map(name).transpose()?, failure: Some(reason) })
        }
        Line::Relay { line } => {
            let printable = line.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
            if !line.starts_with("offshoot-ack ") || line.len() > ack::MAX_LINE || !printable {
                return Err(malformed("line must be an offshoot-ack line of at most 4096 printable bytes"));
            }
            Ok(Request::Relay(line))
        }
    }
}

/// The line that answers a request.
#[must_use]
pub fn reply(result: &Result<(), Refusal>) -> String {
    match result {
        Ok(()) => "{\"ok\":true}\n".to_owned(),
        Err(refusal) => {
            format!("{}\n", serde_json::json!({"ok": false, "error": refusal.to_string(), "code": refusal.code()}))
        }
    }
}

/// The line that brings a payload; `None` if the payload is no JSON object.
#[must_use]
pub fn filled(name: &MailboxName, fork: &ForkId, payload: &[u8]) -> Option<Secret> {
    let first = payload.iter().find(|byte| !byte.is_ascii_whitespace());
    if first != Some(&b'{') || serde_json::from_slice::<IgnoredAny>(payload).is_err() {
        return None;
    }
    // Names and ids need no escapes. In valid JSON a line break is only ever white space.
    let head = format!("{{\"event\":\"filled\",\"mailbox\":\"{name}\",\"fork\":\"{fork}\",\"payload\":");
    let mut line = Vec::with_capacity(head.len() + payload.len() + 2);
    line.extend_from_slice(head.as_bytes());
    line.extend(payload.iter().map(|&byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }));
    line.extend_from_slice(b"}\n");
    Some(Secret::new(line))
}

fn unhex(text: &str) -> Option<mailbox::Nonce> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut nonce = [0; 16];
    for (index, byte) in nonce.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    (nonce != [0; 16]).then_some(nonce)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn code(line: &str) -> &'static str {
        parse(line.as_bytes()).unwrap_err().code()
    }

    #[test]
    fn requests_are_read() {
        let plant = parse(br#"{"op":"plant","name":"app:config","capacity":4096,"token":"t"}"#).unwrap();
        let name = MailboxName::parse("app:config").unwrap();
        assert_eq!(plant, Request::Plant { name: name.clone(), capacity: 4096, token: b"t".to_vec() });
        assert_eq!(parse(br#"{"op":"ack"}"#).unwrap(), Request::Answer { name: None, failure: None });
        let fail = parse(br#"{"op":"fail","name":"app:config","reason":"no"}"#).unwrap();
        assert_eq!(fail, Request::Answer { name: Some(name), failure: Some("no".into()) });
    }

    #[test]
    fn hostile_lines_are_refused() {
        for line in [
            "",
            "{}",
            "[]",
            r#"{"op":"plant"}"#,
            r#"{"op":"other"}"#,
            r#"{"op":"plant","name":"a b","capacity":1}"#,
            r#"{"op":"plant","name":"a","capacity":0}"#,
            r#"{"op":"plant","name":"a","capacity":65537}"#,
            r#"{"op":"plant","name":"a","capacity":-1}"#,
            r#"{"op":"plant","name":"a","capacity":1,"token":""}"#,
            r#"{"op":"plant","name":"a","capacity":1,"extra":1}"#,
            r#"{"op":"announce","name":"a","capacity":1,"nonce":"00000000000000000000000000000000"}"#,
            r#"{"op":"announce","name":"a","capacity":1,"nonce":"+1000000000000000000000000000000"}"#,
            r#"{"op":"relay","line":"other"}"#,
            r#"{"op":"relay","line":"offshoot-ack v=1\nforged"}"#,
        ] {
            assert_eq!(code(line), "malformed", "{line}");
        }
        let long = format!(r#"{{"op":"plant","name":"a","capacity":1,"token":"{}"}}"#, "t".repeat(129));
        assert_eq!(code(&long), "malformed");
    }

    #[test]
    fn an_event_is_one_line_whatever_the_payload() {
        let (name, fork) = (MailboxName::parse("a").unwrap(), ForkId::parse(&"0".repeat(20)).unwrap());
        let line = filled(&name, &fork, b" {\n\"a\":\r\n[1.10]\n}").unwrap();
        assert_eq!(line.expose().iter().filter(|&&byte| byte == b'\n').count(), 1);
        let value: serde_json::Value = serde_json::from_slice(line.expose()).unwrap();
        assert_eq!(value["payload"]["a"][0], 1.1);
        for bad in [&b"[]"[..], b"", b"{", b"{}{}", b"{}}", b"1"] {
            assert!(filled(&name, &fork, bad).is_none());
        }
    }
}
