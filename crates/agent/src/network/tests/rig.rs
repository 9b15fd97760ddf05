//! What stands for a switch with a gateway, and for machines behind it: network namespaces.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use identity::{Inet, MacAddress, Network as Section};
use rustix::{
    fs::{Mode, OFlags},
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socket_with},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::network::{
    Network,
    card::{Assigned, addresses},
    netlink::{Batch, PUT, Socket},
};

pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub(super) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// The template's.
pub(super) const TEMPLATE: u8 = 99;

const NEW_LINK: u16 = 16;
const SET_LINK: u16 = 19;
const NEW_ADDRESS: u16 = 20;
const GET_NEIGHBOUR: u16 = 30;
const CREATE: u16 = 0x400;

/// Longer than anything takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace. It is gone with its last user.
#[derive(Debug)]
pub(super) struct Space(OwnedFd);

impl Space {
    fn new() -> Self {
        let make = || {
            // SAFETY: the table of file descriptors stays shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            let path = "/proc/thread-self/ns/net";
            let space = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
            up("lo");
            Self(space)
        };
        thread::scope(|scope| scope.spawn(make).join().unwrap())
    }

    /// Does something in it, in a thread of its own.
    pub(super) fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let act = || {
            use std::os::fd::AsFd as _;
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            act()
        };
        thread::scope(|scope| scope.spawn(act).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

/// A switch with a gateway's addresses.
#[derive(Debug)]
pub(super) struct Switch {
    pub(super) space: Space,
    machines: std::cell::Cell<u32>,
}

/// A machine: its namespace, and the agent's network in it. Its card is `eth0`, down.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) space: Space,
    pub(super) network: Network,
}

/// Whether the test can be run; says why not.
pub(super) fn may_run() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("not run: it needs root, to make network namespaces");
    }
    root
}

fn link(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// One attribute.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(value.len() + 4).unwrap().to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn ask(kind: u16, flags: u16, header: &[u8], attributes: &[(u16, &[u8])]) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.request(kind, flags, header, "test");
    attributes.iter().for_each(|(kind, value)| batch.attribute(*kind, value));
    Socket::route()?.carry_out(batch).map_err(|error| error.source)
}

fn up(name: &str) {
    let mut header = [0; 16];
    header[8] = 1;
    header[12] = 1;
    ask(SET_LINK, 0, &header, &[(3, &link(name))]).unwrap();
}

/// Gives a card an address; with `flags` 0 the kernel looks for duplicates.
pub(super) fn add_address(name: &str, address: IpAddr, prefix: u8, flags: u8) {
    let index = Socket::route().unwrap().index_of(name).unwrap();
    let (family, bytes) = match address {
        IpAddr::V4(address) => (2, address.octets().to_vec()),
        IpAddr::V6(address) => (10, address.octets().to_vec()),
    };
    let mut header = [family, prefix, flags, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    ask(NEW_ADDRESS, PUT, &header, &[(2, &bytes), (1, &bytes)]).unwrap();
}

impl Switch {
    pub(super) fn new() -> Self {
        let space = Space::new();
        space.run(|| {
            let info = attribute(1, b"bridge\0");
            ask(NEW_LINK, CREATE, &[0; 16], &[(3, &link("br0")), (18, &info)]).unwrap();
            fs::write("/proc/sys/net/ipv6/conf/br0/accept_dad", "0").unwrap();
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            up("br0");
            add_address("br0", GATEWAY.into(), 24, 0);
            add_address("br0", GATEWAY6.into(), 64, 2);
        });
        Self { space, machines: std::cell::Cell::new(0) }
    }

    /// A machine on this switch.
    pub(super) fn machine(&self) -> Machine {
        let number = self.machines.replace(self.machines.get() + 1);
        let space = Space::new();
        let port = format!("port{number}");
        self.space.run(|| {
            let mut peer = vec![0; 16];
            peer.extend(attribute(3, &link("eth0")));
            peer.extend(attribute(28, &space.0.as_raw_fd().to_ne_bytes()));
            let mut info = attribute(1, b"veth\0");
            info.extend(attribute(2, &attribute(1, &peer)));
            let bridge = Socket::route().unwrap().index_of("br0").unwrap();
            ask(NEW_LINK, CREATE, &[0; 16], &[(3, &link(&port)), (18, &info)]).unwrap();
            fs::write(format!("/proc/sys/net/ipv6/conf/{port}/disable_ipv6"), "1").unwrap();
            ask(SET_LINK, 0, &[0; 16], &[(3, &link(&port)), (10, &bridge.to_ne_bytes())]).unwrap();
            up(&port);
        });
        let network = space.run(|| {
            let network = Network::open().unwrap();
            network.use_card("eth0").unwrap();
            network.quiesce(true).unwrap();
            network
        });
        Machine { space, network }
    }
}

/// The section of fork `number`.
pub(super) fn section(number: u8) -> Section {
    Section {
        mac: MacAddress::new([2, 0x6f, 10, 77, 0, number]).unwrap(),
        mtu: 1400,
        ipv4: Some(Inet { address: Ipv4Addr::new(10, 77, 0, number), prefix: 24, gateway: Some(GATEWAY) }),
        ipv6: Some(Inet { address: v6(number), prefix: 64, gateway: Some(GATEWAY6) }),
        gateway_mac: None,
        dns: vec![GATEWAY.into()],
        search: vec!["forks.test".to_owned()],
        ack: Some((GATEWAY, 28518).into()),
    }
}

pub(super) fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

pub(super) fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into())
}

impl Machine {
    /// Becomes fork `number`.
    pub(super) fn becomes(&self, number: u8) {
        self.space.run(|| self.network.take_on(Some(&section(number))).unwrap());
    }

    /// The addresses of its card.
    pub(super) fn addresses(&self) -> Vec<Assigned> {
        self.space.run(|| {
            let mut socket = Socket::route().unwrap();
            let card = socket.index_of("eth0").unwrap();
            let mut found = addresses(&mut socket).unwrap();
            found.retain(|assigned| assigned.index == card);
            found
        })
    }

    /// What the kernel says of the card.
    pub(super) fn shows(&self, what: &str) -> String {
        let path = format!("eth0/{what}");
        self.space.run(|| {
            let mounted = sysfs();
            fs::read_to_string(mounted.join(path)).unwrap().trim_end().to_owned()
        })
    }

    /// How many neighbours its card has.
    pub(super) fn neighbours(&self) -> usize {
        self.space.run(|| {
            let mut socket = Socket::route().unwrap();
            let card = socket.index_of("eth0").unwrap();
            let mut count = 0;
            socket
                .list(GET_NEIGHBOUR, &[0; 12], |message| {
                    count += usize::from(message[4..8] == card.to_ne_bytes());
                })
                .unwrap();
            count
        })
    }

    /// Its routes of the IPv4 main table, and all for IPv6, that go out of the card.
    pub(super) fn routes(&self) -> (usize, usize) {
        self.space.run(|| {
            let lines = |path: &str, at: &dyn Fn(&str) -> bool| {
                fs::read_to_string(path).unwrap_or_default().lines().filter(|line| at(line)).count()
            };
            (
                lines("/proc/thread-self/net/route", &|line| line.starts_with("eth0")),
                lines("/proc/thread-self/net/ipv6_route", &|line| line.ends_with("eth0")),
            )
        })
    }
}

/// The cards of this thread's namespace: `/sys` shows those of whoever mounted it.
fn sysfs() -> std::path::PathBuf {
    let dir = std::path::Path::new("/sys");
    // SAFETY: the table of file descriptors stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    // Over the one that is there, for this thread only, with which it goes.
    rustix::mount::mount("sysfs", dir, "sysfs", rustix::mount::MountFlags::empty(), c"").unwrap();
    dir.join("class/net")
}

/// Answers every connection with who it is from, until it is dropped.
pub(super) fn serve(space: &Space, at: SocketAddr) -> TcpListener {
    let listener = space.run(|| TcpListener::bind(at).unwrap());
    let accepting = listener.try_clone().unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, from)) = accepting.accept() {
            let mut bytes = [0; 1];
            // Answers each byte, until the other side has enough.
            thread::spawn(move || {
                while stream.read_exact(&mut bytes).is_ok()
                    && stream.write_all(from.ip().to_string().as_bytes()).is_ok()
                {}
            });
        }
    });
    listener
}

pub(super) fn connect(space: &Space, to: SocketAddr) -> io::Result<TcpStream> {
    space.run(|| {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// Sends a byte and answers with what comes back: who the other side takes this one for.
pub(super) fn ask_back(stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(b"?")?;
    let mut bytes = [0; 64];
    let len = stream.read(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

/// Sees every frame on the switch.
#[derive(Debug)]
pub(super) struct Sniffer(OwnedFd);

impl Sniffer {
    pub(super) fn new(switch: &Switch) -> Self {
        let every = rustix::net::Protocol::from_raw(u32::from(3_u16.to_be()).try_into().unwrap());
        Self(switch.space.run(|| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(every)).unwrap()
        }))
    }

    /// What was seen since.
    pub(super) fn frames(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 2048];
        while let Ok((len, _)) = recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
            frames.push(buffer[..len].to_vec());
        }
        frames
    }
}

pub(super) fn contains(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

/// Waits until something is so.
pub(super) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}
