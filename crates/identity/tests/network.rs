//! The network section: its rules, its one form, and what it does to a document's format.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use offshoot_identity::{
    AckKey, Action, ClockNanos, Document, DocumentError, ForkId, ForkIdentity, ForkName, Inet, Limits, MacAddress,
    Network, NetworkError, Secret, Tag,
    document::{ENTROPY_LEN, FORMAT, FORMAT_NETWORK, format_for},
    network::{MAX_DNS, MAX_DOMAIN, MAX_SEARCH, MAX_SECTION},
};
use proptest::prelude::*;

fn network() -> Network {
    Network {
        mac: "02:6f:64:70:00:02".parse().unwrap(),
        mtu: 1500,
        ipv4: Some(Inet {
            address: Ipv4Addr::new(100, 112, 0, 2),
            prefix: 32,
            gateway: Some(Ipv4Addr::new(100, 112, 0, 1)),
        }),
        ipv6: Some(Inet {
            address: "fd3b::2".parse().unwrap(),
            prefix: 128,
            gateway: Some("fd3b::1".parse().unwrap()),
        }),
        gateway_mac: Some("0e:6f:66:00:00:01".parse().unwrap()),
        dns: vec!["100.112.0.1".parse().unwrap()],
        search: Vec::new(),
        ack: Some("100.112.0.1:28518".parse().unwrap()),
    }
}

fn document(network: Option<Network>) -> Document {
    Document {
        format: format_for(network.as_ref()),
        action: Action::Become,
        fork: ForkIdentity {
            id: ForkId::parse("0123456789abcdef0123").unwrap(),
            name: ForkName::parse("a").unwrap(),
            hostname: ForkName::parse("a").unwrap(),
            template: Tag::parse("python").unwrap(),
            machine_id: "0".repeat(32),
            boot_id: "01234567-89ab-4cde-8f01-23456789abcd".into(),
        },
        labels: Default::default(),
        env: Default::default(),
        secrets: Default::default(),
        files: Vec::new(),
        wall_clock: ClockNanos(1),
        entropy: Secret::new(vec![3; ENTROPY_LEN]),
        ack_key: AckKey::new([4; 32]),
        limits: Limits::default(),
        network,
    }
}

/// The longest section that is valid.
fn longest() -> Network {
    let domain = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
    assert_eq!(domain.len(), MAX_DOMAIN);
    Network {
        dns: vec!["fd00::53".parse().unwrap(); MAX_DNS],
        search: vec![domain; MAX_SEARCH],
        ack: Some("[fd3b::1]:28518".parse().unwrap()),
        ..network()
    }
}

#[test]
fn a_section_reads_back_and_changes_the_documents_format() {
    for section in
        [network(), longest(), Network { ipv6: None, gateway_mac: None, dns: Vec::new(), ack: None, ..network() }]
    {
        assert_eq!(Network::from_bytes(&section.to_bytes()), Ok(section.clone()));
        let before = document(Some(section.clone()));
        assert_eq!(before.format, FORMAT_NETWORK);
        assert_eq!(Document::from_bytes(before.to_bytes().expose()).unwrap().network, Some(section.clone()));
        assert_eq!(Document::from_json(before.to_json().expose()).unwrap().network, Some(section));
    }
    let without = document(None);
    assert_eq!(without.format, FORMAT);
    assert_eq!(Document::from_bytes(without.to_bytes().expose()).unwrap().network, None);
}

#[test]
fn what_a_section_adds_is_what_the_module_says() {
    let len = |network: Option<Network>| document(network).to_bytes().expose().len();
    assert_eq!(len(Some(network())) - len(None), 116);
    assert_eq!(len(Some(longest())) - len(None), 1722);
    assert!(longest().to_bytes().len() <= MAX_SECTION);
}

#[test]
fn a_document_whose_format_and_section_disagree_is_refused() {
    let mut bytes = document(Some(network())).to_bytes().expose().to_vec();
    bytes[4] = 1;
    assert!(matches!(Document::from_bytes(&bytes), Err(DocumentError::MalformedBytes { .. })));
    let mut bytes = document(None).to_bytes().expose().to_vec();
    bytes[4] = 2;
    assert!(matches!(Document::from_bytes(&bytes), Err(DocumentError::MalformedBytes { .. })));
    for wrong in [Document { format: 1, ..document(Some(network())) }, Document { format: 2, ..document(None) }] {
        assert!(matches!(
            Document::from_json(wrong.to_json().expose()),
            Err(DocumentError::Field { field: "network", .. })
        ));
    }
}

fn refused(change: impl FnOnce(&mut Network)) -> &'static str {
    let mut section = network();
    change(&mut section);
    let Err(NetworkError::Field { field, .. }) = Network::from_bytes(&section.to_bytes()) else {
        panic!("{section:?} is not refused");
    };
    assert!(matches!(
        Document::from_bytes(document(Some(section)).to_bytes().expose()),
        Err(DocumentError::Network(NetworkError::Field { .. }))
    ));
    field
}

#[test]
fn n1_no_address_that_is_not_one_hosts_is_taken() {
    let v4 = |text: &str| text.parse::<Ipv4Addr>().unwrap();
    for bad in ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"] {
        assert_eq!(refused(|network| network.ipv4.as_mut().unwrap().address = v4(bad)), "ipv4.address", "{bad}");
        assert_eq!(refused(|network| network.ipv4.as_mut().unwrap().gateway = Some(v4(bad))), "ipv4.gateway", "{bad}");
        assert_eq!(refused(|network| network.dns[0] = IpAddr::V4(v4(bad))), "dns", "{bad}");
        assert_eq!(refused(|network| network.ack = Some(SocketAddr::new(v4(bad).into(), 1))), "ack", "{bad}");
    }
    let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    for bad in ["::", "::1", "ff02::1", "::ffff:10.0.0.1", "::10.0.0.1"] {
        assert_eq!(refused(|network| network.ipv6.as_mut().unwrap().address = v6(bad)), "ipv6.address", "{bad}");
        assert_eq!(refused(|network| network.ipv6.as_mut().unwrap().gateway = Some(v6(bad))), "ipv6.gateway", "{bad}");
        assert_eq!(refused(|network| network.dns[0] = IpAddr::V6(v6(bad))), "dns", "{bad}");
        assert_eq!(refused(|network| network.ack = Some(SocketAddr::new(v6(bad).into(), 1))), "ack", "{bad}");
    }
    // A link's own address says nothing without the link; as a gateway it is usual.
    assert_eq!(refused(|network| network.ipv6.as_mut().unwrap().address = v6("fe80::2")), "ipv6.address");
    assert_eq!(refused(|network| network.dns[0] = IpAddr::V6(v6("fe80::2"))), "dns");
    let mut with_link_gateway = network();
    with_link_gateway.ipv6.as_mut().unwrap().gateway = Some(v6("fe80::1"));
    assert_eq!(with_link_gateway.check(), Ok(()));
    // The first and the last address of a network are nobody's.
    for bad in ["10.1.2.0", "10.1.2.255"] {
        let inet = Inet { address: v4(bad), prefix: 24, gateway: None };
        assert_eq!(refused(|network| network.ipv4 = Some(inet)), "ipv4.address");
    }
    let pair = Network { ipv4: Some(Inet { address: v4("10.1.2.0"), prefix: 31, gateway: None }), ..network() };
    assert_eq!(pair.check(), Ok(()));
}

#[test]
fn what_else_breaks_a_rule_is_refused() {
    for mtu in [0, 575, 9001, u16::MAX, 1279] {
        assert_eq!(refused(|network| network.mtu = mtu), "mtu");
    }
    assert_eq!(Network { mtu: 576, ipv6: None, ..network() }.check(), Ok(()));
    assert_eq!(refused(|network| (network.ipv4, network.ipv6, network.ack) = (None, None, None)), "ipv4 and ipv6");
    for prefix in [0, 33] {
        assert_eq!(refused(|network| network.ipv4.as_mut().unwrap().prefix = prefix), "ipv4.prefix");
    }
    for prefix in [0, 129] {
        assert_eq!(refused(|network| network.ipv6.as_mut().unwrap().prefix = prefix), "ipv6.prefix");
    }
    assert_eq!(
        refused(|network| network.ipv4.as_mut().unwrap().gateway = Some(Ipv4Addr::new(100, 112, 0, 2))),
        "ipv4.gateway"
    );
    assert_eq!(refused(|network| network.gateway_mac = Some(network.mac)), "gateway_mac");
    assert_eq!(refused(|network| network.ack = Some("100.112.0.1:0".parse().unwrap())), "ack");
    assert_eq!(refused(|network| network.ipv4 = None), "ack");
    for domain in ["", ".", "a.", ".a", "a..b", "A", "a b", "a\nnameserver 1.1.1.1", "-a", "a-", "ü", &"a".repeat(64)]
    {
        assert_eq!(refused(|network| network.search = vec![domain.to_owned()]), "search", "{domain:?}");
    }
    // More entries than there may be are not even read.
    for too_many in [
        Network { dns: vec!["10.0.0.1".parse().unwrap(); MAX_DNS + 1], ..network() },
        Network { search: vec!["a".to_owned(); MAX_SEARCH + 1], ..network() },
    ] {
        assert!(matches!(Network::from_bytes(&too_many.to_bytes()), Err(NetworkError::Malformed { .. })));
        assert!(too_many.check().is_err());
    }
    let zone = "{\"ack\":\"[fd00::1%2]:1\"}";
    let mut json: serde_json::Value = serde_json::to_value(network()).unwrap();
    json["ack"] = serde_json::from_str::<serde_json::Value>(zone).unwrap()["ack"].clone();
    assert!(!serde_json::from_value::<Network>(json).is_ok_and(|network| network.check().is_ok()));
}

#[test]
fn n1_a_mac_address_is_local_and_not_a_groups() {
    for bad in [
        "00:16:3e:00:00:01",
        "03:6f:64:70:00:02",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "",
        "02:6f:64:70:00",
        "02:6f:64:70:00:02:03",
        "2:6f:64:70:0:2",
        "02-6f-64-70-00-02",
        "+2:6f:64:70:00:02",
    ] {
        assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
    }
    assert_eq!("02:6F:64:70:00:02".parse::<MacAddress>().unwrap().to_string(), "02:6f:64:70:00:02");
    let mut bytes = network().to_bytes();
    bytes[0] = 3;
    assert!(matches!(Network::from_bytes(&bytes), Err(NetworkError::Malformed { .. })));
}

#[test]
fn an_unknown_or_doubled_field_is_refused() {
    let json = serde_json::to_string(&network()).unwrap();
    for (from, to) in [
        ("{\"mac\"", "{\"up\":true,\"mac\""),
        ("{\"mac\"", "{\"mtu\":600,\"mac\""),
        ("\"prefix\":32", "\"prefix\":32,\"x\":1"),
    ] {
        assert!(json.contains(from));
        assert!(serde_json::from_str::<Network>(&json.replacen(from, to, 1)).is_err(), "{to}");
    }
}

fn any_section() -> impl Strategy<Value = Network> {
    let v4 = (0x0a00_0001_u32..0x0aff_fffe).prop_map(Ipv4Addr::from);
    let v6 = any::<u64>().prop_map(|low| Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(low)));
    let inet4 = prop::option::of((v4.clone(), 31_u8..=32, prop::option::of(Just(Ipv4Addr::new(172, 16, 0, 1)))));
    let inet6 = (v6.clone(), 1_u8..=128, prop::option::of(Just("fe80::1".parse::<Ipv6Addr>().unwrap())));
    let dns = prop::collection::vec(prop_oneof![v4.prop_map(IpAddr::V4), v6.prop_map(IpAddr::V6)], 0..=MAX_DNS);
    let search = prop::collection::vec("[a-z0-9]{1,63}(\\.[a-z0-9_]{1,20}){0,3}", 0..=MAX_SEARCH);
    (any::<[u8; 5]>(), 1280..=9000_u16, inet4, inet6, dns, search, any::<bool>()).prop_map(
        |(low, mtu, ipv4, (address, prefix, gateway), dns, search, ack)| Network {
            mac: MacAddress::new([2, low[0], low[1], low[2], low[3], low[4]]).unwrap(),
            mtu,
            ipv4: ipv4.map(|(address, prefix, gateway)| Inet { address, prefix, gateway }),
            ipv6: Some(Inet { address, prefix, gateway }),
            gateway_mac: None,
            dns,
            search,
            ack: ack.then(|| "[fd00::9]:28518".parse().unwrap()),
        },
    )
}

proptest! {
    #[test]
    fn every_valid_section_survives(section in any_section()) {
        prop_assert_eq!(section.check(), Ok(()));
        let bytes = section.to_bytes();
        prop_assert!(bytes.len() <= MAX_SECTION);
        prop_assert_eq!(Network::from_bytes(&bytes), Ok(section.clone()));
        let json = serde_json::to_string(&section).unwrap();
        prop_assert_eq!(serde_json::from_str::<Network>(&json).unwrap(), section);
    }

    #[test]
    fn bytes_changed_anywhere_are_refused_or_have_their_one_form(
        section in any_section(), at in any::<prop::sample::Index>(), change in prop::collection::vec(any::<u8>(), 1..6),
    ) {
        let mut bytes = document(Some(section)).to_bytes().expose().to_vec();
        let at = at.index(bytes.len());
        let end = bytes.len().min(at + change.len());
        bytes[at..end].copy_from_slice(&change[..end - at]);
        if let Ok(read) = Document::from_bytes(&bytes) {
            let again = read.to_bytes();
            prop_assert_eq!(again.expose(), &bytes[..]);
        }
    }

    #[test]
    fn a_section_cut_anywhere_or_made_longer_is_refused(section in any_section(), at in any::<prop::sample::Index>()) {
        let mut bytes = section.to_bytes();
        prop_assert!(Network::from_bytes(&bytes[..at.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert!(Network::from_bytes(&bytes).is_err());
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Network::from_bytes(&bytes);
    }
}
