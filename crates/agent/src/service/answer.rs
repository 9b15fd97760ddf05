//! Reads what a runtime answers: one line, one JSON object, in which NaN, Infinity and -Infinity may stand for a number.
//!
//! The runtime is the workload's, so the line is hostile: it is scanned once, completely and without recursion, and the
//! value is then passed on as the text it was.

use std::collections::BTreeMap;

use thiserror::Error;

/// Longest line, in bytes, in both directions.
pub(crate) const MAX_LINE: usize = 4 << 20;

/// Deepest nesting. Common JSON readers refuse more than 128.
const MAX_DEPTH: usize = 120;

/// Most entries of a report that count.
const MAX_REPORT: usize = 16;

/// Longest name or outcome of a report.
const MAX_WORD: usize = 48;

/// What a runtime said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// `told`: whether it wants to be told if a capture is given up.
    Ready {
        told: bool,
    },
    Done {
        id: u64,
        report: Vec<(String, String)>,
        in_place: Option<String>,
    },
    Result {
        id: u64,
        value: String,
        repr: String,
        stdout: String,
        stderr: String,
    },
    Error {
        id: u64,
        too_large: bool,
        message: String,
        stack: String,
        stdout: String,
        stderr: String,
    },
}

/// Why a line is no answer. It does not repeat the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum AnswerError {
    #[error("the line is not UTF-8")]
    NotText,
    #[error("the line is not JSON at byte {0}")]
    Malformed(usize),
    #[error("the answer is nested deeper than {MAX_DEPTH}")]
    TooDeep,
    #[error("the answer's {0} is absent or of the wrong kind")]
    Field(&'static str),
}

impl Answer {
    pub(crate) fn parse(line: &[u8]) -> Result<Self, AnswerError> {
        if let Some(done) = usual_done(line) {
            return Ok(done);
        }
        let text = str::from_utf8(line).map_err(|_| AnswerError::NotText)?;
        let fields = scan(text)?;
        let raw = |name: &'static str| fields.get(name).copied().ok_or(AnswerError::Field(name));
        let string = |name| text_of(raw(name)?).ok_or(AnswerError::Field(name));
        let optional = |name| fields.get(name).map_or(Ok(String::new()), |_| string(name));
        let id = || raw("id")?.parse().map_err(|_| AnswerError::Field("id"));
        match string("type")?.as_str() {
            "ready" => Ok(Self::Ready { told: fields.get("continue") == Some(&"true") }),
            "done" => Ok(Self::Done {
                id: id()?,
                report: fields.get("report").map_or(Ok(Vec::new()), |raw| report(raw))?,
                in_place: fields.get("in_place").map(|&raw| raw.to_owned()),
            }),
            "result" => Ok(Self::Result {
                id: id()?,
                value: raw("value")?.to_owned(),
                repr: optional("repr")?,
                stdout: optional("stdout")?,
                stderr: optional("stderr")?,
            }),
            "error" => Ok(Self::Error {
                id: id()?,
                too_large: optional("kind")? == "too-large",
                message: string("message")?,
                stack: optional("stack")?,
                stdout: optional("stdout")?,
                stderr: optional("stderr")?,
            }),
            _ => Err(AnswerError::Field("type")),
        }
    }

    pub(crate) fn id(&self) -> Option<u64> {
        match self {
            Self::Ready { .. } => None,
            Self::Done { id, .. } | Self::Result { id, .. } | Self::Error { id, .. } => Some(*id),
        }
    }
}

/// Text as a JSON string. (By hand: this is on a fork's way to its ack, where every library function is cold.)
pub(crate) fn push_string(line: &mut String, text: &str) {
    line.push('"');
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            c if c < ' ' => {
                line.push_str("\\u00");
                let code = u32::from(c);
                line.push(char::from_digit(code >> 4, 16).unwrap_or('0'));
                line.push(char::from_digit(code & 15, 16).unwrap_or('0'));
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

/// An object of strings.
pub(crate) fn push_object<'a>(line: &mut String, members: impl Iterator<Item = (&'a str, &'a str)>) {
    line.push('{');
    for (index, (name, value)) in members.enumerate() {
        if index > 0 {
            line.push(',');
        }
        push_string(line, name);
        line.push(':');
        push_string(line, value);
    }
    line.push('}');
}

/// A `done` as the runtimes of ours write it, with nothing in it that would have to be changed for an ack; any other
/// line is left to [`scan`]. This is on a fork's way to its ack, where a general parser's code is cold.
fn usual_done(line: &[u8]) -> Option<Answer> {
    let word = |rest: &mut &[u8]| {
        let text = rest.strip_prefix(b"\"")?;
        let len = text.iter().position(|&byte| !is_plain(byte)).filter(|len| (1..=MAX_WORD).contains(len))?;
        *rest = text[len..].strip_prefix(b"\"")?;
        str::from_utf8(&text[..len]).ok().map(ToOwned::to_owned)
    };
    let rest = line.strip_prefix(br#"{"type":"done","id":"#)?;
    let digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    // One digit less than the largest number has, so that it fits.
    if !(1..=19).contains(&digits) || digits > 1 && rest[0] == b'0' {
        return None;
    }
    let id = rest[..digits].iter().fold(0, |id: u64, digit| id * 10 + u64::from(digit - b'0'));
    let mut rest = rest[digits..].strip_prefix(br#","report":{"#)?.strip_suffix(b"}}")?;
    let mut report: Vec<(String, String)> = Vec::new();
    while !rest.is_empty() {
        let name = word(&mut rest)?;
        rest = rest.strip_prefix(b":")?;
        let outcome = word(&mut rest)?;
        if report.len() == MAX_REPORT || report.iter().any(|(earlier, _)| *earlier == name) {
            return None;
        }
        report.push((name, outcome));
        rest = match rest {
            [] => rest,
            [b',', next @ ..] if !next.is_empty() => next,
            _ => return None,
        };
    }
    Some(Answer::Done { id, report, in_place: None })
}

/// What may stand in an ack as it is.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'_' | b'.')
}

fn text_of(raw: &str) -> Option<String> {
    serde_json::from_str(raw).ok()
}

/// A report's entries, as names and outcomes that may stand in an ack.
pub(crate) fn report(raw: &str) -> Result<Vec<(String, String)>, AnswerError> {
    if !raw.starts_with('{') {
        return Err(AnswerError::Field("report"));
    }
    let plain = |text: &str| -> String {
        text.chars().map(|c| if u8::try_from(c).is_ok_and(is_plain) { c } else { '-' }).take(MAX_WORD).collect()
    };
    // In the order of the names, which is as good as any other.
    let entry = |(name, raw): (&str, &str)| {
        let outcome = text_of(raw).unwrap_or_else(|| raw.to_owned());
        (plain(name), plain(&outcome))
    };
    let usable = |(name, outcome): &(String, String)| !name.is_empty() && !outcome.is_empty();
    Ok(scan(raw)?.into_iter().map(entry).filter(usable).take(MAX_REPORT).collect())
}

/// The members of the object that `text` is, each as its raw text. A name with an escape in it is left out: none of
/// ours has one.
fn scan(text: &str) -> Result<BTreeMap<&str, &str>, AnswerError> {
    let mut scanner = Scanner { bytes: text.as_bytes(), at: 0 };
    let mut members = BTreeMap::new();
    scanner.spaces();
    scanner.byte(b'{')?;
    scanner.spaces();
    if !scanner.skip(b'}') {
        loop {
            scanner.spaces();
            let start = scanner.at;
            scanner.string()?;
            let name = &text[start + 1..scanner.at - 1];
            scanner.spaces();
            scanner.byte(b':')?;
            scanner.spaces();
            let start = scanner.at;
            scanner.value()?;
            if !name.contains('\\') && members.insert(name, &text[start..scanner.at]).is_some() {
                return Err(AnswerError::Malformed(start));
            }
            scanner.spaces();
            if !scanner.skip(b',') {
                break;
            }
        }
        scanner.byte(b'}')?;
    }
    scanner.spaces();
    if scanner.at == text.len() { Ok(members) } else { Err(AnswerError::Malformed(scanner.at)) }
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn byte(&mut self, byte: u8) -> Result<(), AnswerError> {
        if self.skip(byte) { Ok(()) } else { self.malformed() }
    }

    fn malformed<T>(&self) -> Result<T, AnswerError> {
        Err(AnswerError::Malformed(self.at))
    }

    fn spaces(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    /// One value; its containers are a stack of their closing brackets.
    fn value(&mut self) -> Result<(), AnswerError> {
        let mut open: Vec<u8> = Vec::new();
        loop {
            self.spaces();
            match self.peek() {
                Some(bracket @ (b'{' | b'[')) => {
                    if open.len() == MAX_DEPTH {
                        return Err(AnswerError::TooDeep);
                    }
                    self.at += 1;
                    self.spaces();
                    let close = if bracket == b'{' { b'}' } else { b']' };
                    if !self.skip(close) {
                        open.push(close);
                        self.name(close)?;
                        continue;
                    }
                }
                Some(b'"') => self.string()?,
                Some(b't') => self.word(b"true")?,
                Some(b'f') => self.word(b"false")?,
                Some(b'n') => self.word(b"null")?,
                _ => self.number()?,
            }
            // After a value: the ends of containers, or the next one's comma.
            loop {
                let Some(&close) = open.last() else { return Ok(()) };
                self.spaces();
                if self.skip(close) {
                    open.pop();
                } else {
                    self.byte(b',')?;
                    self.name(close)?;
                    break;
                }
            }
        }
    }

    /// In an object, a member's name and colon.
    fn name(&mut self, close: u8) -> Result<(), AnswerError> {
        if close == b'}' {
            self.spaces();
            self.string()?;
            self.spaces();
            self.byte(b':')?;
        }
        Ok(())
    }

    fn word(&mut self, word: &[u8]) -> Result<(), AnswerError> {
        if self.bytes[self.at..].starts_with(word) {
            self.at += word.len();
            Ok(())
        } else {
            self.malformed()
        }
    }

    fn number(&mut self) -> Result<(), AnswerError> {
        if self.peek() == Some(b'N') {
            return self.word(b"NaN");
        }
        self.skip(b'-');
        if self.peek() == Some(b'I') {
            return self.word(b"Infinity");
        }
        if !self.skip(b'0') {
            self.digits()?;
        }
        if self.skip(b'.') {
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if !self.skip(b'+') {
                self.skip(b'-');
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), AnswerError> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at > start { Ok(()) } else { self.malformed() }
    }

    fn string(&mut self) -> Result<(), AnswerError> {
        self.byte(b'"')?;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    self.at += 1;
                    self.escape()?;
                }
                Some(byte) if byte >= b' ' => self.at += 1,
                _ => return self.malformed(),
            }
        }
    }

    fn escape(&mut self) -> Result<(), AnswerError> {
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 1;
                Ok(())
            }
            Some(b'u') => match self.unit()? {
                // Half a pair is no character; strict readers refuse it.
                0xd800..=0xdbff => {
                    self.byte(b'\\')?;
                    if matches!(self.unit()?, 0xdc00..=0xdfff) { Ok(()) } else { self.malformed() }
                }
                0xdc00..=0xdfff => self.malformed(),
                _ => Ok(()),
            },
            _ => self.malformed(),
        }
    }

    fn unit(&mut self) -> Result<u32, AnswerError> {
        self.byte(b'u')?;
        let mut unit = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| char::from(byte).to_digit(16));
            let Some(digit) = digit else { return self.malformed() };
            unit = unit << 4 | digit;
            self.at += 1;
        }
        Ok(unit)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn value(text: &str) -> Result<String, AnswerError> {
        let line = format!(r#"{{"type":"result","id":7,"value":{text}}}"#);
        match Answer::parse(line.as_bytes())? {
            Answer::Result { id: 7, value, .. } => Ok(value),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn values_pass_through_as_they_are() {
        let texts = [
            "null",
            "true",
            "[]",
            "{}",
            "-0",
            "1e+9",
            "0.5E-3",
            "NaN",
            "Infinity",
            "-Infinity",
            r#"[1, {"a": [NaN, "\u00e9\ud83d\ude00\n"]}, [[]]]"#,
            "123456789012345678901234567890123456789012345678901234567890",
            "\"é\"",
        ];
        for text in texts {
            assert_eq!(value(text).as_deref(), Ok(text));
        }
    }

    #[test]
    fn what_is_not_json_is_refused() {
        let texts = [
            "",
            "01",
            "+1",
            ".5",
            "1.",
            "1e",
            "nan",
            "-NaN",
            "inf",
            "'a'",
            "\"\\x\"",
            "\"\\ud800\"",
            "\"\\udc00\"",
            "\"\\ud800\\u0041\"",
            "\"a\u{1}\"",
            "[1,]",
            "[1",
            "{\"a\"}",
            "{1:2}",
            "{\"a\":1,}",
            "[1}",
            "1 2",
            "\"",
            "tru",
            "1}{",
            "1,\"id\":8",
        ];
        for text in texts {
            assert!(value(text).is_err(), "{text}");
        }
        assert_eq!(Answer::parse(b"{\"type\":\"ready\"}\xff"), Err(AnswerError::NotText));
        assert_eq!(Answer::parse(b"{\"type\":\"other\"}"), Err(AnswerError::Field("type")));
        assert_eq!(Answer::parse(b"{\"type\":\"done\",\"id\":-1}"), Err(AnswerError::Field("id")));
    }

    #[test]
    fn nesting_is_bounded_and_needs_no_stack() {
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(value(&deep(MAX_DEPTH)).is_ok());
        assert_eq!(value(&deep(MAX_DEPTH + 2)), Err(AnswerError::TooDeep));
        assert_eq!(value(&"[".repeat(1 << 20)), Err(AnswerError::TooDeep));
    }

    #[test]
    fn the_usual_answer_reads_as_the_general_parser_reads_it() {
        let usual = br#"{"type":"done","id":17,"report":{"environ":"set","random":"reseeded-2"}}"#;
        let report = [("environ", "set"), ("random", "reseeded-2")].map(|(n, o)| (n.to_owned(), o.to_owned())).to_vec();
        assert_eq!(usual_done(usual), Some(Answer::Done { id: 17, report: report.clone(), in_place: None }));
        // A space more, and the general parser has it.
        let general = br#"{"type":"done", "id":17,"report":{"environ":"set","random":"reseeded-2"}}"#;
        assert_eq!(usual_done(general), None);
        assert_eq!(Answer::parse(general), Ok(Answer::Done { id: 17, report, in_place: None }));
        let empty = br#"{"type":"done","id":0,"report":{}}"#;
        assert_eq!(usual_done(empty), Some(Answer::Done { id: 0, report: Vec::new(), in_place: None }));
        for other in [
            &br#"{"type":"done","id":01,"report":{}}"#[..],
            br#"{"type":"done","id":18446744073709551616,"report":{}}"#,
            br#"{"type":"done","id":1,"report":{"a":"b",}}"#,
            br#"{"type":"done","id":1,"report":{"a":"b","a":"c"}}"#,
            br#"{"type":"done","id":1,"report":{"a":"b=c"}}"#,
            br#"{"type":"done","id":1,"report":{"":"b"}}"#,
            br#"{"type":"done","id":1,"report":{"a":"b""c":"d"}}"#,
            br#"{"type":"done","id":1,"report":{"a":"b"}"#,
            br#"{"type":"done","id":,"report":{}}"#,
            br#"{"type":"result","id":1,"value":1}"#,
        ] {
            assert_eq!(usual_done(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn a_report_can_not_forge_fields_of_the_ack() {
        let line = br#"{"type":"done","id":1,"report":{"numpy":"reseeded:3","x hmac=0":"a,b:c","n":4,"":"x"}}"#;
        let Answer::Done { report, .. } = Answer::parse(line).unwrap() else { panic!() };
        let expected = [("n", "4"), ("numpy", "reseeded-3"), ("x-hmac-0", "a-b-c")];
        assert_eq!(report, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn strings_are_written_so_that_they_read_the_same() {
        let text = "a\"b\\c\nd\te\u{1}\u{1f}é😀\u{7f}";
        let mut line = String::new();
        push_string(&mut line, text);
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), text);
    }
}
