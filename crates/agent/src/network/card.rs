//! The guest's card, and what the kernel is asked about it.

use std::{
    fs, io,
    net::{IpAddr, Ipv6Addr},
    path::Path,
};

use identity::{Inet, Network};

use super::netlink::{Batch, NetlinkError, PUT, Socket, attributes, failed};

// include/uapi/linux/rtnetlink.h
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;
// if_link.h, if_addr.h, rtnetlink.h, neighbour.h
const LINK_ADDRESS: u16 = 1;
const LINK_MTU: u16 = 4;
const ADDRESS_ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ROUTE_OUT: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const NEIGHBOUR_ADDRESS: u16 = 1;
const NEIGHBOUR_LINK_ADDRESS: u16 = 2;
const LEAST_IPV6_MTU: u32 = 1280;
/// Of Ethernet; a fork is given its own.
const USUAL_MTU: u32 = 1500;
const NO_DUPLICATE_DETECTION: u8 = 0x02;
const UP: u32 = 1;
const ON_LINK: u32 = 4;
const PERMANENT: u16 = 0x80;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const UNICAST: u8 = 1;
const INET: u8 = 2;
const INET6: u8 = 10;

/// The guest's network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
}

/// An address that a card has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Assigned {
    pub(super) index: u32,
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

impl Card {
    /// The virtio card of this machine; the first, if it has several. `None` if it has none.
    #[must_use]
    pub fn find() -> Option<Self> {
        let is_ours = |path: &Path| {
            fs::read_link(path.join("device/driver"))
                .is_ok_and(|driver| driver.file_name() == Some("virtio_net".as_ref()))
        };
        let card = |path: &Path| {
            let index = fs::read_to_string(path.join("ifindex")).ok()?.trim_end().parse().ok()?;
            Some(Self { name: path.file_name()?.to_str()?.to_owned(), index })
        };
        let cards = fs::read_dir("/sys/class/net").ok()?.filter_map(Result::ok).map(|entry| entry.path());
        cards.filter(|path| is_ours(path)).filter_map(|path| card(&path)).min_by_key(|card| card.index)
    }

    /// Has the kernel say nothing of its own on this card: no address that it makes up, no question after routers. Their
    /// packets would leave with the card's first breath, before anybody knows who it is.
    ///
    /// # Errors
    /// A setting was refused. A kernel without IPv6 has none of them.
    pub(super) fn silence(&self) -> Result<(), NetlinkError> {
        let folder = Path::new("/proc/sys/net/ipv6/conf").join(&self.name);
        if !folder.is_dir() {
            return Ok(());
        }
        for (setting, value) in
            [("addr_gen_mode", "1"), ("accept_ra", "0"), ("autoconf", "0"), ("keep_addr_on_down", "0")]
        {
            match fs::write(folder.join(setting), value) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("silencing the card")(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives the card its address, MTU, addresses and routes, and brings it up: one datagram to the kernel, and one back.
    ///
    /// Nothing is flushed here: when the card went down, the kernel dropped its neighbours and routes, and a new address drops what is
    /// remembered of routes (`fib_inetaddr_event`, `rt6_sync_up`).
    ///
    /// # Errors
    /// The first request that was refused.
    pub(super) fn take_on(&self, socket: &mut Socket, network: &Network) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        // The kernel sets the address first, then the MTU, and brings the card up last (`do_setlink`).
        batch.request(SET_LINK, 0, &self.link_header(UP), "setting MAC address and MTU, and bringing the card up");
        batch.attribute(LINK_ADDRESS, &network.mac.octets());
        batch.attribute(LINK_MTU, &u32::from(network.mtu).to_ne_bytes());
        if let Some(inet) = &network.ipv4 {
            let gateway = inet.gateway.map(|gateway| gateway.octets());
            let texts = ["adding the IPv4 address", "naming the IPv4 gateway's card", "adding the IPv4 default route"];
            self.family(&mut batch, INET, &inet.address.octets(), inet.prefix, gateway.as_ref(), network, texts);
        }
        if let Some(inet) = &network.ipv6 {
            let gateway = inet.gateway.map(|gateway| gateway.octets());
            let texts = ["adding the IPv6 address", "naming the IPv6 gateway's card", "adding the IPv6 default route"];
            self.family(&mut batch, INET6, &inet.address.octets(), inet.prefix, gateway.as_ref(), network, texts);
        }
        socket.carry_out(batch)
    }

    #[allow(clippy::too_many_arguments)] // One function for both families: its code is translated once.
    #[inline(never)]
    fn family<const N: usize>(
        &self,
        batch: &mut Batch,
        family: u8,
        address: &[u8; N],
        prefix: u8,
        gateway: Option<&[u8; N]>,
        network: &Network,
        [adding, naming, routing]: [&'static str; 3],
    ) {
        let index = self.index.to_ne_bytes();
        // The address is leased: nobody else has it, so nobody is asked. Asking (RFC 4862, 5.4) takes a second or more, in which
        // the address can not be used. IPv4 does not know the flag.
        let mut header = [family, prefix, if family == INET6 { NO_DUPLICATE_DETECTION } else { 0 }, 0, 0, 0, 0, 0];
        header[4..].copy_from_slice(&index);
        batch.request(NEW_ADDRESS, PUT, &header, adding);
        batch.attribute(ADDRESS_LOCAL, address);
        batch.attribute(ADDRESS_ADDRESS, address);
        let Some(gateway) = gateway else { return };
        if let Some(mac) = network.gateway_mac {
            let mut header = [0; 12];
            header[0] = family;
            header[4..8].copy_from_slice(&index);
            header[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
            batch.request(NEW_NEIGHBOUR, PUT, &header, naming);
            batch.attribute(NEIGHBOUR_ADDRESS, gateway);
            batch.attribute(NEIGHBOUR_LINK_ADDRESS, &mac.octets());
        }
        // On the link: a card with a /32 has no route that would say so.
        let mut header = [family, 0, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, 0, UNICAST, 0, 0, 0, 0];
        header[8..].copy_from_slice(&ON_LINK.to_ne_bytes());
        batch.request(NEW_ROUTE, PUT, &header, routing);
        batch.attribute(ROUTE_GATEWAY, gateway);
        batch.attribute(ROUTE_OUT, &index);
    }

    /// Takes the card down. Its neighbours, its IPv6 addresses and its routes go with that.
    pub(super) fn down(&self, socket: &mut Socket) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.request(SET_LINK, 0, &self.link_header(0), "taking the card down");
        socket.carry_out(batch)
    }

    /// Its MAC address; `None` if it is gone, or is no Ethernet.
    pub(super) fn mac(&self, socket: &mut Socket) -> Result<Option<[u8; 6]>, NetlinkError> {
        let mut found = None;
        let list = socket.list(GET_LINK, &[0; 16], |message| {
            let own = message.get(4..8) == Some(&self.index.to_ne_bytes());
            if let Some(rest) = message.get(16..).filter(|_| own) {
                let address = attributes(rest).find(|(kind, _)| *kind == LINK_ADDRESS);
                found = address.and_then(|(_, value)| value.try_into().ok());
            }
        });
        list.map_err(failed("looking for the card's MAC address")).map(|()| found)
    }

    /// Gives the card, which is down, another MAC address.
    pub(super) fn set_mac(&self, socket: &mut Socket, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.request(SET_LINK, 0, &self.link_header(0), "setting the MAC address");
        batch.attribute(LINK_ADDRESS, &mac);
        socket.carry_out(batch)
    }

    /// Has the kernel forget what it knew of the card for IPv6, which it does when a packet of the least size (RFC 8200, 5) does not fit any
    /// more. A card that goes down leaves its groups, and that is said when it is up again (RFC 3810): the first thing a fork said would name
    /// the group of its template's link-local address, which is made of the template's MAC address.
    ///
    /// What [`silence`](Self::silence) has set is forgotten too.
    pub(super) fn forget_groups(&self, socket: &mut Socket) -> Result<(), NetlinkError> {
        for mtu in [LEAST_IPV6_MTU - 1, USUAL_MTU] {
            let mut batch = Batch::new();
            batch.request(SET_LINK, 0, &self.link_header(0), "forgetting the card's groups");
            batch.attribute(LINK_MTU, &mtu.to_ne_bytes());
            socket.carry_out(batch)?;
        }
        Ok(())
    }

    /// Removes every address of the card but those of `keep`.
    ///
    /// # Errors
    /// One was refused, or there is one still.
    pub(super) fn clear(&self, socket: &mut Socket, keep: Option<&Network>) -> Result<(), NetlinkError> {
        // With the first address of a network its others may go, or stay: so it is looked again.
        for _ in 0..2 {
            let stale = self.stale(socket, keep)?;
            if stale.is_empty() {
                return Ok(());
            }
            for assigned in stale {
                let (family, bytes) = match assigned.address {
                    IpAddr::V4(address) => (INET, address.octets().to_vec()),
                    IpAddr::V6(address) => (INET6, address.octets().to_vec()),
                };
                let mut header = [family, assigned.prefix, 0, 0, 0, 0, 0, 0];
                header[4..].copy_from_slice(&self.index.to_ne_bytes());
                let mut batch = Batch::new();
                batch.request(DELETE_ADDRESS, 0, &header, "removing an address");
                batch.attribute(ADDRESS_LOCAL, &bytes);
                match socket.carry_out(batch) {
                    Err(error) if error.source.kind() == io::ErrorKind::AddrNotAvailable => {}
                    result => result?,
                }
            }
        }
        if self.stale(socket, keep)?.is_empty() {
            Ok(())
        } else {
            Err(failed("removing the addresses")(io::Error::other("one of them comes back")))
        }
    }

    fn stale(&self, socket: &mut Socket, keep: Option<&Network>) -> Result<Vec<Assigned>, NetlinkError> {
        let kept = |assigned: &Assigned| {
            let is = |address: IpAddr, prefix| assigned.address == address && assigned.prefix == prefix;
            keep.is_some_and(|network| {
                network.ipv4.is_some_and(|Inet { address, prefix, .. }| is(address.into(), prefix))
                    || network.ipv6.is_some_and(|Inet { address, prefix, .. }| is(address.into(), prefix))
            })
        };
        let mut assigned = addresses(socket)?;
        assigned.retain(|assigned| assigned.index == self.index && !kept(assigned));
        Ok(assigned)
    }

    /// `struct ifinfomsg` that sets the card's "up" to that of `flags`.
    fn link_header(&self, flags: u32) -> [u8; 16] {
        let mut header = [0; 16];
        header[4..8].copy_from_slice(&self.index.to_ne_bytes());
        header[8..12].copy_from_slice(&flags.to_ne_bytes());
        header[12..].copy_from_slice(&UP.to_ne_bytes());
        header
    }
}

/// All addresses of all cards.
pub(super) fn addresses(socket: &mut Socket) -> Result<Vec<Assigned>, NetlinkError> {
    let mut found = Vec::new();
    let list = socket.list(GET_ADDRESS, &[0; 8], |message| found.extend(assigned(message)));
    list.map_err(failed("listing the addresses")).map(|()| found)
}

fn assigned(message: &[u8]) -> Option<Assigned> {
    let header = message.first_chunk::<8>()?;
    let [family, prefix, _, _, index @ ..] = *header;
    let mut address = None;
    for (kind, value) in attributes(message.get(8..)?) {
        let ip = match family {
            INET => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            INET6 => <[u8; 16]>::try_from(value).ok().map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes))),
            _ => None,
        };
        // The local one, where both are there: on a point-to-point link the other is the far end's.
        match kind {
            ADDRESS_LOCAL => address = ip,
            ADDRESS_ADDRESS => address = address.or(ip),
            _ => {}
        }
    }
    Some(Assigned { index: u32::from_ne_bytes(index), address: address?, prefix })
}
