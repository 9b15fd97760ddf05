//! I11: who a fork is on the wire is its own, and what its template had there is nobody's.

use std::{collections::BTreeSet, fs, net::Ipv4Addr, time::Duration};

use offshoot_tests::{
    Bench, Fork, Kind, Server,
    bench::wait_until,
    world::{OTHER, SERVER, World},
};

/// Of every template's card.
const TEMPLATE_MAC: &str = "02:6f:66:66:73:68";
/// An address that the template had while it was warmed.
const TEMPLATE_ADDRESS: &str = "192.0.2.77";
/// As the kernel lists it.
const TEMPLATE_ADDRESS_HEX: &str = "4D0200C0";

/// What a workload sees of its card: MAC, IPv4, IPv6, IPv4 routes, DNS servers.
fn who(bench: &Bench, fork: &Fork) -> [String; 5] {
    let script = "cat /sys/class/net/eth0/address; \
        ip -4 addr show dev eth0 | sed -n 's/.* inet \\([^ ]*\\) .*/\\1/p' | tr '\\n' ' '; echo; \
        ip -6 addr show dev eth0 | sed -n 's/.* inet6 \\([^ ]*\\) .*/\\1/p' | tr '\\n' ' '; echo; \
        ip -4 route | tr '\\n' ' '; echo; tr '\\n' ' ' < /etc/resolv.conf; echo";
    let said = bench.sh(fork, script);
    let mut lines = said.split('\n').map(|line| line.trim().to_owned());
    std::array::from_fn(|_| lines.next().unwrap_or_default())
}

#[test]
fn i11_card_addresses_routes_and_dns_are_each_forks_own() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let mut forks = bench.fork(&template, &["-n", "2", "--dns", "198.51.100.2"]);
    forks.push(bench.fork_one(&template, &["--dns", "203.0.113.9"]));
    let seen: Vec<_> = forks.iter().map(|fork| who(&bench, fork)).collect();
    for (fork, [mac, v4, v6, routes, dns]) in forks.iter().zip(&seen) {
        assert_eq!(mac, fork.network("mac"));
        assert_eq!(*v4, format!("{}/32", fork.address()));
        if World::has_v6() {
            assert_eq!(*v6, format!("{}/128", fork.network("ipv6")));
        }
        let gateway = fork.network("gateway");
        assert_eq!(*routes, format!("default via {gateway} dev eth0 onlink"));
        let server = fork.record["network"]["dns"][0].as_str().unwrap();
        assert!(dns.contains(&format!("nameserver {server}")), "{dns}");
        // What was found is what is told of it later too.
        let inspected = bench.offshoot(&["inspect", fork.name()]).ok().json();
        assert_eq!(inspected["network"]["mac"], *mac, "{inspected}");
    }
    for field in 0..2 {
        let distinct: BTreeSet<_> = seen.iter().map(|seen| &seen[field]).collect();
        assert_eq!(distinct.len(), forks.len(), "two forks share {distinct:?}");
    }
    assert_eq!(seen[0][4], seen[1][4]);
    assert_ne!(seen[0][4], seen[2][4]);
    // A fork that is given no network is as its template was captured: a card with its own address, and nothing else.
    let bare = bench.fork_one(&template, &["--network", "none"]);
    let [mac, v4, v6, routes, dns] = who(&bench, &bare);
    assert_eq!([&mac, &v4, &v6, &routes], [TEMPLATE_MAC, "", "", ""]);
    assert!(!dns.contains("nameserver"), "{dns}");
    assert_eq!(bench.sh(&bare, "cat /sys/class/net/eth0/flags"), "0x1002", "it is down");
    bench.end();
}

#[test]
fn i11_a_connection_of_the_templates_card_is_dead_in_all_forks_and_one_by_loopback_lives() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let mut forks = bench.fork(&template, &["-n", "2"]);
    forks.push(bench.fork_one(&template, &["--network", "none"]));
    for fork in &forks {
        let name = fork.name();
        wait_until("the connection's end", Duration::from_secs(20), || {
            bench.sh(fork, "test -e /tmp/card.end && echo ended || true") == "ended"
        });
        // It was alive in the template, by which both ends were tried.
        assert!(bench.sh(fork, "cat /tmp/card.out").starts_with("template"), "{name}");
        let established = bench.sh(fork, "awk '$4 == \"01\" { print $2, $3 }' /proc/net/tcp /proc/net/tcp6");
        assert!(!established.contains(TEMPLATE_ADDRESS_HEX), "{name}: {established}");
        assert!(!bench.sh(fork, "ip addr; ip route; ip neigh").contains(TEMPLATE_ADDRESS), "{name}");
        // The check can fail: it sees the other one, which goes on in each fork by itself.
        assert_eq!(established.matches("0100007F:1B5A").count(), 2, "{name}: {established}");
        let _ = bench.sh(fork, &format!("echo {name} > /tmp/loopback.in"));
        wait_until("the answer by loopback", Duration::from_secs(20), || {
            bench.sh(fork, "cat /tmp/loopback.out") == format!("template\n{name}")
        });
    }
    bench.end();
}

#[test]
fn n1_names_are_found_by_the_dns_server_that_a_fork_is_given() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let outside = &bench.world().outside;
    let _server = Server::dns(outside, "server.test", OTHER);
    let ask = |name: &str, seconds: u8| {
        format!(
            "timeout {seconds} nslookup -type=a {name} 2>/dev/null | sed -n 's/^Address: *//p' | grep -v :53 || echo nobody"
        )
    };
    for fork in bench.fork(&template, &["-n", "2", "--dns", &SERVER.to_string()]) {
        assert_eq!(bench.sh(&fork, &ask("server.test", 20)), OTHER.to_string());
        assert_eq!(bench.sh(&fork, &ask("nobody.test", 20)), "nobody");
    }
    // One that has another server, which does not answer, and one that may not ask.
    let silent = Ipv4Addr::new(198, 51, 100, 77).to_string();
    for args in [["--dns", silent.as_str(), "--egress", "allow"], ["--dns", "198.51.100.2", "--egress", "deny"]] {
        let fork = bench.fork_one(&template, &args);
        assert_eq!(bench.sh(&fork, &ask("server.test", 2)), "nobody", "{args:?}");
    }
    bench.end();
}

/// A fork with a network writes to other pages than one without, and what the first of each kind has found is for the next of its kind. (The engine
/// qemu has no such lists.)
#[test]
fn forks_with_a_network_have_a_list_of_pages_of_their_own() {
    let bench = Bench::in_a_world_with_own_data();
    let template = bench.template(Kind::Busybox);
    let id = template.manifest["id"].as_str().unwrap();
    let with_lists = template.manifest["engine"]["name"] == "kvm";
    let names = |names: &[String]| if with_lists { names.to_vec() } else { Vec::new() };
    let list = |name: &str| fs::read(bench.state().join("pages").join(name)).unwrap_or_default();

    let connected = format!("{id}.network");
    let _ = bench.fork(&template, &["-n", "2", "--network", "none"]);
    assert_eq!(bench.entries("pages"), names(&[id.to_owned()]));
    let without = list(id);
    let _ = bench.fork(&template, &["-n", "2"]);
    assert_eq!(bench.entries("pages"), names(&[id.to_owned(), connected.clone()]));
    assert_eq!(list(id), without, "it is made once");
    assert_eq!(list(&connected) != without, with_lists);

    // With the template they go, and nothing else does.
    let other = bench.state().join("pages").join("0".repeat(20));
    fs::write(&other, "another template's").unwrap();
    let _ = bench.offshoot(&["kill", "--all"]).ok();
    let _ = bench.offshoot(&["rmi", &template.tag]).ok();
    assert_eq!(bench.entries("pages"), ["0".repeat(20)]);
    fs::remove_file(&other).unwrap();
    bench.end();
}
