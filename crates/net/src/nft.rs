//! Packet rules as the kernel takes them (nf_tables), in transactions: all of one is in force at once, or nothing.
//!
//! What these rules need (connection states, translation, the kinds of addresses) the netlink-packet crates do not have, so the
//! expressions are written here; attributes are theirs. Numbers are from include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.
//! A rule is made of numbers and addresses only: no text of a caller's can get into one.

use std::io;

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};

use crate::netlink::{AfterError, Socket};

/// `NFPROTO_INET`: tables for IPv4 and IPv6 together.
const FAMILY: u8 = 1;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;

/// Where a chain is hooked in. The numbers of an `inet` table's hooks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Drop = 0,
    Accept = 1,
}

/// What may be read of the packet and its way.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Meta {
    InName = 6,
    OutName = 7,
    /// `NFPROTO_IPV4` is 2, `NFPROTO_IPV6` is 10.
    Family = 15,
    /// 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6.
    Transport = 16,
    InGroup = 21,
    OutGroup = 22,
}

/// Where in the packet bytes are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Header {
    Ethernet = 0,
    Network = 1,
    Transport = 2,
}

/// States of connections, as bits.
pub(crate) mod connection {
    pub(crate) const INVALID: u32 = 1;
    pub(crate) const ESTABLISHED: u32 = 2;
    pub(crate) const RELATED: u32 = 4;
}

/// The first of the sixteen 4-byte registers, in which a rule keeps what it has read; longer values take the following ones too.
const FIRST: u32 = 8;

fn value(kind: u16, bytes: impl Into<Vec<u8>>) -> DefaultNla {
    DefaultNla::new(kind, bytes.into())
}

fn number(kind: u16, number: u32) -> DefaultNla {
    value(kind, number.to_be_bytes())
}

fn text(kind: u16, text: &str) -> DefaultNla {
    value(kind, [text.as_bytes(), &[0]].concat())
}

fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    value(kind | NLA_F_NESTED, emitted(inner))
}

fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

/// A rule, built from left to right: every step either lets the packet through to the next or ends the rule without effect.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rule(Vec<DefaultNla>);

impl Rule {
    fn step(mut self, name: &str, data: &[DefaultNla]) -> Self {
        self.0.push(nested(1, &[text(1, name), nested(2, data)]));
        self
    }

    fn compare(self, operator: u32, bytes: &[u8]) -> Self {
        self.step("cmp", &[number(1, FIRST), number(2, operator), nested(3, &[value(1, bytes)])])
    }

    fn load(self, meta: Meta, register: u32) -> Self {
        self.step("meta", &[number(1, register), number(2, meta as u32)])
    }

    fn read(self, header: Header, offset: u32, length: u32, register: u32) -> Self {
        self.step("payload", &[number(1, register), number(2, header as u32), number(3, offset), number(4, length)])
    }

    fn mask(self, length: u32, mask: &[u8]) -> Self {
        let zero = vec![0; mask.len()];
        let data = [
            number(1, FIRST),
            number(2, FIRST),
            number(3, length),
            nested(4, &[value(1, mask)]),
            nested(5, &[value(1, zero)]),
        ];
        self.step("bitwise", &data)
    }

    /// Goes on if the packet came from, or goes to, the link of this name.
    pub(crate) fn link(self, meta: Meta, name: &str) -> Self {
        let mut padded = [0; 16];
        for (to, from) in padded[..15].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        self.load(meta, FIRST).compare(0, &padded)
    }

    /// Goes on if the link's group has these upper 16 bits, or, with `not`, has other ones.
    pub(crate) fn group(self, meta: Meta, upper: u16, not: bool) -> Self {
        let mask = 0xffff_0000_u32.to_ne_bytes();
        let wanted = (u32::from(upper) << 16).to_ne_bytes();
        self.load(meta, FIRST).mask(4, &mask).compare(u32::from(not), &wanted)
    }

    /// Goes on for IPv4, or IPv6.
    pub(crate) fn family(self, v6: bool) -> Self {
        self.load(Meta::Family, FIRST).compare(0, &[if v6 { 10 } else { 2 }])
    }

    /// Goes on for this transport protocol.
    pub(crate) fn transport(self, protocol: u8) -> Self {
        self.load(Meta::Transport, FIRST).compare(0, &[protocol])
    }

    /// Goes on if these bytes are there.
    pub(crate) fn bytes(self, header: Header, offset: u32, bytes: &[u8]) -> Self {
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        self.read(header, offset, length, FIRST).compare(0, bytes)
    }

    /// Goes on if the source (or destination) is in this range.
    pub(crate) fn address(self, side: Side, range: IpNet) -> Self {
        let v6 = matches!(range, IpNet::V6(_));
        let (offset, network, mask) = match range {
            IpNet::V4(range) => {
                let offset = if matches!(side, Side::Source) { 12 } else { 16 };
                (offset, range.network().octets().to_vec(), range.netmask().octets().to_vec())
            }
            IpNet::V6(range) => {
                let offset = if matches!(side, Side::Source) { 8 } else { 24 };
                (offset, range.network().octets().to_vec(), range.netmask().octets().to_vec())
            }
        };
        let length = if v6 { 16 } else { 4 };
        self.family(v6).read(Header::Network, offset, length, FIRST).mask(length, &mask).compare(0, &network)
    }

    /// Goes on if the connection is in one of these states ([`connection`]).
    pub(crate) fn connection(self, states: u32) -> Self {
        self.step("ct", &[number(1, FIRST), number(2, 0)]).mask(4, &states.to_ne_bytes()).compare(1, &[0; 4])
    }

    /// Goes on if the connection's destination was translated, which here is: it came to a forwarded port.
    pub(crate) fn translated(self) -> Self {
        const STATUS: u32 = 2;
        // IPS_DST_NAT, include/uapi/linux/netfilter/nf_conntrack_common.h
        const DESTINATION: u32 = 1 << 5;
        self.step("ct", &[number(1, FIRST), number(2, STATUS)]).mask(4, &DESTINATION.to_ne_bytes()).compare(1, &[0; 4])
    }

    /// Goes on if more than so many connections that came here are alive.
    pub(crate) fn connections_over(self, limit: u32) -> Self {
        const OVER: u32 = 1;
        self.step("connlimit", &[number(1, limit), number(2, OVER)])
    }

    /// Goes on if the destination is an address of this host.
    pub(crate) fn destined_here(self) -> Self {
        const ADDRESS_TYPE: u32 = 3;
        const DESTINATION: u32 = 2;
        const LOCAL: u32 = 2;
        self.step("fib", &[number(1, FIRST), number(2, ADDRESS_TYPE), number(3, DESTINATION)])
            .compare(0, &LOCAL.to_ne_bytes())
    }

    /// Goes on if the groups of the two links are together in a set.
    pub(crate) fn groups_in(self, set: &str) -> Self {
        self.load(Meta::InGroup, FIRST)
            .load(Meta::OutGroup, FIRST + 1)
            .step("lookup", &[text(1, set), number(2, FIRST)])
    }

    /// Sends the connection to where a map from the destination's port leads.
    pub(crate) fn forward_by(self, map: &str, v6: bool) -> Self {
        let (family, port) = if v6 { (10, FIRST + 4) } else { (2, FIRST + 1) };
        self.read(Header::Transport, 2, 2, FIRST)
            .step("lookup", &[text(1, map), number(2, FIRST), number(3, FIRST)])
            .step("nat", &[number(1, 1), number(2, family), number(3, FIRST), number(5, port)])
    }

    /// Gives the connection the address of the link it leaves by.
    pub(crate) fn masquerade(self) -> Self {
        self.step("masq", &[])
    }

    /// Tells the sender that the administrator forbids it.
    pub(crate) fn reject(self) -> Self {
        const ICMP_OF_EITHER_FAMILY: u32 = 2;
        const PROHIBITED: u8 = 3;
        self.step("reject", &[number(1, ICMP_OF_EITHER_FAMILY), value(2, [PROHIBITED])])
    }

    /// Decides.
    pub(crate) fn verdict(self, verdict: Verdict) -> Self {
        let verdict = nested(2, &[number(1, verdict as u32)]);
        self.step("immediate", &[number(1, 0), nested(2, &[verdict])])
    }
}

/// Which address of a packet.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// A set, or a map if its elements lead to something. Sizes in bytes, each part of a key or value padded to 4.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SetForm {
    pub(crate) key_size: u32,
    pub(crate) data_size: Option<u32>,
    /// How `nft list` is to show them: types of six bits each.
    pub(crate) key_type: u32,
    pub(crate) data_type: u32,
}

/// Changes that come into force together.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    messages: Vec<(u16, u16, Vec<DefaultNla>)>,
}

impl Transaction {
    fn push(&mut self, kind: u16, flags: u16, attributes: Vec<DefaultNla>) {
        self.messages.push((kind, flags, attributes));
    }

    /// A table; that there is one is fine.
    pub(crate) fn table(&mut self, table: &str) {
        self.push(NEW_TABLE, NLM_F_CREATE, vec![text(1, table)]);
    }

    /// Removes a table and all in it.
    pub(crate) fn delete_table(&mut self, table: &str) {
        self.push(DELETE_TABLE, 0, vec![text(1, table)]);
    }

    /// A chain that packets come through at `hook`.
    pub(crate) fn chain(&mut self, table: &str, chain: &str, kind: &str, hook: Hook, priority: i32, policy: Verdict) {
        let hook = nested(4, &[number(1, hook as u32), value(2, priority.to_be_bytes())]);
        let attributes = vec![text(1, table), text(3, chain), hook, number(5, policy as u32), text(7, kind)];
        self.push(NEW_CHAIN, NLM_F_CREATE, attributes);
    }

    /// A chain that no packet comes through.
    pub(crate) fn mark(&mut self, table: &str, chain: &str) {
        self.push(NEW_CHAIN, NLM_F_CREATE, vec![text(1, table), text(3, chain)]);
    }

    /// Adds a rule at a chain's end.
    pub(crate) fn rule(&mut self, table: &str, chain: &str, rule: Rule) {
        const APPEND: u16 = 0x800;
        let attributes = vec![text(1, table), text(2, chain), nested(4, &rule.0)];
        self.push(NEW_RULE, NLM_F_CREATE | APPEND, attributes);
    }

    /// Removes all rules of a chain.
    pub(crate) fn flush(&mut self, table: &str, chain: &str) {
        self.push(DELETE_RULE, 0, vec![text(1, table), text(2, chain)]);
    }

    /// A set. `id` tells the sets of a transaction apart.
    pub(crate) fn set(&mut self, table: &str, set: &str, id: u32, form: SetForm) {
        const MAP: u32 = 8;
        let flags = if form.data_size.is_some() { MAP } else { 0 };
        let mut attributes =
            vec![text(1, table), text(2, set), number(3, flags), number(4, form.key_type), number(5, form.key_size)];
        if let Some(size) = form.data_size {
            attributes.extend([number(6, form.data_type), number(7, size)]);
        }
        attributes.push(number(10, id));
        self.push(NEW_SET, NLM_F_CREATE, attributes);
    }

    /// Adds an element to a set, or to a map. That it is there is fine if it leads to the same.
    pub(crate) fn element(&mut self, table: &str, set: &str, key: &[u8], data: Option<&[u8]>) {
        let mut element = vec![nested(1, &[value(1, key)])];
        element.extend(data.map(|data| nested(2, &[value(1, data)])));
        let elements = nested(3, &[nested(1, &element)]);
        self.push(NEW_ELEMENT, NLM_F_CREATE, vec![text(1, table), text(2, set), elements]);
    }

    /// Removes an element.
    pub(crate) fn delete_element(&mut self, table: &str, set: &str, key: &[u8]) {
        let elements = nested(3, &[nested(1, &[nested(1, &[value(1, key)])])]);
        self.push(DELETE_ELEMENT, 0, vec![text(1, table), text(2, set), elements]);
    }

    /// Puts it into force in the thread's namespace.
    ///
    /// # Errors
    /// The kernel's; then nothing has changed.
    pub(crate) fn commit(self) -> io::Result<()> {
        let mut socket = Socket::netfilter()?;
        let mut bytes = Vec::new();
        message(&mut bytes, BATCH_BEGIN, 0, socket.next_sequence(), (0, SUBSYSTEM), &[]);
        let count = self.messages.len();
        let mut last = 0;
        for (index, (kind, flags, attributes)) in self.messages.into_iter().enumerate() {
            last = socket.next_sequence();
            // An error is answered in any case; success is asked for once.
            let flags = if index + 1 == count { flags | NLM_F_ACK } else { flags };
            message(&mut bytes, SUBSYSTEM << 8 | kind, flags, last, (FAMILY, 0), &attributes);
        }
        message(&mut bytes, BATCH_END, 0, socket.next_sequence(), (0, SUBSYSTEM), &[]);
        socket.send(&bytes)?;
        socket.wait_for(last, AfterError::Stop, |_, _| {})
    }
}

/// Whether a chain exists in the thread's namespace.
pub(crate) fn has_chain(table: &str, chain: &str) -> io::Result<bool> {
    let mut socket = Socket::netfilter()?;
    let mut bytes = Vec::new();
    let sequence = socket.next_sequence();
    message(
        &mut bytes,
        SUBSYSTEM << 8 | GET_CHAIN,
        NLM_F_ACK,
        sequence,
        (FAMILY, 0),
        &[text(1, table), text(3, chain)],
    );
    socket.send(&bytes)?;
    match socket.wait_for(sequence, AfterError::Stop, |_, _| {}) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A chain that packets come through, of whoever's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BaseChain {
    /// As `nft` names it.
    pub(crate) family: &'static str,
    pub(crate) table: String,
    pub(crate) chain: String,
}

impl BaseChain {
    /// Reads a chain as the kernel lists it, if it drops what it is to forward and no rule of its decides about.
    fn that_forwards_nothing(payload: &[u8]) -> Option<Self> {
        const DROP: [u8; 4] = (Verdict::Drop as u32).to_be_bytes();
        const FORWARD: [u8; 4] = (Hook::Forward as u32).to_be_bytes();
        let (head, rest) = payload.split_first_chunk::<4>()?;
        let family = match head[0] {
            1 => "inet",
            2 => "ip",
            10 => "ip6",
            _ => return None,
        };
        let text = |kind| {
            let text = attribute(rest, kind)?.strip_suffix(&[0])?;
            Some(String::from_utf8_lossy(text).chars().filter(|character| !character.is_control()).collect())
        };
        if attribute(attribute(rest, 4)?, 1)? != FORWARD || attribute(rest, 5)? != DROP {
            return None;
        }
        Some(Self { family, table: text(1)?, chain: text(3)? })
    }
}

/// The value of the first attribute of a kind.
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    const KIND: u16 = 0x3fff;
    loop {
        let (head, _) = rest.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & KIND;
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

/// The chains in the thread's namespace that drop whatever is to be forwarded and no rule of theirs decides about.
pub(crate) fn chains_that_forward_nothing() -> io::Result<Vec<BaseChain>> {
    let mut socket = Socket::netfilter()?;
    let mut bytes = Vec::new();
    let sequence = socket.next_sequence();
    message(&mut bytes, SUBSYSTEM << 8 | GET_CHAIN, NLM_F_DUMP, sequence, (0, 0), &[]);
    socket.send(&bytes)?;
    let mut chains = Vec::new();
    socket
        .wait_for(sequence, AfterError::Stop, |_, payload| chains.extend(BaseChain::that_forwards_nothing(payload)))?;
    Ok(chains)
}

/// Adds one message: netlink's header, nfnetlink's, attributes.
fn message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    (family, resource): (u8, u16),
    attributes: &[DefaultNla],
) {
    let attributes = emitted(attributes);
    let length = u32::try_from(16 + 4 + attributes.len()).unwrap_or(u32::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
}
