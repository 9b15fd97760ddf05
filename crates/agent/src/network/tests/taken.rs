//! What a capture takes: address, routes, neighbours, connections. A fork then shows nothing of its template.

use std::{io::Read as _, net::IpAddr, net::UdpSocket};

use super::rig::{
    GATEWAY, GATEWAY6, Sniffer, Switch, TEMPLATE, add_address, ask_back, connect, contains, may_run, section, serve,
    until, v4, v6,
};

#[test]
fn n1_a_capture_has_no_address_no_route_no_neighbour_and_the_card_is_down() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let template = switch.machine();
    let _server = serve(&switch.space, (GATEWAY, 80).into());
    template.becomes(TEMPLATE);
    // A second address, of which the agent knows nothing.
    template.space.run(|| add_address("eth0", v4(77).into(), 32, 0));
    ask_back(&mut connect(&template.space, (GATEWAY, 80).into()).unwrap()).unwrap();
    assert!(template.neighbours() > 0 && template.routes().0 > 0);
    template.space.run(|| template.network.quiesce(true).unwrap());
    assert_eq!((template.addresses(), template.routes(), template.neighbours()), (Vec::new(), (0, 0), 0));
    assert_eq!(template.shows("operstate"), "down");
    // Doing it twice is doing it once.
    assert_eq!(template.space.run(|| template.network.quiesce(true).unwrap()).ended, 0);
}

#[test]
fn n1_a_connection_made_before_is_dead_in_the_fork_and_nothing_of_the_template_is_on_the_wire() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let template = switch.machine();
    let servers = [IpAddr::from(GATEWAY), GATEWAY6.into()].map(|address| serve(&switch.space, (address, 80).into()));
    template.becomes(TEMPLATE);
    let mut streams =
        [IpAddr::from(GATEWAY), GATEWAY6.into()].map(|address| connect(&template.space, (address, 80).into()).unwrap());
    for stream in &mut streams {
        ask_back(stream).unwrap();
    }
    // One that the other side made, and nobody has accepted; a datagram socket with an address; a program's own conversation.
    let listener = template.space.run(|| std::net::TcpListener::bind(("::", 81)).unwrap());
    let incoming = connect(&switch.space, (v4(TEMPLATE), 81).into()).unwrap();
    let bound = template.space.run(|| {
        let socket = UdpSocket::bind((v6(TEMPLATE), 0)).unwrap();
        socket.connect((GATEWAY6, 9)).unwrap();
        socket
    });
    let _local_server = serve(&template.space, ([127, 0, 0, 1], 82).into());
    let mut local = connect(&template.space, ([127, 0, 0, 1], 82).into()).unwrap();
    ask_back(&mut local).unwrap();

    let quieted = template.space.run(|| template.network.quiesce(true).unwrap());
    assert_eq!(quieted.ended, 4, "three connections and a datagram socket");
    let sniffer = Sniffer::new(&switch);
    template.becomes(11);
    for stream in &mut streams {
        assert!(ask_back(stream).is_err(), "dead");
    }
    assert!(bound.send(b"as the template").is_err());
    assert_eq!((&incoming).read(&mut [0; 1]).map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionReset));
    // What stays inside goes on, and who listens on every address goes on listening.
    assert_eq!(ask_back(&mut local).unwrap(), "127.0.0.1");
    connect(&switch.space, (v4(11), 81).into()).unwrap();
    listener.accept().unwrap();
    for address in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
        ask_back(&mut connect(&template.space, (address, 80).into()).unwrap()).unwrap();
    }
    drop(servers);

    let frames = sniffer.frames();
    assert!(frames.iter().any(|frame| contains(frame, &v4(11).octets())), "the sniffer sees");
    // The group of its neighbours' questions (RFC 4291, 2.7.1), which a card leaves when it loses its address.
    let group = [&[0xff], &v6(TEMPLATE).octets()[13..]].concat();
    for bytes in [&section(TEMPLATE).mac.octets()[..], &v4(TEMPLATE).octets(), &v6(TEMPLATE).octets(), &group] {
        let of_template = frames.iter().filter(|frame| contains(frame, bytes));
        assert_eq!(of_template.collect::<Vec<_>>(), Vec::<&Vec<u8>>::new());
    }
}

#[test]
fn n1_without_ending_them_ipv6_sockets_would_go_on_as_the_template() {
    if !may_run() {
        return;
    }
    // Why connections are ended, and not left to find out: the negative case of the test above.
    let switch = Switch::new();
    let template = switch.machine();
    template.becomes(TEMPLATE);
    let bound = template.space.run(|| {
        let socket = UdpSocket::bind((v6(TEMPLATE), 0)).unwrap();
        socket.connect((GATEWAY6, 9)).unwrap();
        socket
    });
    template.space.run(|| template.network.quiesce(false).unwrap());
    let sniffer = Sniffer::new(&switch);
    template.space.run(|| template.network.restore().unwrap());
    let gateway_mac = Some("0e:6f:66:00:00:01".parse().unwrap());
    let own = identity::Network { gateway_mac, ..section(11) };
    template.space.run(|| template.network.reconfigure(&own).unwrap());
    bound.send(b"as the template").unwrap();
    until("the template's address is on the wire", || {
        sniffer
            .frames()
            .iter()
            .any(|frame| contains(frame, &v6(TEMPLATE).octets()) && contains(frame, b"as the template"))
    });
}

#[test]
fn n1_the_source_of_a_branch_keeps_its_connections_and_the_branch_has_none() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let _server = serve(&switch.space, (GATEWAY, 80).into());
    let fork = switch.machine();
    fork.becomes(11);
    let mut stream = connect(&fork.space, (GATEWAY, 80).into()).unwrap();
    ask_back(&mut stream).unwrap();
    fork.space.run(|| fork.network.quiesce(false).unwrap());
    assert_eq!(fork.addresses(), Vec::new());
    fork.space.run(|| fork.network.restore().unwrap());
    assert_eq!(ask_back(&mut stream).unwrap(), v4(11).to_string());
    // And as the branch of it.
    fork.space.run(|| fork.network.quiesce(false).unwrap());
    let sniffer = Sniffer::new(&switch);
    fork.becomes(12);
    assert!(ask_back(&mut stream).is_err());
    let server = serve(&switch.space, (GATEWAY, 81).into());
    assert_eq!(ask_back(&mut connect(&fork.space, (GATEWAY, 81).into()).unwrap()).unwrap(), v4(12).to_string());
    // Nothing that it says is its source's: not even that it is no member of its source's group any more.
    let said: Vec<_> = sniffer.frames().into_iter().filter(|frame| frame[6..12] == section(12).mac.octets()).collect();
    assert!(said.iter().any(|frame| contains(frame, &v4(12).octets())), "the sniffer sees");
    let group = [&[0xff], &v6(11).octets()[13..]].concat();
    for bytes in [&v4(11).octets()[..], &v6(11).octets(), &group] {
        let of_source = said.iter().filter(|frame| contains(frame, bytes));
        assert_eq!(of_source.collect::<Vec<_>>(), Vec::<&Vec<u8>>::new());
    }
    drop(server);
}

#[test]
fn n3_what_a_rehearsal_did_is_taken_back_and_the_next_identity_shows_nothing_of_it() {
    if !may_run() {
        return;
    }
    const REHEARSED: u8 = 55;
    let switch = Switch::new();
    // The other one keeps what it has, and says so now and then: not on this wire.
    let elsewhere = Switch::new();
    let (one, other) = (switch.machine(), elsewhere.machine());
    let captured = [one.shows("address"), other.shows("address")];
    assert_ne!(captured[0], captured[1]);
    for machine in [&one, &other] {
        machine.becomes(REHEARSED);
        assert_ne!((machine.addresses().len(), machine.routes()), (0, (0, 0)));
        // Taken from one only: the check can fail.
        if std::ptr::eq(machine, &one) {
            one.space.run(|| one.network.take_back().unwrap());
        }
    }
    assert_eq!((one.addresses(), one.routes(), one.neighbours()), (Vec::new(), (0, 0), 0));
    assert_eq!((one.shows("address"), one.shows("operstate")), (captured[0].clone(), "down".to_owned()));
    assert_eq!((one.shows("mtu"), one.network.applied()), ("1500".to_owned(), None));
    assert_eq!(other.shows("address"), section(REHEARSED).mac.to_string());
    // Once more is nothing more.
    one.space.run(|| one.network.take_back().unwrap());

    let sniffer = Sniffer::new(&switch);
    let group = [&[0xff], &v6(REHEARSED).octets()[13..]].concat();
    let of_rehearsal = |frames: &[Vec<u8>]| {
        let traces = [&section(REHEARSED).mac.octets()[..], &v4(REHEARSED).octets(), &v6(REHEARSED).octets(), &group];
        frames.iter().filter(|frame| traces.iter().any(|trace| contains(frame, trace))).count()
    };
    one.becomes(11);
    let server = serve(&switch.space, (GATEWAY, 80).into());
    assert_eq!(ask_back(&mut connect(&one.space, (GATEWAY, 80).into()).unwrap()).unwrap(), v4(11).to_string());
    let frames = sniffer.frames();
    assert!(frames.iter().any(|frame| contains(frame, &v4(11).octets())), "the sniffer sees");
    assert_eq!(of_rehearsal(&frames), 0);
    other.becomes(12);
    assert_eq!(other.addresses().len(), 4, "what nobody took is still there");
    drop(server);
}
