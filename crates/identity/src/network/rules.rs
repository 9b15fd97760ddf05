//! The rules of a network section that its types alone do not hold.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{IPV6_MIN_MTU, MAX_DNS, MAX_DOMAIN, MAX_SEARCH, MTU_RANGE, Network, NetworkError};

impl Network {
    /// Checks the rules that the types alone do not hold.
    ///
    /// # Errors
    /// The first field that breaks its rule.
    pub fn check(&self) -> Result<(), NetworkError> {
        let field = |field, rule| Err(NetworkError::Field { field, rule });
        if !MTU_RANGE.contains(&self.mtu) {
            return field("mtu", "576 to 9000 bytes");
        }
        if self.ipv4.is_none() && self.ipv6.is_none() {
            return field("ipv4 and ipv6", "at least one of the two");
        }
        if let Some(inet) = self.ipv4 {
            if !(1..=32).contains(&inet.prefix) {
                return field("ipv4.prefix", "1 to 32");
            }
            if !is_host_v4(inet.address) || !is_host_within(inet.address, inet.prefix) {
                return field("ipv4.address", "the address of one host");
            }
            if inet.gateway.is_some_and(|gateway| !is_host_v4(gateway) || gateway == inet.address) {
                return field("ipv4.gateway", "the address of another host");
            }
        }
        if let Some(inet) = self.ipv6 {
            if self.mtu < IPV6_MIN_MTU {
                return field("mtu", "at least 1280 bytes with IPv6");
            }
            if !(1..=128).contains(&inet.prefix) {
                return field("ipv6.prefix", "1 to 128");
            }
            if !is_host_v6(inet.address) || inet.address.is_unicast_link_local() {
                return field("ipv6.address", "the address of one host, and not a link's own");
            }
            if inet.gateway.is_some_and(|gateway| !is_host_v6(gateway) || gateway == inet.address) {
                return field("ipv6.gateway", "the address of another host");
            }
        }
        if self.gateway_mac == Some(self.mac) {
            return field("gateway_mac", "another than the card's own");
        }
        if self.dns.len() > MAX_DNS || !self.dns.iter().all(is_reachable) {
            return field("dns", "at most 3 addresses of hosts, none a link's own");
        }
        if self.search.len() > MAX_SEARCH || !self.search.iter().all(|domain| is_domain(domain)) {
            return field(
                "search",
                "at most 6 domains of lower-case letters, digits, '-' and '_', without a dot at the end",
            );
        }
        let has_family = |ip: IpAddr| if ip.is_ipv4() { self.ipv4.is_some() } else { self.ipv6.is_some() };
        if self.ack.is_some_and(|ack| !is_target(ack) || !has_family(ack.ip())) {
            return field("ack", "the address of a host, of a family that the card has, and a port");
        }
        Ok(())
    }
}

/// An address that one host on a wire may have.
fn is_host_v4(address: Ipv4Addr) -> bool {
    // 0/8 is "this network", 240/4 reserved and broadcast.
    let [first, ..] = address.octets();
    !(first == 0 || first >= 240 || address.is_loopback() || address.is_multicast())
}

/// Neither the network's address nor its broadcast address; networks of one and two hosts have none (RFC 3021).
fn is_host_within(address: Ipv4Addr, prefix: u8) -> bool {
    let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
    prefix >= 31 || !matches!(u32::from(address) & host, 0) && u32::from(address) & host != host
}

fn is_host_v6(address: Ipv6Addr) -> bool {
    // ::/8 has the unspecified address, loopback, and IPv4 in disguise.
    address.octets()[0] != 0 && !address.is_multicast()
}

/// An address that can be asked without saying through which card.
fn is_reachable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_host_v4(*address),
        IpAddr::V6(address) => is_host_v6(*address) && !address.is_unicast_link_local(),
    }
}

fn is_target(target: SocketAddr) -> bool {
    let plain = match target {
        SocketAddr::V4(_) => true,
        SocketAddr::V6(target) => target.scope_id() == 0 && target.flowinfo() == 0,
    };
    plain && target.port() != 0 && is_reachable(&target.ip())
}

fn is_domain(domain: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    domain.len() <= MAX_DOMAIN && domain.split('.').all(is_label)
}
