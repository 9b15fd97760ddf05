//! Addresses: a pool, and what one lease of it gives. One number decides all three addresses of a fork, so that they are unique together.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use identity::{ForkId, MacAddress};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The default pool. It is in the range for addresses that only a carrier's own network sees (RFC 6598), where neither an office, a
/// cloud's private network nor a container network usually is, and in its upper half, because clouds take from the lower end.
const DEFAULT_V4: (Ipv4Addr, u8) = (Ipv4Addr::new(100, 112, 0, 0), 16);

/// The default pool for IPv6: unique local (RFC 4193), its global id drawn once at random. It is translated, never routed outside.
const DEFAULT_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd3b, 0x7c52, 0x9e1d, 0, 0, 0, 0, 0), 64);

/// The longest IPv6 prefix of a pool: below it there must be room for an IPv4 address.
const LONGEST_V6_PREFIX: u8 = 96;

/// The longest IPv4 prefix of a pool: four addresses, of which one can be leased.
const LONGEST_V4_PREFIX: u8 = 30;

/// The longest packet on a fork's link, in bytes without Ethernet's header.
pub const MTU: u16 = 1500;

/// Of the gateway in every fork's namespace. The same everywhere, so that a fork that remembers its template's gateway is not wrong.
pub const GATEWAY_MAC: MacAddress = MacAddress::local([0x0e, 0x6f, 0x66, 0, 0, 1]);

/// The guest's, unique because its address is.
fn mac_of_guest(address: Ipv4Addr) -> MacAddress {
    let [a, b, c, d] = address.octets();
    MacAddress::local([0x02, 0x6f, a, b, c, d])
}

/// Of a guest whose address says nothing about it: every fork in mode `user` has the same. 44 of the id's random bits.
///
/// The second digit is 2, which that of [`GATEWAY_MAC`] is not.
pub(crate) fn mac_of_fork(id: &ForkId) -> MacAddress {
    let mut bytes = [0; 6];
    for (at, byte) in bytes.iter_mut().enumerate() {
        let digits = id.as_str().get(2 * at..2 * at + 2);
        *byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).unwrap_or(0);
    }
    bytes[0] &= 0xf0;
    MacAddress::local(bytes)
}

/// Of both ends of the wire out of the fork's namespace (see `netlink::link::new_wire`).
pub(crate) fn mac_of_wire(address: Ipv4Addr) -> MacAddress {
    let [a, b, c, d] = address.octets();
    MacAddress::local([0x06, 0x6f, a, b, c, d])
}

/// What one lease gives a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Addresses {
    /// The guest's card.
    pub mac: MacAddress,
    /// The guest's IPv4 address; its prefix is /32.
    pub v4: Ipv4Addr,
    /// The gateway, on the link (RTNH_F_ONLINK): it is not within the guest's /32.
    pub gateway_v4: Ipv4Addr,
    /// The pool that the address is from: all of it belongs to forks.
    pub pool_v4: Ipv4Net,
    /// The guest's IPv6 address; its prefix is /128.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Addr>,
    /// The gateway for IPv6, on the link; there if `v6` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v6: Option<Ipv6Addr>,
    /// The pool that the IPv6 address is from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_v6: Option<Ipv6Net>,
}

/// A range of addresses that forks are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PoolText")]
pub struct Pool {
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolText {
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
}

impl TryFrom<PoolText> for Pool {
    type Error = PoolError;
    fn try_from(text: PoolText) -> Result<Self, PoolError> {
        Self::new(text.v4, text.v6)
    }
}

/// Why a range can not be a pool.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PoolError {
    /// Bits are set behind the prefix.
    #[error("{given} is not a range: the one that holds it is {range}")]
    NotARange {
        /// What was given.
        given: ipnet::IpNet,
        /// What may have been meant.
        range: ipnet::IpNet,
    },
    /// Nothing could be leased, or two forks would get one IPv6 address.
    #[error(
        "the pool {given} is too small: an IPv4 range has a prefix of at most /30, an IPv6 range one of at most /96"
    )]
    TooSmall {
        /// What was given.
        given: ipnet::IpNet,
    },
    /// Addresses no host may have.
    #[error("the range {given} can not be leased: it holds loopback, link-local, multicast or reserved addresses")]
    Special {
        /// What was given.
        given: ipnet::IpNet,
    },
}

/// A text that is no pool.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PoolTextError {
    /// Not one IPv4 range, and at most one IPv6 range after it.
    #[error(
        "a pool is an IPv4 range, or an IPv4 and an IPv6 range with a comma (for example 100.112.0.0/16,fd3b:7c52:9e1d::/64)"
    )]
    Form,
    /// Ranges that can not be leased.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

impl FromStr for Pool {
    type Err = PoolTextError;

    /// `RANGE4` or `RANGE4,RANGE6`.
    fn from_str(text: &str) -> Result<Self, PoolTextError> {
        let (v4, v6) = text.split_once(',').map_or((text, None), |(v4, v6)| (v4, Some(v6)));
        let v4 = v4.parse().map_err(|_| PoolTextError::Form)?;
        let v6 = v6.map(str::parse).transpose().map_err(|_| PoolTextError::Form)?;
        Ok(Self::new(v4, v6)?)
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            v4: Ipv4Net::new_assert(DEFAULT_V4.0, DEFAULT_V4.1),
            v6: Some(Ipv6Net::new_assert(DEFAULT_V6.0, DEFAULT_V6.1)),
        }
    }
}

impl Pool {
    /// A pool of IPv4 addresses and, for forks that are to have both, IPv6 addresses.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn new(v4: Ipv4Net, v6: Option<Ipv6Net>) -> Result<Self, PoolError> {
        if v4 != v4.trunc() {
            return Err(PoolError::NotARange { given: v4.into(), range: v4.trunc().into() });
        }
        if v4.prefix_len() > LONGEST_V4_PREFIX {
            return Err(PoolError::TooSmall { given: v4.into() });
        }
        let first = v4.network();
        let special_v4 = [([0, 0, 0, 0], 8), ([127, 0, 0, 0], 8), ([169, 254, 0, 0], 16), ([224, 0, 0, 0], 3)];
        let special = |(address, prefix): ([u8; 4], u8)| {
            let range = Ipv4Net::new_assert(address.into(), prefix);
            range.contains(&first) || v4.contains(&range.network())
        };
        if special_v4.into_iter().any(special) {
            return Err(PoolError::Special { given: v4.into() });
        }
        if let Some(v6) = v6 {
            if v6 != v6.trunc() {
                return Err(PoolError::NotARange { given: v6.into(), range: v6.trunc().into() });
            }
            if v6.prefix_len() > LONGEST_V6_PREFIX {
                return Err(PoolError::TooSmall { given: v6.into() });
            }
            // Unique local, or global unicast.
            let top = v6.network().octets()[0];
            if !(top & 0xfe == 0xfc && v6.prefix_len() >= 7 || top & 0xe0 == 0x20 && v6.prefix_len() >= 3) {
                return Err(PoolError::Special { given: v6.into() });
            }
        }
        Ok(Self { v4, v6 })
    }

    /// The IPv4 range.
    #[must_use]
    pub fn v4(&self) -> Ipv4Net {
        self.v4
    }

    /// The IPv6 range.
    #[must_use]
    pub fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }

    /// The pool without IPv6.
    pub(crate) fn without_v6(self) -> Self {
        Self { v6: None, ..self }
    }

    /// How many forks it has addresses for: all but the network's, the gateway's and the broadcast address.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        (1_u64 << (32 - self.v4.prefix_len())) - 3
    }

    /// The gateway: the first address of the range.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.v4.network()) + 1)
    }

    /// The addresses of the last lease: no others take more room when they are written down.
    #[must_use]
    pub fn largest(&self) -> Addresses {
        self.addresses(self.nth(self.capacity() - 1).unwrap_or_else(|| self.gateway()))
    }

    /// The `index`-th lease, from 0. `None` past the capacity.
    pub(crate) fn nth(&self, index: u64) -> Option<Ipv4Addr> {
        if index >= self.capacity() {
            return None;
        }
        let offset = u32::try_from(index).ok()?.checked_add(2)?;
        u32::from(self.v4.network()).checked_add(offset).map(Ipv4Addr::from)
    }

    /// What the lease of `v4` gives. The low 32 bits of the IPv6 address and of the MAC are the IPv4 address: unique as long as that is, also
    /// when a pool's range was changed in the meantime.
    pub(crate) fn addresses(&self, v4: Ipv4Addr) -> Addresses {
        let below =
            |v4: Ipv4Addr| self.v6.map(|range| Ipv6Addr::from(u128::from(range.network()) | u128::from(u32::from(v4))));
        Addresses {
            mac: mac_of_guest(v4),
            v4,
            gateway_v4: self.gateway(),
            pool_v4: self.v4,
            v6: below(v4),
            gateway_v6: below(self.gateway()),
            pool_v6: self.v6,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pool_must_be_a_range_that_can_be_leased() {
        let pool = |text: &str| Pool::new(text.parse().expect("a range"), None);
        assert!(matches!(pool("10.0.0.1/8"), Err(PoolError::NotARange { .. })));
        assert!(matches!(pool("10.0.0.0/31"), Err(PoolError::TooSmall { .. })));
        for special in ["127.0.0.0/16", "169.254.0.0/24", "224.0.0.0/8", "0.0.0.0/0", "160.0.0.0/3", "240.0.0.0/8"] {
            assert!(matches!(pool(special), Err(PoolError::Special { .. })), "{special}");
        }
        assert_eq!(pool("10.0.0.0/30").expect("good").capacity(), 1);
        let v6 = |text: &str| Pool::new("10.0.0.0/8".parse().expect("a range"), Some(text.parse().expect("a range")));
        assert!(v6("fd00::/64").is_ok() && v6("2001:db8::/48").is_ok());
        for bad in ["fe80::/64", "ff00::/8", "::/0", "fd00::/97", "fd00::1/64"] {
            assert!(v6(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pool_is_read_from_its_text() {
        let both = "10.64.0.0/12,fd00:1::/64".parse::<Pool>().expect("a pool");
        assert_eq!((both.v4.prefix_len(), both.v6.map(|v6| v6.prefix_len())), (12, Some(64)));
        assert_eq!("10.64.0.0/12".parse::<Pool>().expect("a pool").v6, None);
        for bad in ["", ",", "10.0.0.0", "fd00::/64", "10.0.0.0/8,", "10.0.0.0/8,10.1.0.0/16", "10.0.0.0/8,fd00::/64,x"]
        {
            assert_eq!(bad.parse::<Pool>(), Err(PoolTextError::Form), "{bad}");
        }
        assert!(matches!("10.0.0.1/8".parse::<Pool>(), Err(PoolTextError::Pool(_))));
    }

    #[test]
    fn the_default_pool_is_one_that_would_be_accepted() {
        let pool = Pool::default();
        assert_eq!(Pool::new(pool.v4, pool.v6), Ok(pool));
        assert_eq!(pool.capacity(), 65_533);
    }

    proptest! {
        #[test]
        fn network_gateway_and_broadcast_are_never_leased(prefix in 8_u8..=30, at in any::<u32>(), index in any::<u64>()) {
            let v4 = Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 | (at & 0x00ff_ffff)), prefix).expect("a prefix").trunc();
            let pool = Pool::new(v4, Some("fd00::/96".parse().expect("a range"))).expect("a pool");
            let index = index % (pool.capacity() + 8);
            match pool.nth(index) {
                None => prop_assert!(index >= pool.capacity()),
                Some(address) => {
                    prop_assert!(v4.contains(&address));
                    prop_assert!(![v4.network(), v4.broadcast(), pool.gateway()].contains(&address));
                    let leased = pool.addresses(address);
                    prop_assert_eq!(leased.mac.octets()[0] & 3, 2, "locally administered, not multicast");
                    prop_assert!(leased.v6.is_some_and(|v6| Some(v6) != leased.gateway_v6));
                }
            }
        }

        #[test]
        fn two_leases_share_nothing(one in 0_u64..65_533, other in 0_u64..65_533) {
            prop_assume!(one != other);
            let pool = Pool::default();
            let of = |index| pool.addresses(pool.nth(index).expect("within the pool"));
            let (one, other) = (of(one), of(other));
            prop_assert!(one.mac != other.mac && one.v4 != other.v4 && one.v6 != other.v6);
        }
    }
}
