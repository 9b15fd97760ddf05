//! The network section of the identity document: who a fork is on the wire.
//!
//! It is absent for a fork without a network; then the guest touches nothing, and its card stays as the capture left it: down,
//! without an address. Where it is present, all of it is true: a guest that can not apply a part says so.
//!
//! As bytes ([`Network::to_bytes`]), after the rules of the document (numbers little endian, lists and texts by their length):
//!
//! | field | form |
//! |---|---|
//! | MAC address | 6 bytes |
//! | MTU | 4 bytes |
//! | IPv4, IPv6 | each: 4 bytes 0, or 4 bytes 1, the address, 4 bytes prefix, and the gateway: 4 bytes 0, or 4 bytes 1 and its address |
//! | MAC address of the gateways | 4 bytes 0, or 4 bytes 1 and 6 bytes |
//! | DNS servers | 4 bytes: how many; of each 4 bytes (4 or 16) and as many bytes of address |
//! | search domains | 4 bytes: how many; text each |
//! | where the ack goes | 4 bytes 0, or 4 bytes 1, an address as that of a DNS server, and 4 bytes port |
//!
//! A section with IPv4 and IPv6, gateways, one DNS server and an ack adds 116 bytes to a document; the largest there can be adds 1722. The
//! mailbox of the identity takes 65536 in all.

mod rules;
mod wire;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use thiserror::Error;

/// Most DNS servers: the C library asks no more (`MAXNS` of `resolv.h`).
pub const MAX_DNS: usize = 3;
/// Most search domains (`MAXDNSRCH` of `resolv.h`).
pub const MAX_SEARCH: usize = 6;
/// Longest search domain, in bytes (RFC 1035, without the dot at the end).
pub const MAX_DOMAIN: usize = 253;
/// The MTUs that a link may have, in bytes. Below 576 a host need not take a packet (RFC 791); a card takes no more than the other.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 576..=9000;
/// The least MTU of a link with IPv6 (RFC 8200, section 5): below it the kernel turns IPv6 off.
pub const IPV6_MIN_MTU: u16 = 1280;
/// Most bytes of a section; what is longer is refused before it is read.
pub const MAX_SECTION: usize = 2048;

/// A locally administered unicast MAC address. In text six pairs of lower-case hexadecimal digits with colons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddress([u8; 6]);

/// What is no MAC address of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "a MAC address is six pairs of hexadecimal digits with colons, locally administered and not multicast (for example 02:6f:64:70:00:02)"
)]
pub struct MacError;

impl MacAddress {
    /// The address of these bytes.
    ///
    /// # Errors
    /// It is multicast, or belongs to a maker of cards.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        // IEEE 802: the lowest bit of the first byte is "group", the next one "local".
        if bytes[0] & 0b11 == 0b10 { Ok(Self(bytes)) } else { Err(MacError) }
    }

    /// The address of these bytes, made locally administered and unicast.
    #[must_use]
    pub const fn local([first, b, c, d, e, f]: [u8; 6]) -> Self {
        Self([first & !0b11 | 0b10, b, c, d, e, f])
    }

    /// Its bytes, in the order in which they are sent.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let is_pair = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let pair = parts.next().filter(is_pair).ok_or(MacError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| MacError)?;
        }
        if parts.next().is_some() { Err(MacError) } else { Self::new(bytes) }
    }
}

impl Serialize for MacAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// An address of the card, and the way out for its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inet<A> {
    /// The card's address.
    pub address: A,
    /// Bits of the address that name its network. All of them on a link that is routed.
    pub prefix: u8,
    /// Where everything else goes. It is on the link, also when it is outside of the prefix.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub gateway: Option<A>,
}

fn none<A>() -> Option<A> {
    None
}

/// Who a fork is on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The card's address.
    pub mac: MacAddress,
    /// Longest packet, in bytes without Ethernet's header.
    pub mtu: u16,
    /// IPv4. At least one of the two is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Inet<Ipv4Addr>>,
    /// IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Inet<Ipv6Addr>>,
    /// The card of the gateways, where it is known: the guest then never asks for it, and nobody can give it another. With IPv6 it is to be
    /// given: a card without a link's own address can not ask whether a neighbour it knows is still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_mac: Option<MacAddress>,
    /// DNS servers, in the order in which they are asked. At most [`MAX_DNS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// Domains in which a short name is looked up. At most [`MAX_SEARCH`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Where the ack is sent as a datagram (UDP) too, until it is confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack: Option<SocketAddr>,
}

/// Why a section was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NetworkError {
    /// Not bytes of the section's form.
    #[error("the network section is malformed at byte {at}")]
    Malformed {
        /// Where, from 0.
        at: usize,
    },
    /// A field does not follow its rule.
    #[error("the network section's {field} is not valid: {rule}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its rule.
        rule: &'static str,
    },
}
