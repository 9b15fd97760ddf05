//! What leaves a fork before its link is open, and as whom.

use std::time::{Duration, Instant};

use identity::MacAddress;

use super::rig::{Guest, HOST, OUTSIDE, Sniffer, TAP, UPLINK, call_from, contains, fork, in_a_world, serve};
use crate::{ACK_PORT, MAX_AT_ONCE, MAX_DATAGRAM, Policy};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn never() -> Instant {
    Instant::now() + Duration::from_millis(300)
}

#[test]
fn n3_nothing_leaves_a_closed_link_and_everything_an_open_one_as_the_host() {
    in_a_world(|world| {
        let outside = world.outside();
        let server = serve(&outside, (OUTSIDE, 80));
        let network = world.network();
        let sniffer = Sniffer::new();
        let mut links = Vec::new();
        for number in 0..8 {
            let link = network.prepare(&fork(number), TAP).unwrap();
            let guest = Guest::start(world, &link);
            links.push((link, guest));
        }
        for (link, guest) in &links {
            assert!(call_from(&guest.namespace, server).is_err());
            assert_eq!(world.packets_out_of(link.record()), 0, "the link is closed");
        }
        // Between the host and the outside the kernel says a few things of its own.
        let mut frames = sniffer.frames();
        frames.retain(|frame| frame[6..12] != UPLINK.octets());
        assert_eq!(frames, Vec::<Vec<u8>>::new(), "the host has seen nothing of any fork");

        for (link, guest) in links {
            let link = link.open(Policy::default()).unwrap();
            assert_eq!(call_from(&guest.namespace, server).unwrap(), HOST);
            assert!(world.packets_out_of(link.record()) > 0, "the counter counts");
            let frames = sniffer.frames();
            assert!(frames.iter().any(|frame| contains(frame, &guest.v4().octets())), "the sniffer sees");
            assert!(
                !frames.iter().any(|frame| contains(frame, &link.record().addresses.mac.octets())),
                "no guest's MAC is outside"
            );
        }
    });
}

#[test]
fn n3_a_link_that_is_shut_lets_nothing_more_out() {
    in_a_world(|world| {
        let server = serve(&world.outside(), (OUTSIDE, 80));
        let (link, guest) = world.open(&world.network(), 1, Policy::default());
        assert!(call_from(&guest.namespace, server).is_ok());
        let link = link.shut().unwrap();
        let before = world.packets_out_of(link.record());
        assert!(call_from(&guest.namespace, server).is_err());
        assert_eq!(world.packets_out_of(link.record()), before);
        let link = link.open(Policy::default()).unwrap();
        assert!(call_from(&guest.namespace, server).is_ok());
        drop(link);
    });
}

#[test]
fn n2_an_acknowledgement_passes_a_closed_link_and_is_confirmed() {
    in_a_world(|world| {
        let network = world.network();
        // Two forks have the same gateway and port, and do not hear each other.
        let (one, other) = (network.prepare(&fork(1), TAP).unwrap(), network.prepare(&fork(2), TAP).unwrap());
        let (first, second) = (one.ack_socket().unwrap(), other.ack_socket().unwrap());
        let guest = Guest::start(world, &one);
        let gateway = one.record().addresses.gateway_v4;
        let sent = guest.send(guest.v4(), (gateway, ACK_PORT), b"stage=applied").unwrap();
        let ack = first.receive(soon()).unwrap().unwrap();
        assert_eq!(ack.bytes, b"stage=applied");
        first.confirm(&ack, b"confirmed").unwrap();
        let mut answer = [0; 64];
        let (length, from) = sent.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from.ip()), (&b"confirmed"[..], gateway.into()));
        assert_eq!(second.receive(never()).unwrap(), None);
    });
}

#[test]
fn n2_a_flood_of_acknowledgements_is_taken_a_part_at_a_time() {
    in_a_world(|world| {
        let link = world.network().prepare(&fork(1), TAP).unwrap();
        let acks = link.ack_socket().unwrap();
        let guest = Guest::start(world, &link);
        let gateway = link.record().addresses.gateway_v4;
        let sent = guest.send(guest.v4(), (gateway, ACK_PORT), b"flood").unwrap();
        assert!(acks.receive(soon()).unwrap().is_some());
        // Those that are dropped count as well: they cost as much to look at.
        let flood = MAX_AT_ONCE + 10;
        guest
            .within(|| {
                (0..flood).try_for_each(|number| {
                    let bytes: &[u8] = if number % 2 == 0 { b"flood" } else { &[b'x'; MAX_DATAGRAM + 1] };
                    sent.send_to(bytes, (gateway, ACK_PORT)).map(drop)
                })
            })
            .unwrap();
        let (mut turns, mut good, deadline) = (Vec::new(), 0, soon());
        while good < flood / 2 {
            assert!(Instant::now() < deadline, "{turns:?}");
            let taken = acks.take().unwrap().len();
            good += taken;
            turns.push(taken);
            std::thread::yield_now();
        }
        assert!(turns.iter().all(|taken| *taken <= MAX_AT_ONCE / 2 + 1), "{turns:?}");
        assert_eq!(acks.take().unwrap(), []);
    });
}

#[test]
fn n2_what_is_too_long_or_for_another_port_is_no_acknowledgement() {
    in_a_world(|world| {
        let link = world.network().prepare(&fork(1), TAP).unwrap();
        let acks = link.ack_socket().unwrap();
        let guest = Guest::start(world, &link);
        let gateway = link.record().addresses.gateway_v4;
        guest.send(guest.v4(), (gateway, ACK_PORT), &[b'x'; MAX_DATAGRAM + 1]).unwrap();
        guest.send(guest.v4(), (gateway, ACK_PORT), b"").unwrap();
        guest.send(guest.v4(), (gateway, ACK_PORT + 1), b"x").unwrap();
        assert_eq!(acks.receive(never()).unwrap(), None);
        guest.send(guest.v4(), (gateway, ACK_PORT), &[b'x'; MAX_DATAGRAM]).unwrap();
        assert_eq!(acks.receive(soon()).unwrap().unwrap().bytes.len(), MAX_DATAGRAM);
    });
}

#[test]
fn n2_an_acknowledgement_with_another_mac_or_address_is_dropped() {
    in_a_world(|world| {
        let link = world.network().prepare(&fork(1), TAP).unwrap();
        let acks = link.ack_socket().unwrap();
        let addresses = link.record().addresses;
        let guest = Guest::start_bare(world, &link);
        let to = (addresses.gateway_v4, ACK_PORT);
        let wrong = MacAddress::local([2, 0x6f, 1, 1, 1, 1]);
        guest.becomes(wrong, addresses.v4.into());
        guest.send(addresses.v4, to, b"wrong MAC").unwrap();
        assert_eq!(acks.receive(never()).unwrap(), None);
        let neighbour = std::net::Ipv4Addr::from(u32::from(addresses.v4) + 1);
        guest.becomes(addresses.mac, neighbour.into());
        guest.send(neighbour, to, b"wrong address").unwrap();
        assert_eq!(acks.receive(never()).unwrap(), None);
        guest.send(addresses.v4, to, b"right").unwrap();
        assert_eq!(acks.receive(soon()).unwrap().unwrap().bytes, b"right");
    });
}

#[test]
fn n1_only_the_forks_own_addresses_pass_an_open_link() {
    in_a_world(|world| {
        let server = serve(&world.outside(), (OUTSIDE, 80));
        let (link, guest) = world.open(&world.network(), 1, Policy::default());
        let before = world.packets_out_of(link.record());
        let forged = std::net::Ipv4Addr::new(100, 112, 9, 9);
        guest.becomes(guest.record.addresses.mac, forged.into());
        guest.send(forged, server, b"forged").unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(world.packets_out_of(link.record()), before);
        guest.send(guest.v4(), server, b"own").unwrap();
        let deadline = soon();
        while world.packets_out_of(link.record()) == before {
            assert!(Instant::now() < deadline, "its own address passes");
            std::thread::yield_now();
        }
    });
}
