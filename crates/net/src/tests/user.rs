//! Mode `user`, with the program passt as it is installed.

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::io::{FdFlags, fcntl_setfd};

use super::rig::{
    HOST, HOST_V6, OUTSIDE, OUTSIDE_V6, Sniffer, StreamGuest, World, answer_on, call_from, contains, fork, in_a_world,
    in_a_world_alone, serve,
};
use crate::{
    Policy, RunAs, UserAddresses, UserError, UserLink, UserProcess, namespace,
    netlink::{Socket, link},
    user::find_passt,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// A host with a way to the outside, which every test here needs besides the program.
fn with_passt(test: impl FnOnce(&World, &std::path::Path) + Send) {
    in_a_world(|world| {
        if find_passt().is_none() {
            return eprintln!("not run: {}", UserError::NoPasst);
        }
        let outside = world.outside();
        world.default_route_outside();
        test(world, &outside);
    });
}

fn link(number: u32) -> (UserLink, OwnedFd) {
    UserLink::new(UserAddresses::of(&fork(number))).unwrap()
}

fn open(world: &World, number: u32, policy: &Policy) -> (UserProcess, StreamGuest) {
    let (link, end) = link(number);
    let guest = StreamGuest::start(world, link.addresses(), end);
    (link.start(policy, RunAs::default()).unwrap(), guest)
}

fn forwards(texts: &[&str]) -> Policy {
    Policy { forwards: texts.iter().map(|text| text.parse().unwrap()).collect(), ..Policy::default() }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Answers every datagram with the address that it came from.
fn serve_datagrams(namespace: &std::path::Path, address: SocketAddr) {
    let socket = namespace::within(namespace, || UdpSocket::bind(address)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(from.ip().to_string().as_bytes(), from);
        }
    });
}

/// A server that waits for its caller to say something, and tells it the address that it is seen with.
fn serve_who_speaks(namespace: &std::path::Path, address: SocketAddr) {
    let listener = namespace::within(namespace, || TcpListener::bind(address)).unwrap();
    std::thread::spawn(move || {
        for mut caller in listener.incoming().flatten() {
            let seen = caller.peer_addr().unwrap().ip().to_string();
            let _ = caller.read(&mut [0; 1]).and_then(|_| caller.write_all(seen.as_bytes()));
        }
    });
}

fn speak(to: impl Into<SocketAddr>) -> io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?")?;
    let mut seen = String::new();
    stream.read_to_string(&mut seen)?;
    seen.parse().map_err(io::Error::other)
}

fn ask(to: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer)?;
    String::from_utf8_lossy(&answer[..length]).parse().map_err(io::Error::other)
}

#[test]
fn n3_user_nothing_leaves_before_the_start_and_everything_as_the_host_after_it() {
    with_passt(|world, outside| {
        let server = serve(outside, (OUTSIDE, 80));
        serve_datagrams(outside, (OUTSIDE, 53).into());
        let sniffer = Sniffer::new();
        let links: Vec<_> = [1, 2].map(link).into();
        let started: Vec<_> = links
            .into_iter()
            .map(|(link, end)| {
                let guest = StreamGuest::start(world, link.addresses(), end);
                assert!(call_from(&guest.namespace, server).is_err());
                (link, guest)
            })
            .collect();
        assert!(!sniffer.frames().iter().any(|frame| contains(frame, &OUTSIDE.octets())), "nothing is on the wire");
        for (link, guest) in started {
            let mac = link.addresses().mac;
            let process = link.start(&Policy::default(), RunAs::default()).unwrap();
            assert_eq!(call_from(&guest.namespace, server).unwrap(), HOST);
            assert_eq!(guest.within(|| ask((OUTSIDE, 53).into())).unwrap(), HOST);
            let frames = sniffer.frames();
            assert!(frames.iter().any(|frame| contains(frame, &OUTSIDE.octets())), "the sniffer sees");
            assert!(!frames.iter().any(|frame| contains(frame, &mac.octets())), "no guest's MAC is outside");
            assert!(process.is_alive());
        }
    });
}

#[test]
fn n3_user_what_the_fork_itself_sent_before_the_start_is_not_lost() {
    with_passt(|world, outside| {
        let server = namespace::within(outside, || UdpSocket::bind((OUTSIDE, 53))).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let (link, end) = link(1);
        let guest = StreamGuest::start(world, link.addresses(), end);
        guest.within(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"early", (OUTSIDE, 53))).unwrap();
        wait_until("the frame waits", || rustix::io::ioctl_fionread(&link).unwrap() > 46);
        let _process = link.start(&Policy::default(), RunAs::default()).unwrap();
        let mut buffer = [0; 64];
        let (length, _) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"early");
    });
}

#[test]
fn n1_user_forks_have_one_address_but_each_its_own_card() {
    with_passt(|_, _| {
        let (one, other) = (UserAddresses::of(&fork(1)), UserAddresses::of(&fork(2)));
        assert_eq!((one.v4, one.v6), (other.v4, other.v6));
        assert_ne!(one.mac, other.mac);
        assert_eq!(one.mac.octets()[0] & 3, 2, "locally administered, not multicast");
        assert_ne!(one.mac, one.gateway_mac);
    });
}

#[test]
fn n1_user_ports_of_the_host_lead_to_the_fork_from_outside_and_from_the_host() {
    with_passt(|world, outside| {
        let (process, guest) = open(world, 1, &forwards(&["8080:80", "8081:81", "5353:53/udp"]));
        let own = UserAddresses::of(&fork(1)).v4.unwrap().0;
        serve_who_speaks(&guest.namespace, (own, 80).into());
        serve_who_speaks(&guest.namespace, (own, 81).into());
        serve_datagrams(&guest.namespace, (own, 53).into());
        let (_, gateway) = UserAddresses::of(&fork(1)).v4.unwrap();
        let from_outside = |port: u16| namespace::within(outside, || speak((HOST, port)));
        assert_eq!(from_outside(8080).unwrap(), OUTSIDE, "callers are seen as themselves");
        assert_eq!(from_outside(8081).unwrap(), OUTSIDE);
        assert_eq!(speak((HOST, 8080)).unwrap(), HOST);
        assert_eq!(speak((Ipv4Addr::LOCALHOST, 8080)).unwrap(), gateway, "localhost works, as the gateway");
        assert_eq!(namespace::within(outside, || ask((HOST, 5353).into())).unwrap(), OUTSIDE);
        // TCP's ports are TCP's only.
        assert!(UdpSocket::bind((HOST, 8080)).is_ok());
        let error = UserLink::check(&forwards(&["9000:80", "8080:80"])).unwrap_err();
        assert!(matches!(error, UserError::PortTaken { port: 8080, .. }), "{error}");
        drop(guest);
        wait_until("passt ends with the machine", || !process.is_alive());
        assert!(UserLink::check(&forwards(&["8080:80"])).is_ok(), "its ports are free again");
    });
}

#[test]
fn o2_user_passt_ends_with_the_machine_and_is_no_child() {
    with_passt(|_, _| {
        let (link, end) = link(1);
        let process = link.start(&Policy::default(), RunAs::default()).unwrap();
        assert!(process.is_alive());
        let children = || fs::read_to_string("/proc/thread-self/children").unwrap();
        assert!(!children().split_whitespace().any(|child| child == process.pid.to_string()));
        drop(end);
        wait_until("passt ends", || !process.is_alive());
        let (link, end) = self::link(2);
        drop(end);
        let error = link.start(&Policy::default(), RunAs::default()).unwrap_err();
        assert!(matches!(error, UserError::MachineEnded), "{error}");
    });
}

#[test]
fn s2_user_passt_has_no_rights_no_files_and_nothing_of_the_callers() {
    in_a_world_alone("tests::user::s2_user_passt_has_no_rights_no_files_and_nothing_of_the_callers", |world| {
        if find_passt().is_none() {
            return;
        }
        world.outside();
        world.default_route_outside();
        let secret = fs::File::create(world.path("secret")).unwrap();
        fcntl_setfd(&secret, FdFlags::empty()).unwrap();
        let (link, _end) = link(1);
        let process = link.start(&Policy::default(), RunAs::default()).unwrap();
        let proc = std::path::PathBuf::from(format!("/proc/{}", process.pid));
        for entry in fs::read_dir(proc.join("fd")).unwrap() {
            let to = fs::read_link(entry.unwrap().path()).unwrap();
            let to = to.to_str().unwrap();
            let known = ["socket:", "anon_inode:", "pipe:", "/dev/null", "/memfd:"];
            assert!(known.iter().any(|known| to.starts_with(known)), "{to}");
            assert!(!to.starts_with("pipe:"), "the caller waits for no output");
        }
        assert_eq!(fs::read(proc.join("environ")).unwrap(), b"");
        assert_eq!(fs::read_dir(proc.join("root")).unwrap().count(), 0, "it sees no file");
        let status = || fs::read_to_string(proc.join("status")).unwrap();
        let line = |name: &str| {
            let status = status();
            status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
        };
        // It is ready a moment before it gives up the rest.
        wait_until("it filters its system calls", || line("Seccomp:") == "2");
        assert_eq!(line("Uid:").split_whitespace().next(), Some("65534"));
        assert_eq!(u64::from_str_radix(&line("CapEff:"), 16), Ok(0));
        assert_eq!(line("NoNewPrivs:"), "1");
        assert_eq!(line("Groups:"), "");
    });
}

#[test]
fn n1_user_what_it_can_not_enforce_is_refused() {
    let refused = |policy: Policy| matches!(UserLink::check(&policy), Err(UserError::NeedsTap { .. }));
    assert!(refused(Policy { egress: "deny".parse().unwrap(), ..Policy::default() }));
    assert!(refused(Policy { egress: "10.0.0.0/8".parse().unwrap(), ..Policy::default() }));
    assert!(refused(Policy { net: Some("web".parse().unwrap()), ..Policy::default() }));
    assert!(refused(Policy { rate: Some(crate::Rate::new(1 << 20).unwrap()), ..Policy::default() }));
    assert!(matches!(UserLink::check(&forwards(&["80:80", "80:81"])), Err(UserError::Policy(_))));
    assert!(UserLink::check(&Policy::default()).is_ok());
}

#[test]
fn n1_user_a_port_that_passt_may_not_take_is_named() {
    with_passt(|_, _| {
        let (link, _end) = link(1);
        let error = link.start(&forwards(&["80:80"]), RunAs::default()).unwrap_err();
        assert!(matches!(error, UserError::LowPort { port: 80, first: 1024 }), "{error}");
    });
}

#[test]
fn n1_user_works_on_a_host_without_a_way_outside() {
    in_a_world(|world| {
        if find_passt().is_none() {
            return;
        }
        let (_process, guest) = open(world, 1, &forwards(&["8080:80"]));
        let (own, gateway) = UserAddresses::of(&fork(1)).v4.unwrap();
        serve_who_speaks(&guest.namespace, (own, 80).into());
        assert_eq!(speak((Ipv4Addr::LOCALHOST, 8080)).unwrap(), gateway);
    });
}

#[test]
fn n1_user_ipv6_goes_out_and_comes_in_where_the_host_has_it() {
    with_passt(|world, outside| {
        if !world.outside_v6(outside) {
            return;
        }
        assert_eq!(UserAddresses::of(&fork(1)).v6, None, "the host has no way out");
        world.default_route_outside_v6();
        let server = serve(outside, (OUTSIDE_V6, 80));
        let (_process, guest) = open(world, 1, &forwards(&["8080:80"]));
        let (own, _) = UserAddresses::of(&fork(1)).v6.unwrap();
        assert_eq!(call_from(&guest.namespace, server).unwrap(), HOST_V6);
        assert_eq!(call_from(&guest.namespace, serve(outside, (OUTSIDE, 80))).unwrap(), HOST);
        serve_who_speaks(&guest.namespace, (own, 80).into());
        assert_eq!(namespace::within(outside, || speak((HOST_V6, 8080))).unwrap(), OUTSIDE_V6);
    });
}

/// Whether a connection from the guest arrives; that the answer comes back is not needed.
fn arrives(guest: &StreamGuest, listener: &TcpListener, to: SocketAddr) -> bool {
    listener.set_nonblocking(true).unwrap();
    let _ = guest.within(|| TcpStream::connect_timeout(&to, Duration::from_millis(500)));
    listener.accept().is_ok()
}

/// What the module's documentation says of it.
#[test]
fn n1_user_reaches_what_a_program_of_the_host_reaches() {
    with_passt(|world, outside| {
        let metadata: Ipv4Addr = [169, 254, 169, 254].into();
        namespace::within(outside, || {
            let mut socket = Socket::route()?;
            let server = socket.index_of("server")?;
            socket.carry_out(vec![link::add_address(server, metadata.into())])
        })
        .unwrap();
        let (_process, guest) = open(world, 1, &Policy::default());
        let (_, gateway) = UserAddresses::of(&fork(1)).v4.unwrap();
        let at_host = answer_on(TcpListener::bind((HOST, 81)).unwrap());
        let at_loopback = TcpListener::bind((Ipv4Addr::LOCALHOST, 82)).unwrap();
        let metadata_server = serve(outside, (metadata, 80));
        assert_eq!(call_from(&guest.namespace, at_host).unwrap(), HOST);
        assert_eq!(call_from(&guest.namespace, metadata_server).unwrap(), HOST);
        assert!(!arrives(&guest, &at_loopback, (gateway, 82).into()), "the gateway is not the host's loopback");
        // Older versions let it through, newer ones do not.
        let loopback = arrives(&guest, &at_loopback, (Ipv4Addr::LOCALHOST, 82).into());
        assert_eq!(crate::user::reaches_loopback().unwrap(), loopback, "what doctor says is so");
        assert_eq!(crate::risks(crate::Mode::User).len(), if loopback { 2 } else { 1 });
    });
}
