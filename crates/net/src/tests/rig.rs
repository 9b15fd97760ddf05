//! What stands for a host, for machines, and for the world outside: network namespaces.
//!
//! A test's thread leaves the machine's network namespace before anything else, and its mounts are its own. A guest is a
//! namespace with a card whose frames are carried to the fork's tap and back, as a machine would do.

use std::{
    cell::Cell,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use identity::{ForkId, MacAddress};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mount::{MountPropagationFlags, mount_change},
    net::{AddressFamily as Family, RecvFlags, SocketFlags, SocketType, recv, socket_with},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::{
    ClosedLink, LinkRecord, Network, OpenLink, Policy, Pool, TapOptions, UserAddresses, namespace,
    netlink::{Socket, link},
    tap,
};

/// The host's address towards the outside, and a server's there.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Another address of the same server.
pub(super) const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// The same for IPv6.
pub(super) const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
pub(super) const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
pub(super) const OTHER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 9);

/// Of both ends of the wire to the outside.
pub(super) const UPLINK: MacAddress = MacAddress::local([2, 0, 0, 0, 0, 9]);

pub(super) const TAP: TapOptions = TapOptions { owner: 0, vnet_header: false };

/// Long enough for an answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a packet that is dropped is waited for. One that was only lost on a busy machine comes again after a second.
const NEVER: Duration = Duration::from_millis(1200);

/// A host.
#[derive(Debug)]
pub(super) struct World {
    dir: tempfile::TempDir,
    count: Cell<u32>,
}

/// Runs a test in a host of its own. Without the rights for that it is not run, and says so.
pub(super) fn in_a_world(test: impl FnOnce(&World) + Send) {
    if let Some(capability) = crate::missing_capability() {
        eprintln!("not run: it needs {capability}");
        return;
    }
    thread::scope(|scope| {
        let world = scope.spawn(|| {
            // SAFETY: the table of file descriptors stays shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            let mut socket = Socket::route().unwrap();
            let lo = socket.index_of("lo").unwrap();
            socket.carry_out(vec![link::up(lo)]).unwrap();
            let world = World { dir: tempfile::tempdir().unwrap(), count: Cell::new(0) };
            std::fs::create_dir(world.path("ns")).unwrap();
            test(&world);
        });
        if let Err(panic) = world.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// As [`in_a_world`], in a process of its own, so that its open files can be counted. `name` is the test's.
pub(super) fn in_a_world_alone(name: &str, test: impl FnOnce(&World) + Send) {
    const ALONE: &str = "OFFSHOOT_TEST_ALONE";
    if std::env::var_os(ALONE).is_some_and(|alone| alone == name) {
        return in_a_world(test);
    }
    let program = std::env::current_exe().unwrap();
    let output =
        std::process::Command::new(program).args(["--exact", name, "--nocapture"]).env(ALONE, name).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// The id of the `number`-th fork.
pub(super) fn fork(number: u32) -> ForkId {
    ForkId::parse(&format!("{:020x}", (u128::from(number) + 1) << 40)).unwrap()
}

impl World {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn network(&self) -> Network {
        self.network_of(Pool::default())
    }

    pub(super) fn network_of(&self, pool: Pool) -> Network {
        Network::open(&self.path("net"), pool, Duration::from_secs(60)).unwrap()
    }

    fn new_namespace(&self) -> PathBuf {
        let number = self.count.replace(self.count.get() + 1);
        let path = self.path(&format!("ns/{number}"));
        namespace::make(&path, || Ok::<_, io::Error>(())).unwrap();
        path
    }

    /// The world outside: a namespace behind the host's only card. It has no route to the forks' addresses.
    pub(super) fn outside(&self) -> PathBuf {
        let path = self.new_namespace();
        let file = std::fs::File::open(&path).unwrap();
        let mut host = Socket::route().unwrap();
        host.carry_out(vec![link::new_wire("uplink", 0, UPLINK, "server", file.as_fd())]).unwrap();
        let uplink = host.index_of("uplink").unwrap();
        host.carry_out(vec![
            link::up(uplink),
            link::add_address(uplink, HOST.into()),
            link::route_to(uplink, OUTSIDE.into()),
            link::route_to(uplink, OTHER.into()),
        ])
        .unwrap();
        namespace::within(&path, || {
            let mut inside = Socket::route()?;
            let server = inside.index_of("server")?;
            inside.carry_out(vec![
                link::up(server),
                link::add_address(server, OUTSIDE.into()),
                link::add_address(server, OTHER.into()),
                link::route_to(server, HOST.into()),
            ])
        })
        .unwrap();
        path
    }

    /// Gives the outside IPv6; whether this machine has any.
    pub(super) fn outside_v6(&self, outside: &Path) -> bool {
        if !namespace::setting("ipv6/conf/default/disable_ipv6").is_ok_and(|value| value == "0") {
            eprintln!("not run: this host has no IPv6");
            return false;
        }
        let mut host = Socket::route().unwrap();
        let uplink = host.index_of("uplink").unwrap();
        host.carry_out(vec![
            link::add_address(uplink, HOST_V6.into()),
            link::route_to(uplink, OUTSIDE_V6.into()),
            link::route_to(uplink, OTHER_V6.into()),
        ])
        .unwrap();
        namespace::within(outside, || {
            let mut inside = Socket::route()?;
            let server = inside.index_of("server")?;
            inside.carry_out(vec![
                link::add_address(server, OUTSIDE_V6.into()),
                link::add_address(server, OTHER_V6.into()),
                link::route_to(server, HOST_V6.into()),
            ])
        })
        .unwrap();
        true
    }

    /// Makes the outside the host's way to everywhere.
    pub(super) fn default_route_outside(&self) {
        let mut host = Socket::route().unwrap();
        let uplink = host.index_of("uplink").unwrap();
        host.carry_out(vec![link::route_to_all(uplink, OUTSIDE.into())]).unwrap();
    }

    /// The same for IPv6.
    pub(super) fn default_route_outside_v6(&self) {
        let mut host = Socket::route().unwrap();
        let uplink = host.index_of("uplink").unwrap();
        host.carry_out(vec![link::route_to_all(uplink, OUTSIDE_V6.into())]).unwrap();
    }

    /// Lets the outside send what is for `to` to the host.
    pub(super) fn route_from(&self, outside: &Path, to: impl Into<IpAddr>) {
        let to = to.into();
        namespace::within(outside, || {
            let mut socket = Socket::route()?;
            let server = socket.index_of("server")?;
            socket.carry_out(vec![link::route_to(server, to)])
        })
        .unwrap();
    }

    /// Packets that came out of a fork's namespace.
    pub(super) fn packets_out_of(&self, record: &LinkRecord) -> u64 {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{}:", record.wire()))).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// A fork with an open link.
    pub(super) fn open(&self, network: &Network, number: u32, policy: Policy) -> (OpenLink, Guest) {
        let link = network.prepare(&fork(number), TAP).unwrap();
        let guest = Guest::start(self, &link);
        (link.open(policy).unwrap(), guest)
    }
}

/// Everything that is there, in the state directory and in the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Everything {
    files: Vec<String>,
    links: Vec<String>,
    mounts: usize,
    leases: usize,
    open_files: usize,
}

impl World {
    /// Without what is meant to stay: files of addresses that rest, locks, the host's table.
    pub(super) fn everything(&self, network: &Network) -> Everything {
        let mut files = Vec::new();
        for dir in ["links", "ns", "nets", "ports"] {
            let entries = std::fs::read_dir(self.path("net").join(dir)).unwrap();
            files.extend(entries.map(|entry| format!("{dir}/{}", entry.unwrap().file_name().display())));
        }
        files.sort();
        let mut socket = Socket::route().unwrap();
        let mut links: Vec<_> = link::all(&mut socket).unwrap().into_iter().map(|link| link.name).collect();
        links.sort();
        drop(socket);
        // Those of other tests, which this one got a copy of, go when their folders are removed.
        let dir = format!(" {}/", self.dir.path().canonicalize().unwrap().display());
        Everything {
            files,
            links,
            mounts: std::fs::read_to_string("/proc/thread-self/mounts").unwrap().matches(&dir).count(),
            leases: network.leases.held().unwrap().len(),
            open_files: std::fs::read_dir("/proc/thread-self/fd").unwrap().count(),
        }
    }

    /// A link of somebody else's.
    pub(super) fn stranger(&self, name: &str, group: u32) {
        let namespace = std::fs::File::open(self.new_namespace()).unwrap();
        let wire = link::new_wire(name, group, MacAddress::local([2, 1, 1, 1, 1, 1]), "peer", namespace.as_fd());
        Socket::route().unwrap().carry_out(vec![wire]).unwrap();
    }
}

/// All frames that any card of the thread's namespace sees from now on.
#[derive(Debug)]
pub(super) struct Sniffer(OwnedFd);

impl Sniffer {
    pub(super) fn new() -> Self {
        let all = rustix::net::Protocol::from_raw(std::num::NonZero::new(u32::from(3_u16.to_be())).unwrap());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Self(socket_with(Family::PACKET, SocketType::RAW, flags, Some(all)).unwrap())
    }

    pub(super) fn frames(&self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 65536];
        let mut frames = Vec::new();
        while let Ok((length, _)) = recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
            frames.push(buffer[..length].to_vec());
        }
        frames
    }
}

pub(super) fn contains(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

/// A machine with a card.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) namespace: PathBuf,
    pub(super) record: LinkRecord,
    stop: Arc<AtomicBool>,
    carrier: Option<thread::JoinHandle<()>>,
}

impl Guest {
    /// Starts one on a link's tap, and applies its identity.
    pub(super) fn start(world: &World, link: &ClosedLink) -> Self {
        let guest = Self::start_bare(world, link);
        let addresses = guest.record.addresses;
        guest.becomes(addresses.mac, addresses.v4.into());
        if let Some(v6) = addresses.v6 {
            guest.becomes(addresses.mac, v6.into());
        }
        guest
    }

    /// Starts one whose card is down and has no address.
    pub(super) fn start_bare(world: &World, link: &ClosedLink) -> Self {
        let tap = link.tap().unwrap();
        let namespace = world.new_namespace();
        let card = namespace::within(&namespace, || {
            namespace::set("ipv6/conf/all/accept_dad", "0")?;
            namespace::set("ipv6/conf/default/accept_dad", "0")?;
            let mut socket = Socket::route()?;
            let lo = socket.index_of("lo")?;
            socket.carry_out(vec![link::up(lo)])?;
            tap::attach("eth0", TAP)
        })
        .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let carrier = thread::spawn(move || carry(&tap, &card, &stopped));
        Self { namespace, record: link.record().clone(), stop, carrier: Some(carrier) }
    }

    /// Gives its card a MAC address and an address, with the gateway for it on the link.
    pub(super) fn becomes(&self, mac: MacAddress, address: IpAddr) {
        let gateway = match address {
            IpAddr::V4(_) => self.record.addresses.gateway_v4.into(),
            IpAddr::V6(_) => self.record.addresses.gateway_v6.unwrap().into(),
        };
        self.within(|| {
            let mut socket = Socket::route()?;
            let card = socket.index_of("eth0")?;
            socket.carry_out(vec![link::set_mac(card, mac), link::up(card)])?;
            socket.carry_out(vec![link::add_address(card, address), default_route(card, gateway)])
        })
        .unwrap();
    }

    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        namespace::within(&self.namespace, work)
    }

    /// Sends what is for 127.0.0.0/8 out of its card, as a hostile guest can.
    pub(super) fn gives_up_its_loopback(&self) {
        self.within(|| {
            let mut socket = Socket::route()?;
            let lo = socket.index_of("lo")?;
            socket.carry_out(vec![link::down(lo)])?;
            namespace::set("ipv4/conf/eth0/route_localnet", "1")
        })
        .unwrap();
    }

    pub(super) fn v4(&self) -> Ipv4Addr {
        self.record.addresses.v4
    }

    /// Sends a datagram.
    pub(super) fn send(
        &self,
        from: impl Into<IpAddr>,
        to: impl Into<SocketAddr>,
        bytes: &[u8],
    ) -> io::Result<UdpSocket> {
        let (from, to) = (from.into(), to.into());
        self.within(|| {
            let socket = UdpSocket::bind((from, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(bytes, to)?;
            Ok(socket)
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
        let _ = namespace::unmake(&self.namespace);
    }
}

/// A machine whose card is connected to a stream socket. Its namespace is the guest.
#[derive(Debug)]
pub(super) struct StreamGuest {
    pub(super) namespace: PathBuf,
    stop: Arc<AtomicBool>,
    carrier: Option<thread::JoinHandle<()>>,
}

impl StreamGuest {
    /// Starts one on its end of the socket, and applies its identity. Its loopback stays down.
    pub(super) fn start(world: &World, addresses: &UserAddresses, end: OwnedFd) -> Self {
        let namespace = world.new_namespace();
        let card = namespace::within(&namespace, || {
            namespace::set("ipv6/conf/default/accept_dad", "0")?;
            // Nothing but what a test sends.
            namespace::set("ipv6/conf/default/addr_gen_mode", "1")?;
            let card = tap::attach("eth0", TAP)?;
            let mut socket = Socket::route()?;
            let index = socket.index_of("eth0")?;
            let of_v4 = addresses.v4.map(|(own, gateway)| (IpAddr::from(own), IpAddr::from(gateway)));
            let of_v6 = addresses.v6.map(|(own, gateway)| (IpAddr::from(own), IpAddr::from(gateway)));
            socket.carry_out(vec![link::set_mac(index, addresses.mac), link::up(index)])?;
            for (own, gateway) in [of_v4, of_v6].into_iter().flatten() {
                socket.carry_out(vec![
                    link::add_address(index, own),
                    link::neighbour(index, gateway, addresses.gateway_mac),
                    default_route(index, gateway),
                ])?;
            }
            Ok::<_, io::Error>(card)
        })
        .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let carrier = thread::spawn(move || carry_stream(&card, end, &stopped));
        Self { namespace, stop, carrier: Some(carrier) }
    }

    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        namespace::within(&self.namespace, work)
    }
}

impl Drop for StreamGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
        let _ = namespace::unmake(&self.namespace);
    }
}

/// Carries frames both ways between a tap and a stream of frames, each with its length before it.
fn carry_stream(tap: &OwnedFd, stream: OwnedFd, stop: &AtomicBool) {
    let mut stream = std::os::unix::net::UnixStream::from(stream);
    let mut buffer = vec![0; 65536];
    let mut received = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let (tap_end, stream_end) = (tap.as_fd(), stream.as_fd());
        let mut waiting =
            [PollFd::from_borrowed_fd(tap_end, PollFlags::IN), PollFd::from_borrowed_fd(stream_end, PollFlags::IN)];
        let _ = poll(&mut waiting, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }));
        let readable = waiting[1].revents().contains(PollFlags::IN);
        while let Ok(length) = rustix::io::read(tap, &mut buffer[4..]) {
            buffer[..4].copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
            if stream.write_all(&buffer[..4 + length]).is_err() {
                return;
            }
        }
        if readable {
            let length = stream.read(&mut buffer).unwrap_or(0);
            received.extend_from_slice(&buffer[..length]);
            if length == 0 {
                return;
            }
        }
        while let Some(length) = received.first_chunk().map(|length| u32::from_be_bytes(*length) as usize)
            && received.len() >= 4 + length
        {
            let _ = rustix::io::write(tap, &received[4..4 + length]);
            received.drain(..4 + length);
        }
    }
}

/// Carries frames both ways.
fn carry(one: &OwnedFd, other: &OwnedFd, stop: &AtomicBool) {
    let mut buffer = vec![0; 65536];
    while !stop.load(Ordering::Relaxed) {
        let mut waiting = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        let _ = poll(&mut waiting, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }));
        for (from, to) in [(one, other), (other, one)] {
            while let Ok(length) = rustix::io::read(from, &mut buffer[..]) {
                let _ = rustix::io::write(to, &buffer[..length]);
            }
        }
    }
}

fn default_route(index: u32, gateway: IpAddr) -> NetlinkMessage<RouteNetlinkMessage> {
    let mut message = RouteMessage::default();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.header.flags = RouteFlags::Onlink;
    message.attributes.push(RouteAttribute::Oif(index));
    let (family, gateway) = match gateway {
        IpAddr::V4(gateway) => (AddressFamily::Inet, RouteAddress::Inet(gateway)),
        IpAddr::V6(gateway) => (AddressFamily::Inet6, RouteAddress::Inet6(gateway)),
    };
    message.header.address_family = family;
    message.attributes.push(RouteAttribute::Gateway(gateway));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    request
}

/// A server that tells every caller the address it is seen with.
pub(super) fn serve(namespace: &Path, address: impl Into<SocketAddr>) -> SocketAddr {
    let address = address.into();
    let listener = namespace::within(namespace, || TcpListener::bind(address)).unwrap();
    answer_on(listener)
}

/// As [`serve`], in the thread's namespace.
pub(super) fn answer_on(listener: TcpListener) -> SocketAddr {
    let address = listener.local_addr().unwrap();
    // It ends with the test's process.
    thread::spawn(move || {
        for caller in listener.incoming().flatten() {
            let (mut caller, seen) = (caller, caller_of());
            let seen = seen(&caller);
            let _ = caller.write_all(seen.as_bytes());
        }
    });
    address
}

fn caller_of() -> impl Fn(&TcpStream) -> String {
    |caller| caller.peer_addr().map(|address| address.ip().to_string()).unwrap_or_default()
}

/// Calls a server: the address that it sees.
pub(super) fn call(to: impl Into<SocketAddr>) -> io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&to.into(), NEVER)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut seen = String::new();
    stream.read_to_string(&mut seen)?;
    seen.parse().map_err(io::Error::other)
}

/// As [`call`], from a namespace.
pub(super) fn call_from(namespace: &Path, to: impl Into<SocketAddr>) -> io::Result<IpAddr> {
    let to = to.into();
    namespace::within(namespace, || call(to))
}
