//! The requests: links, addresses, routes, neighbours, queues.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use identity::MacAddress;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use super::Socket;
use crate::policy::Rate;

type Request = NetlinkMessage<RouteNetlinkMessage>;

const NEW: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const CHANGE: u16 = NLM_F_REQUEST | NLM_F_ACK;

fn request(flags: u16, message: RouteNetlinkMessage) -> Request {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = flags;
    request
}

fn set(message: &mut LinkMessage, flags: LinkFlags) {
    message.header.flags |= flags;
    message.header.change_mask |= flags;
}

/// A wire: a pair of virtual cards, `name` in this namespace and `peer` in that of `namespace`. Both are down: an end can not be up before
/// it has the other.
///
/// It is used as a point-to-point link without neighbours: both ends have one MAC address and no ARP, so what one end sends
/// to itself is for the other. That saves the resolution of addresses and everything that can be forged in it.
pub(crate) fn new_wire(name: &str, group: u32, mac: MacAddress, peer: &str, namespace: BorrowedFd<'_>) -> Request {
    let end = |name: &str| {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::Address(mac.octets().to_vec()));
        set(&mut message, LinkFlags::Noarp);
        message
    };
    let mut far = end(peer);
    far.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    let mut near = end(name);
    near.attributes.push(LinkAttribute::Group(group));
    near.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(far))),
    ]));
    request(NEW, RouteNetlinkMessage::NewLink(near))
}

/// Lets a link come up without an IPv6 address of its own: the kernel would announce it to the other side.
pub(crate) fn without_own_address(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let inet6 = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![inet6])]));
    request(CHANGE, RouteNetlinkMessage::SetLink(message))
}

/// Brings a link up.
pub(crate) fn up(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    set(&mut message, LinkFlags::Up);
    request(CHANGE, RouteNetlinkMessage::SetLink(message))
}

/// Takes a link down.
#[cfg(test)]
pub(crate) fn down(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask |= LinkFlags::Up;
    request(CHANGE, RouteNetlinkMessage::SetLink(message))
}

/// Gives a link a MAC address.
pub(crate) fn set_mac(index: u32, mac: MacAddress) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Address(mac.octets().to_vec()));
    request(CHANGE, RouteNetlinkMessage::SetLink(message))
}

/// Puts a link into a group.
pub(crate) fn set_group(name: &str, group: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::Group(group));
    request(CHANGE, RouteNetlinkMessage::SetLink(message))
}

/// Removes a link, and the other end of a wire.
pub(crate) fn delete(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    request(CHANGE, RouteNetlinkMessage::DelLink(message))
}

/// A link that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) group: u32,
}

impl Found {
    fn from(message: RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewLink(message) = message else { return None };
        let mut found = Self { index: message.header.index, name: String::new(), group: 0 };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name = name,
                LinkAttribute::Group(group) => found.group = group,
                _ => {}
            }
        }
        Some(found)
    }
}

/// All links of the socket's namespace.
pub(crate) fn all(socket: &mut Socket) -> io::Result<Vec<Found>> {
    let mut links = Vec::new();
    let list = request(NLM_F_REQUEST | NLM_F_DUMP, RouteNetlinkMessage::GetLink(LinkMessage::default()));
    socket.ask(list, |message| links.extend(Found::from(message)))?;
    Ok(links)
}

/// The link of this name, if there is one.
pub(crate) fn find(socket: &mut Socket, name: &str) -> io::Result<Option<Found>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let mut found = None;
    let one = request(NLM_F_REQUEST | NLM_F_ACK, RouteNetlinkMessage::GetLink(message));
    match socket.ask(one, |message| found = Found::from(message)) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(None),
        other => other.map(|()| found),
    }
}

/// An address of a link, for itself alone (/32 or /128) and without a search for duplicates.
pub(crate) fn add_address(index: u32, address: IpAddr) -> Request {
    let mut message = AddressMessage::default();
    let (family, prefix) = family(address);
    message.header.family = family;
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    request(NEW, RouteNetlinkMessage::NewAddress(message))
}

/// All addresses of the socket's namespace.
pub(crate) fn addresses(socket: &mut Socket) -> io::Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    let list = request(NLM_F_REQUEST | NLM_F_DUMP, RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    socket.ask(list, |message| {
        let RouteNetlinkMessage::NewAddress(message) = message else { return };
        // On a link between two points "address" is the other's.
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let of_link = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        addresses.extend(local.or(of_link));
    })?;
    Ok(addresses)
}

fn route(index: u32, family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Link;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

/// The route to one address, through a link.
pub(crate) fn route_to(index: u32, address: IpAddr) -> Request {
    let (family, prefix) = family(address);
    let mut message = route(index, family);
    message.header.destination_prefix_length = prefix;
    let destination = match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    message.attributes.push(RouteAttribute::Destination(destination));
    request(NEW, RouteNetlinkMessage::NewRoute(message))
}

/// The route to everywhere, through a link, for addresses of the family of `like`.
pub(crate) fn route_to_all(index: u32, like: IpAddr) -> Request {
    request(NEW, RouteNetlinkMessage::NewRoute(route(index, family(like).0)))
}

/// A neighbour that is not asked for its MAC address, and can not change it.
pub(crate) fn neighbour(index: u32, address: IpAddr, mac: MacAddress) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address).0;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    request(NEW, RouteNetlinkMessage::NewNeighbour(message))
}

fn family(address: IpAddr) -> (AddressFamily, u8) {
    match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    }
}

/// A token bucket (tc-tbf) as a link's queue: what is sent on it leaves at `rate`.
///
/// The bucket holds what the rate gives in 20 ms, and at least one of the 64 KiB packets that a card hands over to be cut. What
/// does not leave within 400 ms is dropped.
pub(crate) fn token_bucket(index: u32, rate: Rate) -> Request {
    const LEAST_BUCKET: u64 = 66_000;
    // include/uapi/linux/pkt_sched.h
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_RATE64: u16 = 4;
    const TCA_TBF_BURST: u16 = 6;
    const LINKLAYER_ETHERNET: u8 = 1;
    /// The kernel counts time in units of 64 ns.
    const UNITS_PER_SECOND: u64 = 1_000_000_000 / 64;

    let rate = rate.bytes_per_second();
    let saturated = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let bucket = (rate / 50).max(LEAST_BUCKET);
    let limit = bucket.saturating_add(rate / 5 * 2);
    let fill_time =
        u64::try_from(u128::from(bucket) * u128::from(UNITS_PER_SECOND) / u128::from(rate)).unwrap_or(u64::MAX);

    // struct tc_tbf_qopt: two struct tc_ratespec (cell_log, linklayer, overhead, cell_align, mpu, rate), limit, buffer, mtu.
    let mut options = Vec::with_capacity(36);
    options.extend([0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0]);
    options.extend(saturated(rate).to_ne_bytes());
    options.extend([0; 12]);
    options.extend(saturated(limit).to_ne_bytes());
    options.extend(saturated(fill_time).to_ne_bytes());
    options.extend(0_u32.to_ne_bytes());

    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).unwrap_or(0);
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle { major: 1, minor: 0 };
    message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
    let option = |kind, value| TcOption::Other(DefaultNla::new(kind, value));
    message.attributes.push(TcAttribute::Options(vec![
        option(TCA_TBF_PARMS, options),
        option(TCA_TBF_RATE64, rate.to_ne_bytes().to_vec()),
        option(TCA_TBF_BURST, saturated(bucket).to_ne_bytes().to_vec()),
    ]));
    request(NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, RouteNetlinkMessage::NewQueueDiscipline(message))
}
