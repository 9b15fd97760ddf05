//! Ports of the host that lead to forks: who has which is in files, what the kernel does is in the host's table.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
};

use identity::ForkId;
use serde::{Deserialize, Serialize};

use crate::{
    address::Addresses,
    error::{LinkError, step},
    host_table,
    nft::Transaction,
    policy::{Forward, Protocol},
    state::{self, State},
};

/// A port of the host, and where it leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Taken {
    pub(crate) owner: ForkId,
    pub(crate) forward: Forward,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Option<Ipv6Addr>,
}

fn path(state: &State, forward: &Forward) -> PathBuf {
    state.ports().join(format!("{}-{}.json", forward.protocol, forward.host))
}

/// All ports that lead somewhere.
pub(crate) fn all(state: &State) -> io::Result<Vec<Taken>> {
    let mut all = Vec::new();
    for name in state::entries(&state.ports())? {
        all.extend(state::read_json(&state.ports().join(name))?);
    }
    Ok(all)
}

/// Takes ports for a fork and lets them lead to it. The lock of the shared parts is held. What was taken before an error stays
/// the fork's, until [`release`].
pub(crate) fn take(
    state: &State,
    owner: &ForkId,
    addresses: &Addresses,
    forwards: &[Forward],
) -> Result<(), LinkError> {
    let mut rules = Transaction::default();
    for forward in forwards {
        let path = path(state, forward);
        let file = |source| LinkError::File { doing: "taking the port", path: path.clone(), source };
        let taken: Option<Taken> = state::read_json(&path).map_err(file)?;
        match taken {
            Some(taken) if taken.owner != *owner => {
                return Err(taken_by(forward, format!("fork {}", taken.owner)));
            }
            Some(_) => {}
            None => free_on_host(forward)?,
        }
        let taken = Taken { owner: owner.clone(), forward: *forward, v4: addresses.v4, v6: addresses.v6 };
        state::replace_json(&path, &taken).map_err(|source| LinkError::File {
            doing: "taking the port",
            path: path.clone(),
            source,
        })?;
        host_table::add_port(&mut rules, &taken);
    }
    if forwards.is_empty() { Ok(()) } else { rules.commit().map_err(step("forwarding ports")) }
}

/// Lets what the host says on 127.0.0.1 leave it by a wire, and the answers come back to there; or no more.
///
/// It also lets the wire bring what was sent to 127.0.0.0/8 from its other side, as no other card may. Of that there is nothing: the fork's
/// namespace refuses those addresses three times (its routing, its sources, its ranges that are never reached), in rules that are
/// no part of the host's and that nothing on the host flushes. The host's own table refuses every connection from a fork to it besides.
pub(crate) fn let_localhost_in(wire: &str, yes: bool) -> io::Result<()> {
    crate::namespace::set(&format!("ipv4/conf/{wire}/route_localnet"), if yes { "1" } else { "0" })
}

/// Gives a fork's ports back. The lock of the shared parts is held. One that is somebody else's by now is left alone.
pub(crate) fn release(state: &State, owner: &ForkId) -> io::Result<()> {
    for taken in all(state)?.into_iter().filter(|taken| taken.owner == *owner) {
        for rules in host_table::remove_port(&taken) {
            match rules.commit() {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        state::remove(&path(state, &taken.forward))?;
    }
    Ok(())
}

fn taken_by(forward: &Forward, by: String) -> LinkError {
    LinkError::PortTaken { port: forward.host, protocol: forward.protocol, by }
}

/// Refuses a port that a program of the host listens on: it would never be reached again.
fn free_on_host(forward: &Forward) -> Result<(), LinkError> {
    if has_listener(forward) { Err(taken_by(forward, "a program of the host".to_owned())) } else { Ok(()) }
}

/// Whether a program of the host listens on a port, at any address.
pub(crate) fn has_listener(forward: &Forward) -> bool {
    let all: [SocketAddr; 2] =
        [(Ipv4Addr::UNSPECIFIED, forward.host).into(), (Ipv6Addr::UNSPECIFIED, forward.host).into()];
    all.into_iter().any(|address| {
        let bound = match forward.protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
        };
        // That there is no IPv6 here, or that low ports are not for this user, says nothing about the port.
        bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    })
}
