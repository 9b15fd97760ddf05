//! Addresses: leased once, whoever asks at the same time, and no two forks have one.

use std::{collections::BTreeSet, thread};

use offshoot_tests::{Bench, Fork, Kind, Template, world::World};

/// Forks of several commands at once.
fn at_once(bench: &Bench, template: &Template, commands: usize, each: usize) -> Vec<Fork> {
    let count = each.to_string();
    thread::scope(|scope| {
        let make = || bench.fork(template, &["-n", &count]);
        let all: Vec<_> = (0..commands).map(|_| scope.spawn(make)).collect();
        all.into_iter().flat_map(|one| one.join().unwrap()).collect()
    })
}

/// The addresses, link-local ones and those of cards too, that more than one has of those who said what they have.
fn shared(seen: &[String]) -> BTreeSet<String> {
    let mut once = BTreeSet::new();
    let mut twice = BTreeSet::new();
    for seen in seen {
        let word = |line: &str| -> Option<String> {
            let mut words = line.split_whitespace();
            let address = match words.next()? {
                "inet" | "inet6" => words.next()?.split('/').next()?,
                card if card.split(':').count() == 6 => card,
                _ => return None,
            };
            Some(address.to_owned())
        };
        let own: BTreeSet<String> = seen.lines().filter_map(word).collect();
        assert!(own.len() >= 2, "{seen}");
        twice.extend(own.iter().filter(|address| once.contains(*address)).cloned());
        once.extend(own);
    }
    twice
}

#[test]
fn i11_of_32_forks_made_by_four_commands_at_once_no_two_share_an_address() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Busybox);
    let forks = at_once(&bench, &template, 4, 8);
    assert_eq!(forks.len(), 32);
    for field in ["mac", "ipv4", "ipv6"] {
        if field == "ipv6" && !World::has_v6() {
            continue;
        }
        let distinct: BTreeSet<&str> = forks.iter().map(|fork| fork.network(field)).collect();
        assert_eq!(distinct.len(), 32, "two forks share their {field}");
    }
    // Each has what its record says.
    let see = |fork: &Fork| bench.sh(fork, "cat /sys/class/net/eth0/address; ip addr show dev eth0");
    let mut seen: Vec<String> = thread::scope(|scope| {
        let halves: Vec<_> =
            forks.chunks(16).map(|half| scope.spawn(move || half.iter().map(see).collect::<Vec<_>>())).collect();
        halves.into_iter().flat_map(|half| half.join().unwrap()).collect()
    });
    for (fork, seen) in forks.iter().zip(&seen) {
        assert!(seen.starts_with(fork.network("mac")), "{}: {seen}", fork.name());
        assert!(seen.contains(&format!("inet {}/32", fork.address())), "{}: {seen}", fork.name());
        assert!(
            !World::has_v6() || seen.contains(&format!("inet6 {}/128", fork.network("ipv6"))),
            "{}: {seen}",
            fork.name()
        );
    }
    // No card searches for duplicates: it would delay the fork's first packet, and find nobody, because each is alone with its gateway on
    // its link. What the search would be for is seen from outside: what all cards have is compared, and the host has one way to each.
    assert_eq!(shared(&seen), BTreeSet::new());
    let gateway = forks[0].network("gateway");
    assert!(seen.iter().all(|seen| !seen.contains(&format!("inet {gateway}/"))), "one has its gateway's");
    let host = &bench.world().host;
    let ways = host.sh("ip -o route show; ip -6 -o route show");
    for fork in &forks {
        let wire = format!("ofs{}", &fork.id()[..12]);
        let addresses = if World::has_v6() { &["ipv4", "ipv6"][..] } else { &["ipv4"] };
        for address in addresses.iter().map(|field| fork.network(field)) {
            let to: Vec<_> = ways.lines().filter(|way| way.split_whitespace().next() == Some(address)).collect();
            assert!(matches!(to[..], [way] if way.contains(&format!("dev {wire}"))), "{}: {to:?}", fork.name());
        }
    }
    // The check can fail: one that takes another's.
    let _ = bench.sh(&forks[0], &format!("ip addr add {}/32 dev eth0", forks[1].address()));
    seen[0] = see(&forks[0]);
    assert_eq!(shared(&seen), [forks[1].address().to_string()].into());
    bench.end();
}

#[test]
fn o5_an_exhausted_pool_is_a_typed_error_and_the_forks_that_have_its_addresses_live() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Busybox);
    let fork = |pool: &str, args: &[&str]| {
        let mut command = bench.command(&[&["fork", template.tag.as_str()], args].concat());
        command.env("OFFSHOOT_NETWORK_POOL", pool);
        offshoot_tests::Run::of(command, &[])
    };
    // Four addresses: the network's, the gateway's, that of all, and one.
    let run = fork("10.99.0.0/30", &["-n", "2", "--name", "last"]);
    run.refused("addresses_exhausted");
    let made = run.json();
    assert_eq!((made["forks"].as_array().unwrap().len(), made["failed"].as_array().unwrap().len()), (1, 1), "{run}");
    let first = Fork { record: made["forks"][0].clone() };
    assert_eq!(first.network("ipv4"), "10.99.0.2");
    assert_eq!(bench.ls(), [(first.name().to_owned(), true)]);
    assert_eq!(bench.sh(&first, "ip addr show dev eth0 | grep -c 10.99.0.2/32"), "1");
    // It rests when it is given back: nobody takes it for its last holder.
    let _ = bench.offshoot(&["kill", first.name()]).ok();
    let resting = fork("10.99.0.0/30", &[]).exits(1).refused("addresses_exhausted");
    assert!(resting["message"].as_str().unwrap().contains("1 rest"), "{resting}");
    bench.assert_empty();
    // Another range has others.
    let other = fork("10.98.0.0/29", &[]).ok().json();
    assert!(other["forks"][0]["network"]["ipv4"].as_str().unwrap().starts_with("10.98.0."), "{other}");
    for wrong in ["10.99.0.0/31", "10.99.0.1/24", "127.0.0.0/8", "here"] {
        let refused = fork(wrong, &[]);
        assert_ne!(refused.code, Some(0), "{wrong}");
        assert!(refused.err().contains("OFFSHOOT_NETWORK_POOL"), "{refused}");
    }
    bench.end();
}
