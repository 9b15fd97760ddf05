//! What a fork is given is what it has, and forks differ from each other and from their template.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use identity::{Inet, MacAddress};

use super::rig::{
    GATEWAY, GATEWAY6, Machine, Sniffer, Switch, TEMPLATE, add_address, ask_back, connect, contains, may_run, section,
    serve, until, v4, v6,
};
use crate::network::{Network, NetworkError, resolv_conf};

#[test]
fn n1_two_forks_and_their_template_are_three_machines_that_reach_each_other() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let sniffer = Sniffer::new(&switch);
    let (template, one, other) = (switch.machine(), switch.machine(), switch.machine());
    template.becomes(TEMPLATE);
    one.becomes(1 + 10);
    other.becomes(2 + 10);
    for (machine, number) in [(&template, TEMPLATE), (&one, 11), (&other, 12)] {
        assert_eq!(machine.shows("address"), section(number).mac.to_string());
        assert_eq!(machine.shows("mtu"), "1400");
        let addresses: Vec<IpAddr> = machine.addresses().iter().map(|assigned| assigned.address).collect();
        assert_eq!(addresses, [IpAddr::from(v4(number)), v6(number).into()], "no other, not even a link's own");
    }
    let servers = [v4(12).into(), v6(12).into()].map(|address: IpAddr| serve(&other.space, (address, 80).into()));
    for (machine, number) in [(&template, TEMPLATE), (&one, 11), (&other, 12)] {
        for (to, from) in [(IpAddr::from(v4(12)), v4(number).to_string()), (v6(12).into(), v6(number).to_string())] {
            let mut stream = connect(&machine.space, SocketAddr::from((to, 80))).unwrap();
            assert_eq!(ask_back(&mut stream).unwrap(), from);
        }
    }
    drop(servers);
    // Each was announced: an ARP for its own address, and an advertisement to all.
    let frames = sniffer.frames();
    for number in [TEMPLATE, 11, 12] {
        let mac = section(number).mac.octets();
        let of_it: Vec<_> = frames.iter().filter(|frame| frame[6..12] == mac).collect();
        let is_arp = |frame: &&&Vec<u8>| frame[12..14] == [8, 6] && frame[28..32] == frame[38..42];
        assert!(of_it.iter().any(|frame| is_arp(&frame)), "{number}: gratuitous ARP");
        assert!(of_it.iter().any(|frame| frame[..6] == [0x33, 0x33, 0, 0, 0, 1] && frame[54] == 136), "{number}: NA");
        assert!(!of_it.iter().any(|frame| frame.get(54) == Some(&133)), "{number}: asks for no router");
    }
}

#[test]
fn n1_a_routed_fork_reaches_a_gateway_that_is_outside_of_its_prefix() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    let mut own = section(11);
    own.ipv4 = Some(Inet { address: [10, 99, 0, 2].into(), prefix: 32, gateway: Some(GATEWAY) });
    own.ipv6 = Some(Inet { address: "fd99::2".parse().unwrap(), prefix: 128, gateway: Some(GATEWAY6) });
    switch.space.run(|| {
        add_address("br0", [10, 99, 0, 1].into(), 24, 0);
        add_address("br0", "fd99::1".parse().unwrap(), 64, 2);
    });
    fork.space.run(|| fork.network.take_on(Some(&own)).unwrap());
    for gateway in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
        let _server = serve(&switch.space, (gateway, 80).into());
        let mut stream = connect(&fork.space, (gateway, 80).into()).unwrap();
        assert!(["10.99.0.2", "fd99::2"].contains(&ask_back(&mut stream).unwrap().as_str()));
    }
}

#[test]
fn n1_the_gateways_card_is_taken_as_given_and_not_asked_for() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    let sniffer = Sniffer::new(&switch);
    let mut own = section(11);
    // Nobody has this card; what goes to the gateway goes there all the same.
    let gateway: MacAddress = "0e:6f:66:00:00:01".parse().unwrap();
    own.gateway_mac = Some(gateway);
    fork.space.run(|| fork.network.take_on(Some(&own)).unwrap());
    for to in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
        fork.space.run(|| {
            let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
            std::net::UdpSocket::bind((any, 0)).unwrap().send_to(b"to the gateway", (to, 9)).unwrap();
        });
    }
    let frames = sniffer.frames();
    let sent =
        frames.iter().filter(|frame| frame[..6] == MacAddress::octets(gateway) && contains(frame, b"to the gateway"));
    assert_eq!(sent.count(), 2);
    let asks = |frame: &Vec<u8>| frame[12..14] == [8, 6] && frame[38..42] == GATEWAY.octets();
    assert!(!frames.iter().any(asks), "it is asked for by ARP");
}

/// `IFA_F_TENTATIVE` and `IFA_F_DADFAILED`.
const TENTATIVE: u8 = 0x40;
const DUPLICATE: u8 = 0x08;

/// The kernel's flags of an address of a machine's card.
fn flags_of(machine: &Machine, address: Ipv6Addr) -> Option<u8> {
    let digits: String = address.octets().iter().map(|byte| format!("{byte:02x}")).collect();
    machine.space.run(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
        let line = text.lines().find(|line| line.starts_with(&digits))?;
        u8::from_str_radix(line.split_whitespace().nth(4)?, 16).ok()
    })
}

#[test]
fn n1_a_leased_address_can_be_used_at_once_and_is_nobody_elses() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let _server = serve(&switch.space, (GATEWAY6, 80).into());
    let forks: Vec<_> = (11..19).map(|number| (number, switch.machine())).collect();
    for (number, fork) in &forks {
        fork.becomes(*number);
        // With a search for duplicates the address could not be used for a second.
        assert_eq!(flags_of(fork, v6(*number)).unwrap() & (TENTATIVE | DUPLICATE), 0);
        assert_eq!(
            ask_back(&mut connect(&fork.space, (GATEWAY6, 80).into()).unwrap()).unwrap(),
            v6(*number).to_string()
        );
    }
    // Somebody who looks for duplicates finds none of an address that is not leased, and the fork with one that is.
    let looks = switch.machine();
    looks.becomes(50);
    looks.space.run(|| {
        add_address("eth0", v6(51).into(), 128, 0);
        add_address("eth0", v6(12).into(), 128, 0);
    });
    until("the duplicate is found", || flags_of(&looks, v6(12)).is_some_and(|flags| flags & DUPLICATE != 0));
    until("the search ends", || flags_of(&looks, v6(51)).unwrap() & (TENTATIVE | DUPLICATE) == 0);
}

#[test]
fn n2_a_section_applied_again_changes_nothing_and_another_leaves_nothing_of_the_first() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    let _server = serve(&switch.space, (GATEWAY, 80).into());
    fork.becomes(11);
    let mut stream = connect(&fork.space, (GATEWAY, 80).into()).unwrap();
    let (addresses, routes) = (fork.addresses(), fork.routes());
    for _ in 0..3 {
        fork.space.run(|| fork.network.reconfigure(&section(11)).unwrap());
    }
    assert_eq!((fork.addresses(), fork.routes()), (addresses, routes));
    assert_eq!(ask_back(&mut stream).unwrap(), v4(11).to_string(), "a connection goes on");
    fork.space.run(|| fork.network.reconfigure(&section(12)).unwrap());
    let addresses: Vec<IpAddr> = fork.addresses().iter().map(|assigned| assigned.address).collect();
    assert_eq!(addresses, [IpAddr::from(v4(12)), v6(12).into()]);
    assert_eq!(fork.shows("address"), section(12).mac.to_string());
}

#[test]
fn n2_what_can_not_be_applied_is_named_and_can_be_tried_again() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    // A gateway of this machine's own is refused by the kernel.
    fork.space.run(|| add_address("lo", GATEWAY.into(), 32, 0));
    let error = fork.space.run(|| fork.network.take_on(Some(&section(11)))).unwrap_err();
    assert!(error.to_string().starts_with("adding the IPv4 default route: "), "{error}");
    let mut right = section(11);
    right.ipv4.as_mut().unwrap().gateway = Some(v4(3));
    fork.space.run(|| fork.network.reconfigure(&right).unwrap());
    assert_eq!(fork.addresses().len(), 2);

    let without = Network::open().unwrap();
    if !without.has_card() {
        assert!(matches!(without.take_on(Some(&section(11))), Err(NetworkError::NoCard)));
        assert!(matches!(without.take_on(None), Ok("none")));
        assert_eq!(without.quiesce(true).unwrap().ended, 0);
    }
}

#[test]
fn n1_an_agent_without_rights_says_which_step_it_has_none_for() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    let error = fork.space.run(|| {
        // The thread's alone: the call changes no other's.
        let nobody = rustix::thread::CapabilitySets {
            effective: rustix::thread::CapabilitySet::empty(),
            permitted: rustix::thread::CapabilitySet::empty(),
            inheritable: rustix::thread::CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, nobody).unwrap();
        // The kernel looks at who opened the socket, too; this one's was opened with all rights.
        fork.network.take_on(Some(&section(11)))
    });
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("setting MAC address and MTU, and bringing the card up: "), "{error}");
}

#[test]
fn resolv_conf_has_the_servers_and_domains_and_nothing_else() {
    let mut own = section(11);
    own.dns = vec!["10.77.0.1".parse().unwrap(), "fd77::1".parse().unwrap()];
    assert_eq!(resolv_conf(&own), "nameserver 10.77.0.1\nnameserver fd77::1\nsearch forks.test\n");
    own.search.clear();
    own.dns.clear();
    assert_eq!(resolv_conf(&own), "");
}
