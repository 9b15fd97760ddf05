//! Host names: `NAME.SUFFIX`, and `PORT-NAME.SUFFIX` for another port than the usual one.
//!
//! What a name means is decided by the name alone, not by which forks there are: digits of a port (1 to 65535, without zeros in front) and a dash
//! at its beginning are always a port. So nobody gets at the requests for `8080-web` by making a fork of that name; such a fork is reached with
//! a port before its name (`80-8080-web`) or by its id.

use std::{fmt, str::FromStr};

use identity::ForkName;
use thiserror::Error;

/// Longest suffix: a name of 63 characters before it still makes a host name (253, RFC 1035).
const MAX_SUFFIX: usize = 253 - 64;
/// Longest label of a host name (RFC 1035).
const MAX_LABEL: usize = 63;
/// Most characters of what was given that an error repeats.
const REPEATED: usize = 80;

/// The domain below which names are forks'. Lower case, without a dot at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suffix(String);

impl Suffix {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Suffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Suffix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let plain = lower.strip_prefix('.').unwrap_or(&lower);
        let is_label = |label: &str| {
            (1..=MAX_LABEL).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if plain.len() <= MAX_SUFFIX && plain.split('.').all(is_label) {
            Ok(Self(plain.to_owned()))
        } else {
            Err(format!(
                "a suffix is a domain name of at most {MAX_SUFFIX} characters, for example localhost or fork.test"
            ))
        }
    }
}

/// What a host name asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The fork's name, or its id.
    pub fork: ForkName,
    /// The port, if it is in the name.
    pub port: Option<u16>,
}

/// Why a host name leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HostError {
    /// There is none, there are several, or it is none.
    #[error("the request must name one host, as NAME.{suffix}")]
    Malformed {
        /// The suffix.
        suffix: Suffix,
    },
    /// It is not one of ours.
    #[error("{host:?} is not routed here: names are NAME.{suffix} or PORT-NAME.{suffix}")]
    Elsewhere {
        /// What was asked for, cut.
        host: String,
        /// The suffix.
        suffix: Suffix,
    },
    /// No fork can have this name.
    #[error("there is no fork {0:?}; see `offshoot ls`")]
    NoName(String),
}

impl Target {
    /// Of what a `Host` header, or the authority of a request's target, says.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn parse(host: &str, suffix: &Suffix) -> Result<Self, HostError> {
        let malformed = || HostError::Malformed { suffix: suffix.clone() };
        let elsewhere = || HostError::Elsewhere { host: cut(host), suffix: suffix.clone() };
        if host.is_empty() || host.bytes().any(|byte| !byte.is_ascii_graphic() || b"@/\\?#,\"<>".contains(&byte)) {
            return Err(malformed());
        }
        // An IPv6 address has colons of its own, and is nobody's name.
        if host.starts_with('[') {
            return Err(elsewhere());
        }
        let name = match host.split_once(':') {
            None => host,
            Some((name, port)) if port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            Some(_) => return Err(malformed()),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let label = name.strip_suffix(suffix.as_str()).and_then(|rest| rest.strip_suffix('.'));
        let label = label.filter(|label| !label.is_empty() && !label.contains('.')).ok_or_else(elsewhere)?;
        let (port, fork) = match label.split_once('-').and_then(|(digits, fork)| Some((port(digits)?, fork))) {
            Some((port, fork)) => (Some(port), fork),
            None => (None, label),
        };
        let fork = ForkName::parse(fork).map_err(|_| HostError::NoName(cut(label)))?;
        Ok(Self { fork, port })
    }
}

/// A port as a number is written: digits, no zeros in front.
fn port(digits: &str) -> Option<u16> {
    let plain = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

fn cut(text: &str) -> String {
    text.chars().take(REPEATED).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn suffix(text: &str) -> Suffix {
        text.parse().unwrap()
    }

    fn parse(host: &str) -> Result<(Option<u16>, String), HostError> {
        Target::parse(host, &suffix("fork.test")).map(|target| (target.port, target.fork.to_string()))
    }

    #[test]
    fn n4_a_host_name_is_a_fork_and_perhaps_a_port() {
        let id = "0123456789abcdef0123";
        for (host, port, fork) in [
            ("w-1.fork.test", None, "w-1"),
            ("W-1.Fork.TEST", None, "w-1"),
            ("w-1.fork.test.", None, "w-1"),
            ("w-1.fork.test:8080", None, "w-1"),
            ("w-1.fork.test.:8080", None, "w-1"),
            ("w-1.fork.test:", None, "w-1"),
            ("8080-w-1.fork.test", Some(8080), "w-1"),
            ("65535-w.fork.test", Some(65535), "w"),
            ("80-8080-w.fork.test", Some(80), "8080-w"),
            ("3000-0123456789abcdef0123.fork.test:1", Some(3000), id),
            ("0123456789abcdef0123.fork.test", None, id),
            // No ports: they are part of the name.
            ("0-w.fork.test", None, "0-w"),
            ("080-w.fork.test", None, "080-w"),
            ("65536-w.fork.test", None, "65536-w"),
            ("99999999999999999999-w.fork.test", None, "99999999999999999999-w"),
            ("8080.fork.test", None, "8080"),
        ] {
            assert_eq!(parse(host), Ok((port, fork.to_owned())), "{host}");
        }
    }

    #[test]
    fn n4_hostile_host_names_lead_nowhere() {
        let long = format!("{}.fork.test", "a".repeat(64));
        let elsewhere = [
            "localhost",
            "127.0.0.1",
            "127.0.0.1:80",
            "[::1]",
            "[::1]:80",
            "fork.test",
            ".fork.test",
            "w-1.fork.test.evil.org",
            "w-1.fork.tes",
            "w-1xfork.test",
            "a.b.fork.test",
            "..fork.test",
            "w-1.fork.test..",
            "evil.org",
            "w-1fork.test",
        ];
        for host in elsewhere {
            assert!(matches!(parse(host), Err(HostError::Elsewhere { .. })), "{host}: {:?}", parse(host));
        }
        let malformed = [
            "",
            " ",
            "w-1.fork.test ",
            " w-1.fork.test",
            "a@w-1.fork.test",
            "w-1.fork.test:80:80",
            "w-1.fork.test:x",
            "w-1.fork.test:-1",
            "w-1.fork.test:999999",
            "w-1.fork.test/x",
            "w-1\\.fork.test",
            "w-1.fork.test,x.fork.test",
            "w\0.fork.test",
            "w\r\n.fork.test",
            "ü.fork.test",
            "w-1.fork.test?",
            "w-1.fork.test#",
        ];
        for host in malformed {
            assert!(matches!(parse(host), Err(HostError::Malformed { .. })), "{host}: {:?}", parse(host));
        }
        let nobodys = [
            "-.fork.test",
            "80-.fork.test",
            "-w.fork.test",
            "w-.fork.test",
            "w_1.fork.test",
            "*.fork.test",
            "%77.fork.test",
            "80--w.fork.test",
            &long,
        ];
        for host in nobodys {
            assert!(matches!(parse(host), Err(HostError::NoName(_))), "{host}: {:?}", parse(host));
        }
        // What an error repeats is short.
        assert!(parse(&"x".repeat(10_000)).unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn a_suffix_is_a_domain() {
        for (text, plain) in [("localhost", "localhost"), (".Fork.Test", "fork.test"), ("a-b.c", "a-b.c")] {
            assert_eq!(suffix(text).as_str(), plain);
        }
        let long = "a.".repeat(100) + "a";
        for bad in
            ["", ".", "..a", "a..b", "a.", "-a", "a-", "a_b", "a/b", "*.a", "a b", "ü", "a:80", &"a".repeat(64), &long]
        {
            assert!(bad.parse::<Suffix>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn n4_every_fork_is_reached_by_a_port_before_its_name(name in "[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", port in 1..=u16::MAX) {
            let host = format!("{port}-{name}.fork.test");
            prop_assert_eq!(parse(&host), Ok((Some(port), name)));
        }

        #[test]
        fn n4_whatever_comes_is_parsed_or_refused(host in "\\PC{0,100}") {
            if let Ok((port, fork)) = parse(&host) {
                prop_assert!(host.to_ascii_lowercase().contains(&fork) && port != Some(0));
                let again = port.map_or_else(|| format!("{fork}.fork.test"), |port| format!("{port}-{fork}.fork.test"));
                prop_assert_eq!(parse(&again), Ok((port, fork)));
            }
        }
    }
}
