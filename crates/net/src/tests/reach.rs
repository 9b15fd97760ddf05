//! Who reaches whom.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use super::rig::{
    HOST, HOST_V6, OTHER, OTHER_V6, OUTSIDE, OUTSIDE_V6, TAP, answer_on, call, call_from, fork, in_a_world, serve,
};
use crate::{
    Egress, Forward, LinkError, Mode, Policy, Rate,
    nft::{Hook, Rule, SetForm, Transaction, Verdict},
    rules::MAX_CONNECTIONS,
};

fn net(name: &str) -> Policy {
    Policy { net: Some(name.parse().unwrap()), ..Policy::default() }
}

fn egress(text: &str) -> Policy {
    Policy { egress: text.parse().unwrap(), ..Policy::default() }
}

fn forwards(texts: &[&str]) -> Policy {
    Policy { forwards: texts.iter().map(|text| text.parse::<Forward>().unwrap()).collect(), ..Policy::default() }
}

#[test]
fn n1_forks_reach_the_outside_but_not_each_other_nor_the_host() {
    in_a_world(|world| {
        let server = serve(&world.outside(), (OUTSIDE, 80));
        let network = world.network();
        let (_one, first) = world.open(&network, 1, Policy::default());
        let (_two, second) = world.open(&network, 2, Policy::default());
        let at_second = serve(&second.namespace, (second.v4(), 80));
        let at_host = answer_on(TcpListener::bind((HOST, 81)).unwrap());
        assert_eq!(call(at_host).unwrap(), HOST, "the host's server answers");
        assert!(call_from(&first.namespace, server).is_ok());
        assert!(call_from(&first.namespace, at_second).is_err());
        assert!(call_from(&first.namespace, at_host).is_err());
        // The host itself reaches a fork: that is how requests are routed to it.
        assert_eq!(call(at_second).unwrap(), HOST);
    });
}

#[test]
fn n1_forks_of_one_net_reach_each_other_and_no_other() {
    in_a_world(|world| {
        let network = world.network();
        let (_a, first) = world.open(&network, 1, net("web"));
        let (b, second) = world.open(&network, 2, Policy { egress: Egress::Deny, ..net("web") });
        let (_c, third) = world.open(&network, 3, net("other"));
        let (_d, fourth) = world.open(&network, 4, Policy::default());
        let at_first = serve(&first.namespace, (first.v4(), 80));
        let at_second = serve(&second.namespace, (second.v4(), 80));
        assert_eq!(call_from(&first.namespace, at_second).unwrap(), first.v4(), "it is seen as itself");
        assert_eq!(call_from(&second.namespace, at_first).unwrap(), second.v4(), "also with egress denied");
        for stranger in [&third, &fourth] {
            assert!(call_from(&stranger.namespace, at_first).is_err());
        }
        // A net ends with its last fork, and its number can be another's.
        let shut = b.shut().unwrap();
        assert!(call_from(&first.namespace, at_second).is_err());
        let _again = shut.open(net("web")).unwrap();
        assert!(call_from(&first.namespace, at_second).is_ok());
    });
}

#[test]
fn n1_forks_of_one_net_reach_each_other_over_ipv6() {
    in_a_world(|world| {
        let network = world.network().forwarding_v6();
        let (_a, first) = world.open(&network, 1, net("web"));
        let (_b, second) = world.open(&network, 2, net("web"));
        let (_c, third) = world.open(&network, 3, Policy::default());
        let Some(v6) = second.record.addresses.v6 else { return eprintln!("not run: this host has no IPv6") };
        let at_second = serve(&second.namespace, (v6, 80));
        assert_eq!(Some(call_from(&first.namespace, at_second).unwrap()), first.record.addresses.v6.map(Into::into));
        assert!(call_from(&third.namespace, at_second).is_err());
    });
}

#[test]
fn n1_forks_reach_the_outside_over_ipv6_as_the_host_and_by_their_egress() {
    in_a_world(|world| {
        let outside = world.outside();
        if !world.outside_v6(&outside) {
            return;
        }
        let (server, other) = (serve(&outside, (OUTSIDE_V6, 80)), serve(&outside, (OTHER_V6, 80)));
        let network = world.network().forwarding_v6();
        let (_a, free) = world.open(&network, 1, Policy::default());
        let (_b, denied) = world.open(&network, 2, egress("deny"));
        let (_c, listed) = world.open(&network, 3, egress("2001:db8:2::/48,203.0.113.0/24"));
        let (_d, only_v4) = world.open(&network, 4, egress("0.0.0.0/0"));
        assert_eq!(call_from(&free.namespace, server).unwrap(), HOST_V6);
        assert!(call_from(&free.namespace, other).is_ok());
        let started = Instant::now();
        assert!(call_from(&denied.namespace, server).is_err());
        assert!(started.elapsed() < Duration::from_millis(300), "it is told at once");
        assert!(call_from(&listed.namespace, other).is_ok());
        assert!(call_from(&listed.namespace, server).is_err());
        assert!(call_from(&only_v4.namespace, server).is_err());
        // The host itself, and other forks.
        let at_host = answer_on(TcpListener::bind((HOST_V6, 81)).unwrap());
        assert_eq!(call(at_host).unwrap(), HOST_V6);
        assert!(call_from(&free.namespace, at_host).is_err());
        let at_free = serve(&free.namespace, (free.record.addresses.v6.unwrap(), 80));
        assert!(call(at_free).is_ok(), "the host reaches it");
        assert!(call_from(&listed.namespace, at_free).is_err());
    });
}

#[test]
fn n1_a_port_of_the_host_leads_to_the_fork_over_ipv6() {
    in_a_world(|world| {
        let outside = world.outside();
        if !world.outside_v6(&outside) {
            return;
        }
        let network = world.network().forwarding_v6();
        let (link, guest) = world.open(&network, 1, forwards(&["8080:80", "5353:53/udp"]));
        let v6 = guest.record.addresses.v6.unwrap();
        serve(&guest.namespace, (v6, 80));
        let datagrams = guest.within(|| UdpSocket::bind((v6, 53))).unwrap();
        assert_eq!(call_from(&outside, (HOST_V6, 8080)).unwrap(), OUTSIDE_V6, "callers are seen as themselves");
        assert_eq!(call((HOST_V6, 8080)).unwrap(), HOST_V6, "from the host too");
        crate::namespace::within(&outside, || UdpSocket::bind((OUTSIDE_V6, 0))?.send_to(b"?", (HOST_V6, 5353)))
            .unwrap();
        datagrams.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(datagrams.recv_from(&mut [0; 8]).unwrap().1.ip(), OUTSIDE_V6);
        // The address itself is nobody's but the host's to reach.
        world.route_from(&outside, v6);
        assert!(call_from(&outside, (v6, 80)).is_err());
        drop(link);
        assert!(call_from(&outside, (HOST_V6, 8080)).is_err(), "it ends with the link");
    });
}

#[test]
fn n1_egress_is_nothing_or_a_list() {
    in_a_world(|world| {
        let outside = world.outside();
        let (server, other) = (serve(&outside, (OUTSIDE, 80)), serve(&outside, (OTHER, 80)));
        let network = world.network();
        let (_a, denied) = world.open(&network, 1, egress("deny"));
        let (_b, listed) = world.open(&network, 2, egress("203.0.113.0/24,2001:db8::/32"));
        // The host's own address can not be allowed.
        let (_c, sly) = world.open(&network, 3, egress("198.51.100.0/31"));
        let at_host = answer_on(TcpListener::bind((HOST, 81)).unwrap());
        let started = Instant::now();
        assert_eq!(call_from(&denied.namespace, server).unwrap_err().kind(), io::ErrorKind::HostUnreachable);
        assert!(started.elapsed() < Duration::from_millis(300), "it is told at once");
        assert!(call_from(&listed.namespace, server).is_err());
        assert!(call_from(&listed.namespace, other).is_ok());
        assert!(call_from(&sly.namespace, at_host).is_err());
    });
}

/// As a container's published port: whoever calls the host's port is led on to somebody behind it.
fn publish(port: u16, to: SocketAddr) {
    const TABLE: &str = "containers";
    let IpAddr::V4(address) = to.ip() else { panic!("IPv4") };
    let mut table = Transaction::default();
    table.table(TABLE);
    let form = SetForm { key_size: 2, data_size: Some(8), key_type: 0, data_type: 0 };
    table.set(TABLE, "published", 1, form);
    let value = [&address.octets()[..], &to.port().to_be_bytes(), &[0, 0]].concat();
    table.element(TABLE, "published", &port.to_be_bytes(), Some(&value));
    table.chain(TABLE, "prerouting", "nat", Hook::Prerouting, -100, Verdict::Accept);
    let rule = Rule::default().family(false).transport(6).destined_here().forward_by("published", false);
    table.rule(TABLE, "prerouting", rule);
    table.commit().unwrap();
}

#[test]
fn n1_a_port_of_the_host_that_others_lead_on_is_out_of_a_forks_reach_too() {
    in_a_world(|world| {
        let outside = world.outside();
        let network = world.network();
        let (_one, guest) = world.open(&network, 1, forwards(&["8080:80"]));
        serve(&guest.namespace, (guest.v4(), 80));
        publish(8088, serve(&outside, (OUTSIDE, 80)));
        let refused = call_from(&guest.namespace, (HOST, 8088)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::HostUnreachable, "it is told");
        assert!(call_from(&guest.namespace, (OUTSIDE, 80)).is_ok(), "the outside it reaches under its own name");
        // What it answers to the host and to who came by its port passes.
        assert_eq!(call((guest.v4(), 80)).unwrap(), HOST);
        assert_eq!(call_from(&outside, (HOST, 8080)).unwrap(), OUTSIDE);
        // The check can fail: it is offshoot's rules that keep it from there.
        crate::host_table::remove().unwrap();
        world.route_from(&outside, guest.v4());
        assert!(call_from(&guest.namespace, (HOST, 8088)).is_ok());
    });
}

#[test]
fn n1_a_fork_of_no_net_is_out_of_other_forks_reach_also_without_the_hosts_rules() {
    in_a_world(|world| {
        world.outside();
        let network = world.network();
        let (_a, first) = world.open(&network, 1, net("web"));
        let (_b, second) = world.open(&network, 2, net("web"));
        let (_c, alone) = world.open(&network, 3, Policy::default());
        let at_second = serve(&second.namespace, (second.v4(), 80));
        let at_alone = serve(&alone.namespace, (alone.v4(), 80));
        crate::host_table::remove().unwrap();
        assert!(call_from(&first.namespace, at_alone).is_err());
        assert_eq!(call_from(&first.namespace, at_second).unwrap(), first.v4(), "the check can fail");
        assert!(network.restore_rules().unwrap());
        assert!(call(at_alone).is_ok());
    });
}

#[test]
fn n1_a_firewall_of_the_host_that_drops_what_is_forwarded_is_a_risk_with_a_name() {
    in_a_world(|world| {
        let outside = world.outside();
        let server = serve(&outside, (OUTSIDE, 80));
        let (_link, guest) = world.open(&world.network(), 1, Policy::default());
        assert!(call_from(&guest.namespace, server).is_ok());
        assert_eq!(crate::risks(Mode::Tap), []);
        let mut table = Transaction::default();
        table.table("firewall");
        table.chain("firewall", "input", "filter", Hook::Input, 0, Verdict::Drop);
        table.chain("firewall", "FORWARD", "filter", Hook::Forward, 0, Verdict::Drop);
        table.commit().unwrap();
        assert!(call_from(&guest.namespace, server).is_err());
        let risks = crate::risks(Mode::Tap);
        let [risk] = &risks[..] else { panic!("{risks:?}") };
        assert!(risk.what.contains("FORWARD (nft table inet firewall)"), "{risk}");
        assert!(risk.help.contains("insert rule inet firewall FORWARD iifname \"ofs*\" accept"), "{risk}");
    });
}

#[test]
fn n1_metadata_services_are_out_of_reach_whatever_egress_says() {
    in_a_world(|world| {
        let network = world.network();
        let outside = world.outside();
        let metadata = Ipv4Addr::new(169, 254, 169, 254);
        let (link, guest) = world.open(&network, 1, egress("0.0.0.0/0"));
        let before = world.packets_out_of(link.record());
        assert!(call_from(&guest.namespace, (metadata, 80)).is_err());
        assert_eq!(world.packets_out_of(link.record()), before);
        assert!(call_from(&guest.namespace, serve(&outside, (OUTSIDE, 80))).is_ok());
    });
}

#[test]
fn n1_a_port_of_the_host_leads_to_the_fork_also_without_egress() {
    in_a_world(|world| {
        let outside = world.outside();
        let network = world.network();
        let policy = Policy { egress: Egress::Deny, ..forwards(&["8080:80"]) };
        let (link, guest) = world.open(&network, 1, policy);
        serve(&guest.namespace, (guest.v4(), 80));
        assert_eq!(call_from(&outside, (HOST, 8080)).unwrap(), OUTSIDE, "callers are seen as themselves");
        assert_eq!(call((HOST, 8080)).unwrap(), HOST, "from the host too");
        drop(link);
        assert!(call_from(&outside, (HOST, 8080)).is_err(), "it ends with the link");
    });
}

#[test]
fn n1_a_port_of_the_hosts_localhost_leads_to_the_fork() {
    in_a_world(|world| {
        let outside = world.outside();
        let network = world.network();
        let (link, guest) = world.open(&network, 1, forwards(&["8080:80", "5353:53/udp"]));
        serve(&guest.namespace, (guest.v4(), 80));
        let datagrams = guest.within(|| UdpSocket::bind((guest.v4(), 53))).unwrap();
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), HOST);
        let asking = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        asking.connect((Ipv4Addr::LOCALHOST, 5353)).unwrap();
        asking.send(b"?").unwrap();
        let mut buffer = [0; 8];
        let (_, from) = datagrams.recv_from(&mut buffer).unwrap();
        datagrams.send_to(b"!", from).unwrap();
        asking.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(asking.recv(&mut buffer).unwrap(), 1);
        // There is nothing at ::1, which is said at once, so that callers of "localhost" go on to 127.0.0.1.
        assert_eq!(call((Ipv6Addr::LOCALHOST, 8080)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        // What is not forwarded there is not changed.
        let own = answer_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 81)).unwrap());
        assert_eq!(call(own).unwrap(), Ipv4Addr::LOCALHOST);
        let other = answer_on(TcpListener::bind((Ipv4Addr::new(127, 0, 0, 53), 8080)).unwrap());
        assert_eq!(call(other).unwrap(), Ipv4Addr::LOCALHOST);
        assert!(call_from(&outside, (HOST, 8080)).is_ok());
        let wire = link.record().wire();
        let setting = || crate::namespace::setting(&format!("ipv4/conf/{wire}/route_localnet")).unwrap();
        assert_eq!(setting(), "1");
        let closed = link.shut().unwrap();
        assert_eq!(setting(), "0");
        assert!(call((Ipv4Addr::LOCALHOST, 8080)).is_err());
        drop(closed);
    });
}

/// A fork whose wire may carry 127.0.0.1 does not reach the host's, also without the host's own table.
#[test]
fn n1_a_fork_does_not_reach_the_hosts_localhost_by_its_forwarded_port() {
    in_a_world(|world| {
        let network = world.network();
        let (link, guest) = world.open(&network, 1, forwards(&["8080:80"]));
        // The host's loopback has a server on every address.
        let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 82)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 82)).unwrap();
        udp.set_nonblocking(true).unwrap();
        guest.gives_up_its_loopback();
        for table in [true, false] {
            if !table {
                crate::host_table::remove().unwrap();
            }
            for to in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 9, 9, 9)] {
                let before = world.packets_out_of(link.record());
                assert!(call_from(&guest.namespace, (to, 82)).is_err());
                guest.send(guest.v4(), (to, 82), b"x").unwrap();
                std::thread::sleep(Duration::from_millis(100));
                assert_eq!(world.packets_out_of(link.record()), before, "it does not even leave the namespace");
            }
            assert!(tcp.accept().is_err() && udp.recv(&mut [0; 8]).is_err());
        }
        // The check can fail: without the table another address of the host's is reached.
        world.outside();
        guest.send(guest.v4(), (HOST, 82), b"x").unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while udp.recv(&mut [0; 8]).is_err() {
            assert!(Instant::now() < deadline);
        }
    });
}

#[test]
fn n1_a_neighbour_of_the_host_reaches_no_fork_but_by_a_forwarded_port() {
    in_a_world(|world| {
        let outside = world.outside();
        let (_link, guest) = world.open(&world.network(), 1, forwards(&["8080:80"]));
        serve(&guest.namespace, (guest.v4(), 80));
        world.route_from(&outside, guest.v4());
        assert!(call_from(&outside, (guest.v4(), 80)).is_err());
        assert!(call_from(&outside, (HOST, 8080)).is_ok());
        // It is the host's rules that keep it out.
        crate::host_table::remove().unwrap();
        assert!(call_from(&outside, (guest.v4(), 80)).is_ok());
    });
}

#[test]
fn n1_a_port_of_the_host_is_taken_once() {
    in_a_world(|world| {
        let network = world.network();
        let (link, _guest) = world.open(&network, 1, forwards(&["8080:80", "8080:53/udp"]));
        let second = network.prepare(&fork(2), TAP).unwrap();
        let error = second.open(forwards(&["8081:80", "8080:80"])).unwrap_err();
        assert!(
            matches!(&error, LinkError::PortTaken { port: 8080, by, .. } if by.contains(fork(1).as_str())),
            "{error}"
        );
        let _program = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8082)).unwrap();
        let error = network.prepare(&fork(2), TAP).unwrap().open(forwards(&["8082:80"])).unwrap_err();
        assert!(matches!(&error, LinkError::PortTaken { port: 8082, .. }), "{error}");
        // What the refused fork had taken is free again.
        drop(link);
        let third = network.prepare(&fork(3), TAP).unwrap();
        drop(third.open(forwards(&["8080:80", "8081:80"])).unwrap());
    });
}

#[test]
fn n1_the_hosts_rules_come_back_with_all_ports_and_nets_after_a_flush() {
    in_a_world(|world| {
        let outside = world.outside();
        let network = world.network();
        let (_a, first) =
            world.open(&network, 1, Policy { net: Some("web".parse().unwrap()), ..forwards(&["8080:80"]) });
        serve(&first.namespace, (first.v4(), 80));
        crate::host_table::remove().unwrap();
        assert!(call_from(&outside, (HOST, 8080)).is_err());
        let (_b, second) = world.open(&network, 2, net("web"));
        assert!(call_from(&outside, (HOST, 8080)).is_ok());
        assert!(call_from(&second.namespace, (first.v4(), 80)).is_ok());
    });
}

#[test]
fn f9_a_fork_can_not_fill_the_hosts_table_of_connections() {
    in_a_world(|world| {
        let outside = world.outside();
        let (_link, guest) = world.open(&world.network(), 1, Policy::default());
        let (server, again) = (serve(&outside, (OUTSIDE, 80)), serve(&outside, (OUTSIDE, 81)));
        assert!(call_from(&guest.namespace, server).is_ok());
        let flood = MAX_CONNECTIONS + 1000;
        guest
            .within(|| {
                for port in (10_000..).take(flood as usize) {
                    // What the card can not take at once is lost; what is refused comes back as an error of a later one.
                    let _ = UdpSocket::bind((guest.v4(), 0))?.send_to(b"x", (OTHER, port));
                    if port % 64 == 0 {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
                Ok(())
            })
            .unwrap();
        let count = crate::namespace::setting("netfilter/nf_conntrack_count").unwrap().parse::<u32>().unwrap();
        assert!(count > MAX_CONNECTIONS / 2 && count <= MAX_CONNECTIONS + 16, "{count}");
        assert!(call_from(&guest.namespace, again).is_err(), "there is no room for its own");
        let (_other, second) = world.open(&world.network(), 2, Policy::default());
        assert!(call_from(&second.namespace, again).is_ok(), "another fork has its own");
    });
}

#[test]
fn f9_a_rate_holds_in_both_directions() {
    in_a_world(|world| {
        let outside = world.outside();
        let network = world.network();
        let slow = Policy { rate: Some(Rate::new(200_000).unwrap()), ..Policy::default() };
        let (_a, limited) = world.open(&network, 1, slow);
        let (_b, free) = world.open(&network, 2, Policy::default());
        let bytes = 400_000;
        let listener = crate::namespace::within(&outside, || TcpListener::bind((OUTSIDE, 80))).unwrap();
        let to: SocketAddr = (OUTSIDE, 80).into();
        let took = |guest: &super::rig::Guest, upload: bool| {
            let listener = listener.try_clone().unwrap();
            let server = std::thread::spawn(move || pass(listener.accept().unwrap().0, !upload, bytes));
            let started = Instant::now();
            guest.within(|| pass(TcpStream::connect(to)?, upload, bytes)).unwrap();
            server.join().unwrap().unwrap();
            started.elapsed()
        };
        for upload in [true, false] {
            // The bucket's 66 kB pass at once: 334 kB at 200 kB/s.
            let limited = took(&limited, upload);
            assert!(limited > Duration::from_millis(1300) && limited < Duration::from_secs(8), "{limited:?}");
            assert!(took(&free, upload) < limited / 2);
        }
    });
}

fn pass(mut stream: TcpStream, send: bool, bytes: usize) -> io::Result<()> {
    use std::io::{Read, Write};
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    if send {
        stream.write_all(&vec![7; bytes])?;
        stream.shutdown(std::net::Shutdown::Write)?;
    }
    // The side that sends waits for the other to have all.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    if send { Ok(()) } else { stream.shutdown(std::net::Shutdown::Write) }
}
