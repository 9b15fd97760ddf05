//! The rules of one fork, in its own namespace. They end with it.
//!
//! ```text
//! prerouting  from the tap: only the guest's MAC and addresses
//! input       from the tap: acknowledgements and echo to the gateway; IPv6 neighbours
//! forward     closed: nothing.   open: the policy
//! output      to the tap only
//! ```

use std::{io, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    ack::ACK_PORT,
    address::Addresses,
    nft::{Header, Hook, Meta, Rule, Side, Transaction, Verdict, connection},
    policy::{Egress, Policy},
};

/// The table's name, in every namespace that has one of ours.
pub(crate) const TABLE: &str = "offshoot";
/// The tap's name in every fork's namespace.
pub(crate) const TAP: &str = "tap0";
/// The name of the wire's end in every fork's namespace.
pub(crate) const WIRE: &str = "wire0";

const ICMP: u8 = 1;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Most connections of a fork's own at a time. The host's kernel remembers each of them, for all forks together in one table (of some
/// 65000 to 260000, by its memory); a fork that filled it would cut off all others.
pub(crate) const MAX_CONNECTIONS: u32 = 4096;

/// Before the kernel looks at connections.
const BEFORE_CONNECTIONS: i32 = -300;
const FILTER: i32 = 0;

/// Where no fork's packet goes: this network, loopback, link-local (with the metadata services of clouds), multicast, reserved and broadcast.
fn never() -> [IpNet; 9] {
    let v4 = |address: [u8; 4], prefix| IpNet::V4(Ipv4Net::new_assert(address.into(), prefix));
    let v6 = |first: u16, prefix| IpNet::V6(Ipv6Net::new_assert([first, 0, 0, 0, 0, 0, 0, 0].into(), prefix));
    [
        v4([0, 0, 0, 0], 8),
        v4([127, 0, 0, 0], 8),
        v4([169, 254, 0, 0], 16),
        v4([224, 0, 0, 0], 3),
        v6(0xfe80, 10),
        v6(0xff00, 8),
        // Loopback, "unspecified", and IPv4 in disguise.
        v6(0, 8),
        // The metadata services of two large clouds for IPv6, which are unique local and not link-local.
        IpNet::V6(Ipv6Net::new_assert([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254].into(), 128)),
        IpNet::V6(Ipv6Net::new_assert([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254].into(), 128)),
    ]
}

/// From the tap.
fn from_guest() -> Rule {
    Rule::default().link(Meta::InName, TAP)
}

/// Puts the rules of a closed link into force: everything but what goes out.
pub(crate) fn close(addresses: &Addresses) -> io::Result<()> {
    let mut rules = Transaction::default();
    rules.table(TABLE);
    let drop = Verdict::Drop;
    rules.chain(TABLE, "prerouting", "filter", Hook::Prerouting, BEFORE_CONNECTIONS, Verdict::Accept);
    rules.chain(TABLE, "input", "filter", Hook::Input, FILTER, drop);
    rules.chain(TABLE, "forward", "filter", Hook::Forward, FILTER, drop);
    rules.chain(TABLE, "output", "filter", Hook::Output, FILTER, drop);

    let mut source = |rule: Rule, verdict| rules.rule(TABLE, "prerouting", rule.verdict(verdict));
    let own = |address: IpAddr| {
        from_guest().bytes(Header::Ethernet, 6, &addresses.mac.octets()).address(Side::Source, address.into())
    };
    source(own(addresses.v4.into()), Verdict::Accept);
    if let Some(v6) = addresses.v6 {
        source(own(v6.into()), Verdict::Accept);
        // What a card says before and besides its address: the search for duplicates, and for the gateway.
        let neighbours = || from_guest().bytes(Header::Ethernet, 6, &addresses.mac.octets()).transport(ICMPV6);
        source(
            neighbours()
                .address(Side::Source, IpNet::V6(Ipv6Net::new_assert([0xfe80, 0, 0, 0, 0, 0, 0, 0].into(), 10))),
            Verdict::Accept,
        );
        source(neighbours().address(Side::Source, IpNet::V6(Ipv6Net::new_assert([0; 8].into(), 128))), Verdict::Accept);
    }
    source(from_guest(), drop);

    let mut input = |rule: Rule| rules.rule(TABLE, "input", rule.verdict(Verdict::Accept));
    let gateways = [Some(IpAddr::V4(addresses.gateway_v4)), addresses.gateway_v6.map(IpAddr::V6)];
    for gateway in gateways.into_iter().flatten() {
        let to_gateway = || from_guest().address(Side::Destination, gateway.into());
        input(to_gateway().transport(UDP).bytes(Header::Transport, 2, &ACK_PORT.to_be_bytes()));
    }
    // Echo requests, and what tells a card its neighbours.
    input(from_guest().address(Side::Destination, IpAddr::V4(addresses.gateway_v4).into()).transport(ICMP));
    if addresses.v6.is_some() {
        input(from_guest().transport(ICMPV6));
    }
    rules.rule(TABLE, "output", Rule::default().link(Meta::OutName, TAP).verdict(Verdict::Accept));
    rules.commit()
}

/// Puts a policy into force, in the place of none or of an earlier one, at once.
pub(crate) fn open(addresses: &Addresses, policy: &Policy) -> io::Result<()> {
    let mut rules = Transaction::default();
    rules.flush(TABLE, "forward");
    let mut add = |rule: Rule| rules.rule(TABLE, "forward", rule);
    let out = || from_guest().link(Meta::OutName, WIRE);

    add(Rule::default().connection(connection::INVALID).verdict(Verdict::Drop));
    add(Rule::default().connection(connection::ESTABLISHED | connection::RELATED).verdict(Verdict::Accept));
    let pools = [Some(IpNet::V4(addresses.pool_v4)), addresses.pool_v6.map(IpNet::V6)];
    let to_guest = || Rule::default().link(Meta::InName, WIRE).link(Meta::OutName, TAP);
    if policy.net.is_none() {
        // The host's table refuses what other forks begin. So does this one, which nothing on the host flushes.
        for pool in pools.into_iter().flatten() {
            add(to_guest().address(Side::Source, pool).verdict(Verdict::Drop));
        }
    }
    // What the host's table lets through to this fork: from the host, forwarded ports, forks of the same net.
    add(to_guest().verdict(Verdict::Accept));
    add(out().connections_over(MAX_CONNECTIONS).reject());
    for range in never() {
        add(out().address(Side::Destination, range).reject());
    }
    for pool in pools.into_iter().flatten() {
        let forks = out().address(Side::Destination, pool);
        // Which forks share the net, the host's table knows.
        add(if policy.net.is_some() { forks.verdict(Verdict::Accept) } else { forks.reject() });
    }
    match &policy.egress {
        Egress::Allow => add(out().verdict(Verdict::Accept)),
        Egress::Deny => {}
        Egress::Only(ranges) => {
            for &range in ranges {
                add(out().address(Side::Destination, range).verdict(Verdict::Accept));
            }
        }
    }
    add(out().reject());
    rules.commit()
}

/// Closes an open link again.
pub(crate) fn shut() -> io::Result<()> {
    let mut rules = Transaction::default();
    rules.flush(TABLE, "forward");
    rules.commit()
}
