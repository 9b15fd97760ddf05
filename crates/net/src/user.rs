//! A fork's network without privileges (mode `user`): a process of the program passt per fork.
//!
//! ```text
//!  guest            the machine's process          passt, as an unprivileged user            the host
//! ┌────────┐ frames ┌────────────┐ stream socket ┌───────────────────────────────────────┐ ┌─────────────────┐
//! │ eth0 ──┼────────┼────────────┼───────────────┼─ TCP, UDP, echo ⇄ sockets of the host ─┼─┼─ as any program │
//! └────────┘        └────────────┘               └───────────────────────────────────────┘ └─────────────────┘
//! ```
//!
//! The machine gets one end of a stream socket when it starts. passt gets the other one, but is started only once the fork's
//! identity is acknowledged ([`UserLink::start`]): before that nothing reads what the guest sends. What waits in the socket by then
//! and was not sent with the fork's own MAC is dropped (see the module `early`). passt ends when the machine closes its end, however
//! the machine ends; nobody has to remember it.
//!
//! passt and QEMU's own user network (SLIRP) would both do. passt is a process of its own with nothing in its file system, whose
//! stream both engines speak: the length of each frame, 4 bytes, big endian, and the frame.
//!
//! # What a fork can reach
//!
//! passt opens ordinary sockets for the guest, in the host's network namespace. So a fork in mode `user` reaches what any program of
//! the host's user reaches.
//!
//! | what | reachable |
//! |---|---|
//! | the outside, TCP and UDP | yes, as the host |
//! | the outside, echo requests (ping) | only if `net.ipv4.ping_group_range` includes passt's group |
//! | the host's services on its addresses (also those of bridges and of containers) | **yes** |
//! | link-local addresses, among them a cloud's metadata service at 169.254.169.254 | **yes** |
//! | other forks' forwarded ports, through the host's addresses | **yes** |
//! | the host's services on 127.0.0.1 | **yes, with Debian 12's passt**: not by the gateway's address, but a guest's root can send packets to 127.0.0.1 itself, which newer versions (Debian 13's) drop; [`risks`](crate::risks) tries it |
//! | other forks, directly | no: each has a stack of its own |
//!
//! Nothing of this can be restricted here: passt has no rules, and an unprivileged user has none to give. It can be kept to one card of the
//! host's (`--outbound-if4`), but that was tried and stops neither 127.0.0.1 nor UDP to the others' addresses. So mode `user` tells forks
//! apart, but **does not keep a guest that is not trusted from the host's services**; that takes mode `tap`. A policy that mode
//! `user` can not keep is refused ([`UserError::NeedsTap`]) and not just left undone.
//!
//! # What else is different from mode `tap`
//!
//! * Forwarded ports are opened on all addresses, loopback included, by passt itself: below 1024 it may not.
//! * Debian 12's passt completes a forwarded TCP connection for the guest only when the caller has said something. Where the server speaks
//!   first (SMTP, MySQL) a caller waits for ever. Debian 13's does not have that fault.
//! * Callers on the host's 127.0.0.1 are seen as the gateway. Debian 12's passt does not answer them on UDP ports.
//! * Each passt takes memory of its own, 20 to 30 MiB with Debian 12 and 15 MiB with Debian 13, and 20 to 60 ms to start, by the host's load,
//!   after the acknowledgement (`examples/user_cost.rs`).
#![allow(unsafe_code)]

mod early;
mod passt;

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use identity::{ForkId, MacAddress};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    address::{GATEWAY_MAC, mac_of_fork},
    policy::{Egress, Forward, Policy, PolicyError, Protocol},
    ports,
};

pub(crate) use passt::find as find_passt;

/// Every fork's address. It has meaning only between a guest and its passt, so all forks can have the same.
const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd3b, 0x7c52, 0x9e1d, 0xa, 0, 0, 0, 0x15);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd3b, 0x7c52, 0x9e1d, 0xa, 0, 0, 0, 2);

/// How long a datagram on the host may take; one that was dropped is waited for so long.
const LOOPBACK_PATIENCE: Duration = Duration::from_millis(200);

/// Why a fork's network could not be made without privileges.
#[derive(Debug, Error)]
pub enum UserError {
    /// Something that a program in the middle can not enforce.
    #[error(
        "{what} can not be enforced by the network `user`: choose the network `tap`, which takes root or CAP_NET_ADMIN"
    )]
    NeedsTap {
        /// Of the policy.
        what: &'static str,
    },
    /// The program is missing.
    #[error("the program passt, which the network `user` takes, is not installed: run apt-get install passt")]
    NoPasst,
    /// A policy that can not be.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A port of the host is not free.
    #[error("the port {port}/{protocol} of the host is taken by another program or fork; forward another one")]
    PortTaken {
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// A port that takes a privilege.
    #[error(
        "the port {port} of the host is for privileged programs only; forward one from {first} on, or choose the network `tap`"
    )]
    LowPort {
        /// The port.
        port: u16,
        /// The first that anybody may listen on (`net.ipv4.ip_unprivileged_port_start`).
        first: u16,
    },
    /// The machine is gone: there is nobody to connect.
    #[error("the machine ended before its network was started")]
    MachineEnded,
    /// passt refused.
    #[error("passt did not start: {said}")]
    Refused {
        /// What it said.
        said: String,
    },
    /// A step failed.
    #[error("{doing} for the network `user` failed")]
    Step {
        /// What was done.
        doing: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn step(doing: &'static str) -> impl FnOnce(io::Error) -> UserError {
    move |source| UserError::Step { doing, source }
}

/// What a guest in mode `user` is to have. At least one family is there.
///
/// The prefixes are /32 and /128 and the gateways are on the link, as in mode `tap`: everything goes by the gateway, whose MAC address
/// is given, so that the guest never asks for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserAddresses {
    /// The guest's card: each fork's own.
    pub mac: MacAddress,
    /// The gateways' card.
    pub gateway_mac: MacAddress,
    /// IPv4: address and gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<(Ipv4Addr, Ipv4Addr)>,
    /// IPv6: address and gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<(Ipv6Addr, Ipv6Addr)>,
}

impl UserAddresses {
    /// Those of a fork, of the families that the host has a default route for. On a host that has none it is IPv4: its forwarded
    /// ports and its own networks still can be reached.
    #[must_use]
    pub fn of(id: &ForkId) -> Self {
        let (v4, v6) = (has_default_route_v4(), has_default_route_v6());
        Self {
            mac: mac_of_fork(id),
            gateway_mac: GATEWAY_MAC,
            v4: (v4 || !v6).then_some((GUEST_V4, GATEWAY_V4)),
            v6: v6.then_some((GUEST_V6, GATEWAY_V6)),
        }
    }
}

/// As `/proc/net/route` has it: destination and mask are zero, and it is a gateway's or a point-to-point link's that is up.
fn has_default_route_v4() -> bool {
    let table = fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    table.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
    })
}

/// As `/proc/net/ipv6_route` has it; what refuses packets has a route on `lo`.
fn has_default_route_v6() -> bool {
    let table = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
    table.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let everywhere = fields.first().is_some_and(|to| to.bytes().all(|digit| digit == b'0'));
        everywhere && fields.get(1) == Some(&"00") && fields.last().is_some_and(|card| *card != "lo")
    })
}

/// What passt finds first in the socket: the guest's MAC address. passt learns that from what the guest sends, and until then what comes from
/// outside goes to a card that nobody has. It is a guest's announcement of its own address (ARP), which is not answered.
fn announcement(addresses: &UserAddresses) -> Vec<u8> {
    const ARP: [u8; 2] = [8, 6];
    // Ethernet, IPv4, their lengths, a request.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let (own, address) = (addresses.mac.octets(), addresses.v4.map_or(GUEST_V4, |(own, _)| own).octets());
    let frame = [&[0xff; 6][..], &own, &ARP, &REQUEST, &own, &address, &[0; 6], &address].concat();
    [&[0, 0, 0, 42], &frame[..]].concat()
}

/// A fork's network that is not started yet: what the guest sends waits in a socket, at most what fits in.
#[derive(Debug)]
pub struct UserLink {
    socket: OwnedFd,
    addresses: UserAddresses,
}

/// The passt of a fork. It ends when the fork's machine ends. Its pid alone may by then be somebody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserProcess {
    /// The pid.
    pub pid: u32,
    /// Start time in clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

/// With what rights passt runs. It takes away from itself what it has besides: file system, processes, most system calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunAs {
    /// User and group to change to first (needs root). `None`: for root, nobody (65534); for others, themselves.
    pub user: Option<(u32, u32)>,
}

impl UserLink {
    /// Makes the socket. The second value is the machine's end (each frame has its length before it); the machine must be the only one
    /// to hold it, so that its end is passt's end.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn new(addresses: UserAddresses) -> Result<(Self, OwnedFd), UserError> {
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (socket, machine) = pair.map_err(|error| step("making a socket")(error.into()))?;
        rustix::io::write(&machine, &announcement(&addresses))
            .map_err(|error| step("making a socket")(error.into()))?;
        Ok((Self { socket, addresses }, machine))
    }

    /// With the other end of a socket that a machine has already. The guest must announce itself before somebody calls it.
    #[must_use]
    pub fn of_socket(addresses: UserAddresses, socket: OwnedFd) -> Self {
        Self { socket, addresses }
    }

    /// What the guest is to have.
    #[must_use]
    pub fn addresses(&self) -> &UserAddresses {
        &self.addresses
    }

    /// Says whether a policy can be kept at all, before anything of a fork is made.
    ///
    /// # Errors
    /// [`UserError::NeedsTap`], [`UserError::Policy`], [`UserError::PortTaken`].
    pub fn check(policy: &Policy) -> Result<(), UserError> {
        policy.check()?;
        let refused = [
            (policy.egress != Egress::Allow, "a limit to where the fork's connections may go (egress)"),
            (policy.net.is_some(), "a named net"),
            (policy.rate.is_some(), "a rate"),
        ];
        if let Some((_, what)) = refused.into_iter().find(|(wanted, _)| *wanted) {
            return Err(UserError::NeedsTap { what });
        }
        match policy.forwards.iter().find(|forward| ports::has_listener(forward)) {
            Some(&Forward { protocol, host, .. }) => Err(UserError::PortTaken { port: host, protocol }),
            None => Ok(()),
        }
    }

    /// Starts passt: from now on packets pass. To be called when the fork's identity is acknowledged. Returns when all forwarded ports
    /// are open.
    ///
    /// passt is no child of this process when this returns. It inherits the socket and nothing else: no other descriptor, no
    /// environment. It logs to 64 KiB of memory that end with it.
    ///
    /// # Errors
    /// [`UserError`]; then nothing runs, and what the guest sends is an error for its machine's process, which has to bear that.
    pub fn start(self, policy: &Policy, run_as: RunAs) -> Result<UserProcess, UserError> {
        Self::check(policy)?;
        let program = find_passt().ok_or(UserError::NoPasst)?;
        early::drop_others(self.socket.as_fd(), self.addresses.mac).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => UserError::MachineEnded,
            _ => step("looking at what the guest has sent")(error),
        })?;
        let pid = passt::start(&program, self.socket.as_fd(), &self.addresses, &policy.forwards, run_as)?;
        UserProcess::of(pid).map_err(|_| UserError::MachineEnded)
    }
}

/// Whether a guest reaches what listens on the host's 127.0.0.1, by packets that are for there. Newer versions of passt drop them. Asked by
/// sending one.
pub(crate) fn reaches_loopback() -> Result<bool, UserError> {
    let doing = "asking whether passt leads to the host's loopback";
    let io = |error: io::Error| step(doing)(error);
    let listener = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io)?;
    listener.set_read_timeout(Some(LOOPBACK_PATIENCE)).map_err(io)?;
    let port = listener.local_addr().map_err(io)?.port();
    let addresses = UserAddresses {
        mac: MacAddress::local([2, 0, 0, 0, 0, 1]),
        gateway_mac: GATEWAY_MAC,
        v4: Some((GUEST_V4, GATEWAY_V4)),
        v6: None,
    };
    let (link, machine) = UserLink::new(addresses)?;
    let _process = link.start(&Policy::default(), RunAs::default())?;
    rustix::io::write(&machine, &datagram(&addresses, port)).map_err(|error| io(error.into()))?;
    Ok(listener.recv(&mut [0; 4]).is_ok())
}

/// A frame of the stream: four bytes in UDP, from the guest to a port of 127.0.0.1.
fn datagram(addresses: &UserAddresses, port: u16) -> Vec<u8> {
    const IPV4: [u8; 2] = [8, 0];
    const ANY_PORT: u16 = 1024;
    // RFC 791: version and length, service; total length; identification; not to be cut; hops, UDP; checksum.
    let mut header = [0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 127, 0, 0, 1];
    header[12..16].copy_from_slice(&GUEST_V4.octets());
    let mut sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    (header[10], header[11]) = (high, low);
    // RFC 768; 0 is "no checksum".
    let udp = [ANY_PORT.to_be_bytes(), port.to_be_bytes(), [0, 12], [0, 0]].concat();
    let frame = [&addresses.gateway_mac.octets()[..], &addresses.mac.octets(), &IPV4, &header, &udp, b"ping"].concat();
    [&[0, 0, 0, 46], &frame[..]].concat()
}

impl AsFd for UserLink {
    /// The end that is to be passt's.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl UserProcess {
    fn of(pid: u32) -> io::Result<Self> {
        let (_, start_time) = stat(pid)?;
        Ok(Self { pid, start_time })
    }

    /// Whether it is still there and no zombie.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_ok_and(|(state, start_time)| start_time == self.start_time && !matches!(state, 'Z' | 'X'))
    }
}

/// State and start time. The command's name may hold anything, so fields are counted after its `)`.
fn stat(pid: u32) -> io::Result<(char, u64)> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    let text = String::from_utf8_lossy(&text);
    let parse = || {
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        Some((fields.next()?.chars().next()?, fields.nth(18)?.parse().ok()?))
    };
    parse().ok_or_else(|| io::ErrorKind::InvalidData.into())
}
