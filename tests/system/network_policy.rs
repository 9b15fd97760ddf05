//! What forks reach, and what reaches them: an HTTP server outside, the host, each other, forwarded ports.
//!
//! Each fork has a server too, which says the fork's id.

use std::net::Ipv4Addr;

use offshoot_tests::{
    Bench, Fork, Kind, Server, Template,
    bench::wait_until,
    world::{HOST, METADATA, OTHER, SERVER, SERVER_V6, World},
};

/// Asks for all of these pages, each `HOST/PATH`, from a fork at once; `None` for those that nobody answered.
fn get<const N: usize>(bench: &Bench, fork: &Fork, pages: [String; N]) -> [Option<String>; N] {
    get_within(10, bench, fork, pages)
}

/// What is dropped without a word, nobody answers.
fn is_silent<const N: usize>(bench: &Bench, fork: &Fork, pages: [String; N]) -> bool {
    get_within(2, bench, fork, pages).iter().all(Option::is_none)
}

fn get_within<const N: usize>(seconds: u8, bench: &Bench, fork: &Fork, pages: [String; N]) -> [Option<String>; N] {
    let each = format!(
        "for page; do printf 'GET /%s HTTP/1.0\\r\\n\\r\\n' \"${{page#*/}}\" | timeout 30 nc -w {seconds} \"${{page%%/*}}\" 80 2>/dev/null \
        | tail -n 1 | grep . || echo nobody; done"
    );
    let pages = pages.each_ref().map(String::as_str);
    let said = bench.exec(fork, &[&["/bin/sh", "-c", &each, "get"], &pages[..]].concat()).ok().out();
    let mut lines = said.lines();
    let answers = pages.map(|_| lines.next().filter(|line| *line != "nobody").map(ToOwned::to_owned));
    assert_eq!(lines.next(), None, "{said}");
    answers
}

fn page(server: impl ToString) -> String {
    server.to_string() + "/"
}

/// What the server says if it sees the host.
fn from_host(asked: Ipv4Addr) -> Option<String> {
    Some(format!("{asked} {HOST}"))
}

/// The exit codes of one `ping` to each of these from a fork, all at once: 0 if it was answered within so many seconds.
fn pings<const N: usize>(seconds: u8, bench: &Bench, fork: &Fork, to: [String; N]) -> Vec<String> {
    let all = format!(
        "pids=; for to; do ping -c 1 -W {seconds} $to >/dev/null 2>&1 & pids=\"$pids $!\"; done; for pid in $pids; do wait $pid; echo $?; done"
    );
    let to = to.each_ref().map(String::as_str);
    let said = bench.exec(fork, &[&["/bin/sh", "-c", &all, "ping"], &to[..]].concat()).ok().out();
    said.lines().map(ToOwned::to_owned).collect()
}

/// All of them are answered.
fn reaches_by_ping<const N: usize>(bench: &Bench, fork: &Fork, to: [String; N]) -> bool {
    pings(20, bench, fork, to) == ["0"; N]
}

/// None of them is.
fn is_unheard_by_ping<const N: usize>(bench: &Bench, fork: &Fork, to: [String; N]) -> bool {
    pings(2, bench, fork, to) == ["1"; N]
}

fn id(fork: &Fork) -> Option<String> {
    Some(fork.id().to_owned())
}

/// A bench with a server outside and one on the host.
fn served() -> (Bench, Template, [Server; 2]) {
    let bench = Bench::in_a_world();
    let servers = [Server::http(&bench.world().outside), Server::http(&bench.world().host)];
    let template = bench.template(Kind::Networked);
    (bench, template, servers)
}

#[test]
fn n1_by_default_a_fork_reaches_the_outside_and_neither_the_host_nor_link_local_nor_another_fork() {
    let (bench, template, _servers) = served();
    let forks = bench.fork(&template, &["-n", "2"]);
    let host = &bench.world().host;
    // All of it is there for who may reach it.
    assert_eq!(host.get((SERVER, 80), ""), from_host(SERVER));
    host.sh(&format!("ip route add {METADATA}/32 via {SERVER}"));
    assert_eq!(host.get((METADATA, 80), ""), from_host(METADATA));
    assert_eq!(host.get((HOST, 80), ""), from_host(HOST));
    for (fork, other) in [(&forks[0], &forks[1]), (&forks[1], &forks[0])] {
        assert_eq!(host.get((other.address(), 80), "id"), id(other));
        assert!(is_silent(&bench, fork, [page(fork.network("gateway"))]));
        let [outside, elsewhere, own, of_host, metadata, of_other] = get(
            &bench,
            fork,
            [
                page(SERVER),
                page(OTHER),
                "127.0.0.1/id".into(),
                page(HOST),
                page(METADATA),
                format!("{}/id", other.address()),
            ],
        );
        assert_eq!((outside, elsewhere, own), (from_host(SERVER), from_host(OTHER), id(fork)));
        assert_eq!([of_host, metadata, of_other], [None, None, None]);
        let may = [fork.network("gateway").to_owned(), SERVER.to_string(), OTHER.to_string()];
        assert!(reaches_by_ping(&bench, fork, may));
        let may_not = [HOST.to_string(), METADATA.to_string(), other.address().to_string()];
        assert!(is_unheard_by_ping(&bench, fork, may_not));
        if World::has_v6() {
            let other = format!("{}/id", other.network("ipv6"));
            let [outside, of_host, of_other] = get(&bench, fork, [page(SERVER_V6), page("2001:db8:1::1"), other]);
            assert_eq!(outside.as_deref(), Some("2001:db8:1::2 2001:db8:1::1"));
            assert_eq!([of_host, of_other], [None, None]);
        }
        // Nobody outside reaches a fork by its own address either, not even through the host.
        bench.world().outside.sh(&format!("ip route replace {}/32 via {HOST}", fork.address()));
        assert_eq!(bench.world().outside.get((fork.address(), 80), "id"), None);
    }
    bench.end();
}

#[test]
fn n1_egress_is_what_was_asked_for() {
    let (bench, template, _servers) = served();
    let open = bench.fork_one(&template, &[]);
    let denied = bench.fork_one(&template, &["--egress", "deny"]);
    let some = bench.fork_one(&template, &["--egress", "203.0.113.0/24"]);
    let both = || [page(SERVER), page(OTHER)];
    assert_eq!(get(&bench, &open, both()), [from_host(SERVER), from_host(OTHER)]);
    assert_eq!(get(&bench, &denied, both()), [None, None]);
    assert_eq!(get(&bench, &some, both()), [None, from_host(OTHER)]);
    assert!(is_unheard_by_ping(&bench, &denied, [SERVER.to_string(), OTHER.to_string()]));
    assert_eq!(pings(5, &bench, &some, [SERVER.to_string(), OTHER.to_string()]), ["1", "0"]);
    // It may be answered all the same.
    assert_eq!(bench.world().host.get((denied.address(), 80), "id"), id(&denied));
    bench.end();
}

#[test]
fn n1_forks_of_one_net_reach_each_other_and_nobody_else_does() {
    let (bench, template, _servers) = served();
    let blue = bench.fork(&template, &["-n", "2", "--net", "blue"]);
    let green = bench.fork_one(&template, &["--net", "green"]);
    let alone = bench.fork_one(&template, &[]);
    let page_of = |fork: &Fork| format!("{}/id", fork.address());
    let pages = || [page_of(&blue[0]), page_of(&blue[1]), page_of(&green), page_of(&alone), page(SERVER)];
    let outside = || from_host(SERVER);
    assert_eq!(get(&bench, &blue[0], pages()), [id(&blue[0]), id(&blue[1]), None, None, outside()]);
    assert_eq!(get(&bench, &blue[1], pages()), [id(&blue[0]), id(&blue[1]), None, None, outside()]);
    assert_eq!(get(&bench, &green, pages()), [None, None, id(&green), None, outside()]);
    assert_eq!(get(&bench, &alone, pages()), [None, None, None, id(&alone), outside()]);
    let address = |fork: &Fork| fork.address().to_string();
    assert!(reaches_by_ping(&bench, &blue[0], [address(&blue[1]), SERVER.to_string()]));
    assert!(is_unheard_by_ping(&bench, &blue[0], [address(&green), address(&alone), HOST.to_string()]));
    assert!(is_unheard_by_ping(&bench, &alone, [address(&blue[0]), address(&green)]));
    // The net ends with its last fork.
    let nets = || std::fs::read_dir(bench.network_dir().join("nets")).unwrap().count();
    let _ = bench.offshoot(&["kill", blue[0].name()]).ok();
    assert_eq!((nets(), get(&bench, &blue[1], [page_of(&blue[0]), page_of(&blue[1])])), (2, [None, id(&blue[1])]));
    let _ = bench.offshoot(&["kill", blue[1].name()]).ok();
    assert_eq!(nets(), 1);
    bench.end();
}

#[test]
fn n1_a_port_leads_to_its_fork_and_its_rules_vanish_with_it() {
    let (bench, template, _servers) = served();
    let (host, outside) = (&bench.world().host, &bench.world().outside);
    let first = bench.fork_one(&template, &["-p", "8080:80", "--net", "blue", "--rate", "10M"]);
    let second = bench.fork_one(&template, &["-p", "8081:80"]);
    let pages = |port| [outside.get((HOST, port), "id"), host.get((Ipv4Addr::LOCALHOST, port), "id")];
    assert_eq!((pages(8080), pages(8081)), ([id(&first), id(&first)], [id(&second), id(&second)]));
    assert_eq!(pages(8082), [None, None]);
    // A port leads to one fork, also if that is asked for in another way.
    let fork = ["fork", template.tag.as_str()];
    bench.offshoot(&[&fork[..], &["-p", "8080:80"]].concat()).exits(1).refused("port_taken");
    bench.offshoot(&[&fork[..], &["-p", "8083:80", "-n", "2"]].concat()).exits(2).refused("one_port_many_forks");
    assert_eq!((bench.ls().len(), pages(8080)), (2, [id(&first), id(&first)]));

    let rules = || host.sh("nft list table inet offshoot");
    assert!(rules().contains("8080") && rules().contains(&first.address().to_string()));
    let _ = bench.offshoot(&["kill", first.name()]).ok();
    let left = rules();
    assert!(!left.contains("8080") && !left.contains(&first.address().to_string()), "{left}");
    assert!(left.contains("8081"), "the other fork's stay: {left}");
    assert_eq!((pages(8080), pages(8081)), ([None, None], [id(&second), id(&second)]));
    let parts = bench.network_parts();
    assert!(parts.iter().all(|part| !part.contains(&first.id()[..12])), "{parts:?}");
    assert!(parts.iter().any(|part| part.contains(&second.id()[..12])), "{parts:?}");
    bench.end();
}

#[test]
fn n1_a_fork_that_speaks_as_another_reaches_nobody() {
    let (bench, template, _servers) = served();
    let forks = bench.fork(&template, &["-n", "2"]);
    let server = || [page(SERVER)];
    // As a hostile root would: the other fork's card, then its address, then the template's card.
    let taken = [
        format!("ip link set eth0 address {}", forks[1].network("mac")),
        format!(
            "ip addr add {}/32 dev eth0; ip route change default via {} src {0}",
            forks[1].address(),
            forks[0].network("gateway")
        ),
        "ip link set eth0 address 02:6f:66:66:73:68".to_owned(),
    ];
    let own = format!(
        "ip link set eth0 address {}; ip addr del {}/32 dev eth0 2>/dev/null; \
        ip route replace {gateway} dev eth0; ip route replace default via {gateway}",
        forks[0].network("mac"),
        forks[1].address(),
        gateway = forks[0].network("gateway"),
    );
    for taken in &taken {
        assert_eq!(get(&bench, &forks[0], server()), [from_host(SERVER)], "before {taken}");
        let _ = bench.sh(&forks[0], taken);
        assert!(is_silent(&bench, &forks[0], server()), "{taken}");
        assert_eq!(get(&bench, &forks[1], server()), [from_host(SERVER)], "{taken}");
        let _ = bench.sh(&forks[0], &own);
        wait_until("its own name is good again", std::time::Duration::from_secs(20), || {
            get(&bench, &forks[0], server()) == [from_host(SERVER)]
        });
    }
    bench.end();
}
