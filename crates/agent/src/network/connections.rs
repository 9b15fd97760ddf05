//! Ending connections that were made with an address that is about to go.
//!
//! A connection outlives its address. With IPv4 the kernel then refuses to send (it looks whether the source is its own); with IPv6 it does
//! not look, and goes on sending with the old address. So they are ended (`SOCK_DESTROY`): their program sees `ECONNABORTED`, and
//! while the card is still up the other side is told with a reset.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::netlink::{Batch, NetlinkError, Socket, failed};

// include/uapi/linux/sock_diag.h, inet_diag.h
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const INET: u8 = 2;
const INET6: u8 = 10;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// `TCP_TIME_WAIT`: no program has it any more, and it sends nothing but answers to packets for its address.
const TIME_WAIT: u8 = 6;
/// `struct inet_diag_sockid`.
const ID: usize = 48;

#[derive(Debug)]
struct Found {
    family: u8,
    protocol: u8,
    id: [u8; ID],
}

/// Ends every TCP connection and every UDP socket with a local address that is neither loopback nor among `kept`, listening sockets
/// on such an address too. Answers with how many there were.
///
/// # Errors
/// The kernel can not list or end them (it lacks `inet_diag`, `tcp_diag` or `udp_diag`); there are some still.
pub(super) fn end(kept: &BTreeSet<IpAddr>) -> Result<usize, NetlinkError> {
    let mut socket = Socket::diagnosis().map_err(failed("looking for connections"))?;
    let mut ended = 0;
    // Ending a listening socket ends what it has not accepted yet. What appeared meanwhile is found by the second look.
    for _ in 0..2 {
        let found = list(&mut socket, kept).map_err(failed("looking for connections"))?;
        if found.is_empty() {
            return Ok(ended);
        }
        for found in found {
            let mut batch = Batch::new();
            batch.request(DESTROY, 0, &request(found.family, found.protocol, 0, &found.id), "ending a connection");
            match socket.carry_out(batch) {
                Ok(()) => ended += 1,
                // It has ended by itself.
                Err(error) if error.source.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    match list(&mut socket, kept).map_err(failed("looking for connections"))?.len() {
        0 => Ok(ended),
        left => Err(failed("ending connections")(io::Error::other(format!("{left} are still there")))),
    }
}

fn list(socket: &mut Socket, kept: &BTreeSet<IpAddr>) -> io::Result<Vec<Found>> {
    let mut all = Vec::new();
    for (family, protocol) in [(INET, TCP), (INET6, TCP), (INET, UDP), (INET6, UDP)] {
        socket.list(BY_FAMILY, &request(family, protocol, u32::MAX, &[0; ID]), |message| {
            let Some(([family, state, ..], id)) = message.first_chunk::<4>().zip(message.get(4..4 + ID)) else {
                return;
            };
            let Ok(id) = <[u8; ID]>::try_from(id) else { return };
            let local = local_address(*family, &id);
            let stays = local.is_unspecified() || local.is_loopback() || kept.contains(&local) || *state == TIME_WAIT;
            if !stays {
                all.push(Found { family: *family, protocol, id });
            }
        })?;
    }
    Ok(all)
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, protocol: u8, states: u32, id: &[u8; ID]) -> [u8; 8 + ID] {
    let mut request = [0; 8 + ID];
    request[..2].copy_from_slice(&[family, protocol]);
    request[4..8].copy_from_slice(&states.to_ne_bytes());
    request[8..].copy_from_slice(id);
    request
}

fn local_address(family: u8, id: &[u8; ID]) -> IpAddr {
    // Two ports, then 16 bytes for an address of either family.
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&id[4..20]);
    if family == INET {
        return Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into();
    }
    Ipv6Addr::from(bytes).to_canonical()
}
