//! The table in the host's namespace, one for all forks. It is made when it is first needed, and again if somebody flushed it.
//!
//! It says nothing about packets that are no fork's, and what it accepts other tables of the host may still refuse.

use std::io;

use ipnet::{IpNet, Ipv4Net};

use crate::{
    error::{LinkError, step},
    named_net::{self, OURS},
    namespace,
    nft::{self, Hook, Meta, Rule, SetForm, Side, Transaction, Verdict, connection},
    policy::Protocol,
    ports::{self, Taken},
    rules::TABLE,
    state::State,
};

/// A chain without rules that says which layout the table has. Another build's table is replaced.
const LAYOUT: &str = "layout-3";

/// The set of nets: pairs of a group with itself.
const NETS: &str = "nets";

const FILTER: i32 = 0;
/// After the kernel has looked at connections (-200), and before anybody translates a destination (-100).
const BEFORE_TRANSLATION: i32 = -150;
const BEFORE_ROUTING: i32 = -100;
const AFTER_ROUTING: i32 = 100;

// Types of nft, for its lists only.
const PORT: u32 = 13;
const V4_AND_PORT: u32 = 7 << 6 | PORT;
const V6_AND_PORT: u32 = 8 << 6 | PORT;
const TWO_GROUPS: u32 = 35 << 6 | 35;

fn map(protocol: Protocol, v6: bool) -> &'static str {
    match (protocol, v6) {
        (Protocol::Tcp, false) => "tcp4",
        (Protocol::Tcp, true) => "tcp6",
        (Protocol::Udp, false) => "udp4",
        (Protocol::Udp, true) => "udp6",
    }
}

const MAPS: [(Protocol, u8, bool); 4] =
    [(Protocol::Tcp, 6, false), (Protocol::Tcp, 6, true), (Protocol::Udp, 17, false), (Protocol::Udp, 17, true)];

/// Makes the table unless it is there. The lock of the shared parts is held.
pub(crate) fn ensure(state: &State, forward_v6: bool) -> Result<(), LinkError> {
    if is_there().map_err(step("looking for the packet rules"))? {
        return Ok(());
    }
    make_router(forward_v6).map_err(step("letting the host forward packets"))?;
    let mut table = Transaction::default();
    // What was there is removed in the same transaction; that it is made first keeps that from failing.
    table.table(TABLE);
    table.delete_table(TABLE);
    table.table(TABLE);
    table.mark(TABLE, LAYOUT);
    add_chains(&mut table);
    for number in named_net::numbers(state).map_err(step("reading the named nets"))? {
        add_net(&mut table, number);
    }
    for taken in ports::all(state).map_err(step("reading the forwarded ports"))? {
        add_port(&mut table, &taken);
    }
    table.commit().map_err(step("writing the packet rules"))
}

/// Makes the table without any ports and nets, in a namespace where there is none.
pub(crate) fn make_empty() -> io::Result<()> {
    let mut table = Transaction::default();
    table.table(TABLE);
    add_chains(&mut table);
    table.commit()
}

/// Whether the table is there.
pub(crate) fn is_there() -> io::Result<bool> {
    nft::has_chain(TABLE, LAYOUT)
}

/// Removes the table. That there is none is fine.
pub(crate) fn remove() -> io::Result<()> {
    let mut table = Transaction::default();
    table.table(TABLE);
    table.delete_table(TABLE);
    table.commit()
}

/// The host must forward packets. That is for IPv4 usual on a host of sandboxes. For IPv6 it makes the host deaf to routers'
/// announcements, from which it may have its own address, so that is only done when asked for.
fn make_router(forward_v6: bool) -> io::Result<()> {
    let settings = [("ipv4/ip_forward", true), ("ipv6/conf/all/forwarding", forward_v6)];
    for (setting, wanted) in settings {
        if wanted && namespace::setting(setting).is_ok_and(|value| value == "0") {
            namespace::set(setting, "1")?;
        }
    }
    Ok(())
}

fn add_chains(table: &mut Transaction) {
    let accept = Verdict::Accept;
    table.set(TABLE, NETS, 1, SetForm { key_size: 8, data_size: None, key_type: TWO_GROUPS, data_type: 0 });
    for (id, (protocol, _, v6)) in (2..).zip(MAPS) {
        let (size, data_type) = if v6 { (20, V6_AND_PORT) } else { (8, V4_AND_PORT) };
        let form = SetForm { key_size: 2, data_size: Some(size), key_type: PORT, data_type };
        table.set(TABLE, map(protocol, v6), id, form);
    }

    let from_fork = || Rule::default().group(Meta::InGroup, OURS, false);
    // The host's addresses as the fork names them: a port of the host that somebody else's rules lead on (a container's published port) comes
    // by no input chain any more. What a fork answers may go there.
    table.chain(TABLE, "host-apart", "filter", Hook::Prerouting, BEFORE_TRANSLATION, accept);
    let answers = connection::ESTABLISHED | connection::RELATED;
    table.rule(TABLE, "host-apart", from_fork().connection(answers).verdict(accept));
    table.rule(TABLE, "host-apart", from_fork().destined_here().reject());

    table.chain(TABLE, "forward", "filter", Hook::Forward, FILTER, accept);
    let between_forks = || from_fork().group(Meta::OutGroup, OURS, false);
    table.rule(TABLE, "forward", between_forks().groups_in(NETS).verdict(accept));
    table.rule(TABLE, "forward", between_forks().reject());
    // A host that forwards would do so for its neighbours too, who can send it what is for a fork.
    let to_fork = || Rule::default().group(Meta::OutGroup, OURS, false);
    table.rule(TABLE, "forward", to_fork().connection(connection::ESTABLISHED | connection::RELATED).verdict(accept));
    table.rule(TABLE, "forward", to_fork().translated().verdict(accept));
    table.rule(TABLE, "forward", to_fork().reject());

    table.chain(TABLE, "input", "filter", Hook::Input, FILTER, accept);
    table.rule(TABLE, "input", from_fork().connection(connection::ESTABLISHED | connection::RELATED).verdict(accept));
    table.rule(TABLE, "input", from_fork().reject());

    table.chain(TABLE, "outgoing", "nat", Hook::Postrouting, AFTER_ROUTING, accept);
    table.rule(TABLE, "outgoing", from_fork().group(Meta::OutGroup, OURS, true).masquerade());

    // What the host says to itself on 127.0.0.1 and is for a forwarded port leaves it by the fork's wire, which is let to do that
    // (`route_localnet`). The fork would answer to its own loopback.
    let from_loopback = IpNet::V4(Ipv4Net::new_assert([127, 0, 0, 0].into(), 8));
    let rule = Rule::default().group(Meta::OutGroup, OURS, false).address(Side::Source, from_loopback).masquerade();
    table.rule(TABLE, "outgoing", rule);

    // From other hosts, and from the host itself: to its addresses and to 127.0.0.1, not to the other addresses of loopback, where
    // hosts have resolvers of their own. IPv6 has nothing like route_localnet: there is nothing at `::1`.
    table.chain(TABLE, "ports", "nat", Hook::Prerouting, BEFORE_ROUTING, accept);
    table.chain(TABLE, "own-ports", "nat", Hook::Output, BEFORE_ROUTING, accept);
    for (protocol, number, v6) in MAPS.into_iter().filter(|(.., v6)| !v6) {
        let localhost = IpNet::from(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
        let rule = Rule::default().transport(number).address(Side::Destination, localhost);
        table.rule(TABLE, "own-ports", rule.forward_by(map(protocol, v6), v6));
    }
    let loopback = from_loopback;
    table.rule(TABLE, "own-ports", Rule::default().address(Side::Destination, loopback).verdict(accept));
    let loopback = IpNet::from(std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST));
    table.rule(TABLE, "own-ports", Rule::default().address(Side::Destination, loopback).verdict(accept));
    for chain in ["ports", "own-ports"] {
        for (protocol, number, v6) in MAPS {
            let rule = Rule::default().family(v6).transport(number).destined_here().forward_by(map(protocol, v6), v6);
            table.rule(TABLE, chain, rule);
        }
    }
}

fn pair(number: u16) -> [u8; 8] {
    let group = named_net::group(number).to_ne_bytes();
    let mut pair = [0; 8];
    pair[..4].copy_from_slice(&group);
    pair[4..].copy_from_slice(&group);
    pair
}

/// Lets the forks of a net reach each other.
pub(crate) fn add_net(table: &mut Transaction, number: u16) {
    table.element(TABLE, NETS, &pair(number), None);
}

/// The end of that.
pub(crate) fn remove_net(number: u16) -> Transaction {
    let mut table = Transaction::default();
    table.delete_element(TABLE, NETS, &pair(number));
    table
}

/// Lets a port lead to a fork.
pub(crate) fn add_port(table: &mut Transaction, taken: &Taken) {
    let Taken { forward, v4, v6, .. } = taken;
    let to = |address: &[u8]| [address, &forward.guest.to_be_bytes(), &[0, 0]].concat();
    let key = forward.host.to_be_bytes();
    table.element(TABLE, map(forward.protocol, false), &key, Some(&to(&v4.octets())));
    if let Some(v6) = v6 {
        table.element(TABLE, map(forward.protocol, true), &key, Some(&to(&v6.octets())));
    }
}

/// The end of that. Each is tried by itself: one may be there without the other.
pub(crate) fn remove_port(taken: &Taken) -> [Transaction; 2] {
    [false, true].map(|v6| {
        let mut table = Transaction::default();
        table.delete_element(TABLE, map(taken.forward.protocol, v6), &taken.forward.host.to_be_bytes());
        table
    })
}
