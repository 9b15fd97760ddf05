//! What a fork may reach, and what may reach it. Callers' texts become these types at the door; rules are made of these types only.

use std::{collections::BTreeSet, fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use thiserror::Error;

/// Most ranges of one [`Egress::Only`]. Each is a rule, and rules are tried in order for the first packet of every connection.
pub const MAX_EGRESS: usize = 64;

/// Most forwarded ports of a fork.
pub const MAX_FORWARDS: usize = 64;

/// Why a policy was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PolicyError {
    /// Not a form of `--egress`.
    #[error(
        "egress {given:?} is not valid: it is allow, deny, or ranges with commas (for example 10.0.0.0/8,2001:db8::/32)"
    )]
    Egress {
        /// What was given, cut.
        given: String,
    },
    /// Too many ranges or ports.
    #[error("too many {what}: at most {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: usize,
    },
    /// Not a form of `-p`.
    #[error(
        "the forwarded port {given:?} is not valid: it is HOST:GUEST or HOST:GUEST/udp, with ports from 1 to 65535 (for example 8080:80)"
    )]
    Forward {
        /// What was given, cut.
        given: String,
    },
    /// The same port of the host twice.
    #[error("the port {host}/{protocol} of the host is forwarded twice")]
    Twice {
        /// The port.
        host: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// Not a name of a net.
    #[error("the net's name {given:?} is not valid: {}", NetName::RULE)]
    NetName {
        /// What was given, cut.
        given: String,
    },
    /// A rate that would let nothing through.
    #[error("the rate {given} bytes per second is not valid: at least {}", Rate::LEAST)]
    Rate {
        /// What was given.
        given: u64,
    },
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Where a fork's own connections may go. Never to link-local addresses (a cloud's metadata service is one), to the host, or to other
/// forks, whatever this says; but always to forks that share its named net.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Anywhere.
    #[default]
    Allow,
    /// Nowhere. Answers to connections from outside still pass.
    Deny,
    /// To these ranges only.
    Only(BTreeSet<IpNet>),
}

impl FromStr for Egress {
    type Err = PolicyError;

    /// `allow`, `deny`, or ranges with commas; an address alone is a range of one.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let range = |part: &str| {
            let net = part.parse::<IpNet>().ok().or_else(|| part.parse::<IpAddr>().ok().map(IpNet::from));
            // Bits behind the prefix are a slip of the hand: 10.1.2.3/8 is not what was meant.
            net.filter(|net| *net == net.trunc()).ok_or_else(|| PolicyError::Egress { given: cut(text) })
        };
        match text {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            _ => Ok(Self::Only(text.split(',').map(range).collect::<Result<_, _>>()?)),
        }
    }
}

impl fmt::Display for Egress {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allow"),
            Self::Deny => f.write_str("deny"),
            Self::Only(ranges) => {
                let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                f.write_str(&ranges.join(","))
            }
        }
    }
}

/// A transport that ports are forwarded of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads to a port of the guest: on all its addresses, of loopback's only on 127.0.0.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Of what.
    pub protocol: Protocol,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl FromStr for Forward {
    type Err = PolicyError;

    /// `HOST:GUEST` or `HOST:GUEST/udp`.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let parse = || {
            let (ports, protocol) = match text.split_once('/') {
                None | Some((_, "tcp")) => (text.split('/').next()?, Protocol::Tcp),
                Some((ports, "udp")) => (ports, Protocol::Udp),
                Some(_) => return None,
            };
            let port = |text: &str| {
                let digits = text.bytes().all(|byte| byte.is_ascii_digit());
                text.parse::<u16>().ok().filter(|&port| digits && port != 0)
            };
            let (host, guest) = ports.split_once(':')?;
            Some(Self { protocol, host: port(host)?, guest: port(guest)? })
        };
        parse().ok_or_else(|| PolicyError::Forward { given: cut(text) })
    }
}

impl fmt::Display for Forward {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.guest, self.protocol)
    }
}

/// The name of a net that forks share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct NetName(String);

impl NetName {
    /// The rule, for people.
    pub const RULE: &'static str = "a net's name is 1 to 32 lower-case letters, digits or '-', and starts and ends with a letter or digit (for example web-1)";

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetName {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = text.as_bytes();
        let good = (1..=32).contains(&bytes.len())
            && bytes.iter().all(|&byte| plain(byte) || byte == b'-')
            && bytes.first().is_some_and(|&byte| plain(byte))
            && bytes.last().is_some_and(|&byte| plain(byte));
        if good { Ok(Self(text.to_owned())) } else { Err(PolicyError::NetName { given: cut(text) }) }
    }
}

impl fmt::Display for NetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for NetName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// How much may pass, in bytes per second, in each direction separately. Headers count from Ethernet's on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Rate(u64);

impl Rate {
    /// The least rate: below it a full packet takes longer than a retransmission waits.
    pub const LEAST: u64 = 2048;

    /// A rate.
    ///
    /// # Errors
    /// [`PolicyError::Rate`] below [`Self::LEAST`].
    pub fn new(bytes_per_second: u64) -> Result<Self, PolicyError> {
        if bytes_per_second < Self::LEAST {
            Err(PolicyError::Rate { given: bytes_per_second })
        } else {
            Ok(Self(bytes_per_second))
        }
    }

    /// In bytes per second.
    #[must_use]
    pub fn bytes_per_second(self) -> u64 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(u64::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// The whole policy of one fork. The default: anything outside, nothing of the host's, no other fork, nothing forwarded, no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Where its own connections may go.
    pub egress: Egress,
    /// The net that it shares with other forks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<NetName>,
    /// Ports of the host that lead to it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<Forward>,
    /// How much may pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
}

impl Policy {
    /// Checks the rules that the types alone do not hold.
    ///
    /// # Errors
    /// The first that is broken.
    pub fn check(&self) -> Result<(), PolicyError> {
        if matches!(&self.egress, Egress::Only(ranges) if ranges.len() > MAX_EGRESS) {
            return Err(PolicyError::TooMany { what: "ranges of egress", most: MAX_EGRESS });
        }
        if self.forwards.len() > MAX_FORWARDS {
            return Err(PolicyError::TooMany { what: "forwarded ports", most: MAX_FORWARDS });
        }
        let mut seen = BTreeSet::new();
        match self.forwards.iter().find(|forward| !seen.insert((forward.protocol, forward.host))) {
            Some(&Forward { protocol, host, .. }) => Err(PolicyError::Twice { host, protocol }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn egress_is_a_word_or_ranges() {
        assert_eq!("allow".parse(), Ok(Egress::Allow));
        assert_eq!("deny".parse(), Ok(Egress::Deny));
        let ranges =
            ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32"].map(|range| range.parse::<IpNet>().expect("a range"));
        assert_eq!("10.0.0.0/8,192.0.2.7,2001:db8::/32".parse(), Ok(Egress::Only(ranges.into_iter().collect())));
        for bad in
            ["", "Allow", "10.1.2.3/8", "10.0.0.0/33", "10.0.0.0/8,", "10.0.0.0/8 accept", "0.0.0.0/0; drop", "::/0\n"]
        {
            assert!(bad.parse::<Egress>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_printed_is_parsed_again_as_the_same() {
        for text in ["allow", "deny", "10.0.0.0/8,192.0.2.7/32,2001:db8::/32"] {
            assert_eq!(text.parse::<Egress>().map(|egress| egress.to_string()), Ok(text.into()));
        }
        for text in ["8080:80/tcp", "53:53/udp"] {
            assert_eq!(text.parse::<Forward>().map(|forward| forward.to_string()), Ok(text.into()));
        }
    }

    #[test]
    fn a_forward_is_two_ports() {
        let forward = |protocol| Forward { protocol, host: 8080, guest: 80 };
        assert_eq!("8080:80".parse(), Ok(forward(Protocol::Tcp)));
        assert_eq!("8080:80/tcp".parse(), Ok(forward(Protocol::Tcp)));
        assert_eq!("8080:80/udp".parse(), Ok(forward(Protocol::Udp)));
        for bad in [
            "",
            ":",
            "80",
            "0:80",
            "80:0",
            "65536:1",
            "+80:80",
            " 80:80",
            "80:80:80",
            "80:80/sctp",
            "80:80/tcp/udp",
            "80:80/",
        ] {
            assert!(bad.parse::<Forward>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_net_has_a_plain_name() {
        for good in ["a", "web-1", &"a".repeat(32)] {
            assert!(good.parse::<NetName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "../a", "a b", &"a".repeat(33)] {
            assert!(bad.parse::<NetName>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<NetName>(bad.into()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_port_of_the_host_is_forwarded_once() {
        let of = |texts: &[&str]| Policy {
            forwards: texts.iter().map(|text| text.parse().expect("good")).collect(),
            ..Policy::default()
        };
        assert!(of(&["80:80", "80:80/udp", "81:80"]).check().is_ok());
        assert_eq!(of(&["80:80", "80:81"]).check(), Err(PolicyError::Twice { host: 80, protocol: Protocol::Tcp }));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_fall(text in ".{0,200}") {
            let _ = (text.parse::<Egress>(), text.parse::<Forward>(), text.parse::<NetName>());
        }
    }
}
