//! Saying who has an address now, unasked: a gratuitous ARP (RFC 5227, 3), an unsolicited neighbour advertisement (RFC 4861, 7.2.6).

use std::{io, net::Ipv4Addr, net::Ipv6Addr, os::fd::AsRawFd, os::fd::OwnedFd};

use identity::{MacAddress, Network};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];
const EVERYBODY: [u8; 6] = [0xff; 6];
/// Of the group of all nodes, ff02::1.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ARP_LEN: usize = 42;
const ADVERTISEMENT_LEN: usize = 14 + 40 + 32;

/// A socket for frames, which receives none; absent in a kernel that has no such sockets.
#[derive(Debug)]
pub(super) struct Announcer(Option<OwnedFd>);

impl Announcer {
    pub(super) fn open() -> Self {
        // With the protocol 0 it is given no frame.
        Self(socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None).ok())
    }

    /// Announces the addresses on the card of this index, which is up.
    pub(super) fn announce(&self, index: u32, network: &Network) -> io::Result<&'static str> {
        if let Some(inet) = &network.ipv4 {
            self.send(index, &gratuitous_arp(network.mac, inet.address))?;
        }
        if let Some(inet) = &network.ipv6 {
            self.send(index, &advertisement(network.mac, inet.address))?;
        }
        Ok(match (&network.ipv4, &network.ipv6) {
            (Some(_), Some(_)) => "arp+na",
            (Some(_), None) => "arp",
            _ => "na",
        })
    }

    #[inline(never)]
    fn send(&self, index: u32, frame: &[u8]) -> io::Result<()> {
        let socket = self.0.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: all zeroes is a valid sockaddr_ll. The call reads the frame and the address, as long as it is told, and
        // keeps no reference.
        let sent = unsafe {
            let mut to: libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = libc::AF_PACKET.try_into().unwrap_or_default();
            to.sll_ifindex = index.try_into().unwrap_or_default();
            let len = size_of::<libc::sockaddr_ll>().try_into().unwrap_or_default();
            libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), len)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn gratuitous_arp(mac: MacAddress, address: Ipv4Addr) -> [u8; ARP_LEN] {
    let mut frame = [0; ARP_LEN];
    frame[..6].copy_from_slice(&EVERYBODY);
    frame[6..12].copy_from_slice(&mac.octets());
    frame[12..14].copy_from_slice(&ARP);
    // Ethernet, IPv4, their lengths, request.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac.octets());
    frame[28..32].copy_from_slice(&address.octets());
    frame[38..].copy_from_slice(&address.octets());
    frame
}

fn advertisement(mac: MacAddress, address: Ipv6Addr) -> [u8; ADVERTISEMENT_LEN] {
    let mut frame = [0; ADVERTISEMENT_LEN];
    frame[..6].copy_from_slice(&ALL_NODES_MAC);
    frame[6..12].copy_from_slice(&mac.octets());
    frame[12..14].copy_from_slice(&IPV6);
    // Version 6, 32 bytes of ICMPv6, hop limit 255: nobody but a neighbour can have sent it.
    frame[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, 32, 58, 255]);
    frame[22..38].copy_from_slice(&address.octets());
    frame[38..54].copy_from_slice(&ALL_NODES);
    // Neighbour advertisement; override what is remembered.
    frame[54] = 136;
    frame[58] = 0x20;
    frame[62..78].copy_from_slice(&address.octets());
    // The address of the card, one unit of 8 bytes.
    frame[78..80].copy_from_slice(&[2, 1]);
    frame[80..].copy_from_slice(&mac.octets());
    let checksum = checksum(&frame[22..]);
    frame[56..58].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// The checksum of ICMPv6 (RFC 4443, 2.3) over both addresses and a message of 32 bytes whose own is still 0.
fn checksum(addresses_and_message: &[u8]) -> u16 {
    // The pseudo header has the length and the next header, too.
    let mut sum: u32 = 32 + 58;
    for pair in addresses_and_message.chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisements_checksum_checks() {
        let mac = MacAddress::new([2, 0x6f, 1, 2, 3, 4]).unwrap();
        for address in ["fd00::2", "2001:db8:ffff:ffff:ffff:ffff:ffff:fffe"] {
            let frame = advertisement(mac, address.parse().unwrap());
            // With the checksum in it the sum is all ones, so that its complement is 0.
            assert_eq!(checksum(&frame[22..]), 0, "{address}");
            assert_eq!(frame[14 + 6], 58);
        }
    }
}
