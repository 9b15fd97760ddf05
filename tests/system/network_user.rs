//! Mode `user`: forks that a program without privileges connects, and what it can not keep is refused.

use std::time::Duration;

use offshoot_tests::{
    Bench, Fork, Kind, Server,
    bench::wait_until,
    processes, programs,
    world::{HOST, SERVER},
};

/// The process that connects a fork.
fn passt(fork: &Fork) -> u32 {
    let pid = fork.record["network"]["process"]["pid"].as_u64();
    u32::try_from(pid.unwrap_or_else(|| panic!("no process in {}", fork.record["network"]))).unwrap()
}

#[test]
fn n1_two_forks_without_privileges_reach_the_outside_and_are_reached_at_their_ports() {
    let _ = programs::distribution("passt", "passt");
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let _server = Server::http(&bench.world().outside);
    let user = ["--network", "user"];
    let first = bench.fork_one(&template, &[&user[..], &["-p", "8080:80"]].concat());
    let second = bench.fork_one(&template, &[&user[..], &["-p", "8081:80"]].concat());
    let outside = &bench.world().outside;
    for fork in [&first, &second] {
        assert_eq!((fork.network("mode"), fork.network("way")), ("user", "channel"));
        let own = bench.sh(fork, "cat /sys/class/net/eth0/address; ip -4 addr show dev eth0");
        assert!(own.starts_with(fork.network("mac")) && own.contains(fork.network("ipv4")), "{own}");
        // Debian 12's passt forgets some connections that the guest has half closed: seen on a busy host, the guest then waits in FIN_WAIT2
        // for an answer that passt has no socket for any more. So it is asked again.
        let asked = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 10 nc {SERVER} 80 | tail -n 1");
        wait_until("the server's answer", Duration::from_secs(60), || {
            bench.sh(fork, &asked) == format!("{SERVER} {HOST}")
        });
        assert!(processes::is_alive(passt(fork)));
    }
    assert_ne!(first.network("mac"), second.network("mac"));
    assert_eq!(outside.get((HOST, 8080), "id").as_deref(), Some(first.id()));
    assert_eq!(outside.get((HOST, 8081), "id").as_deref(), Some(second.id()));
    assert_eq!(outside.get((HOST, 8082), "id"), None);

    // It ends with its fork, and only that.
    let _ = bench.offshoot(&["kill", first.name()]).ok();
    wait_until("the program's end", Duration::from_secs(20), || !processes::is_alive(passt(&first)));
    assert_eq!(outside.get((HOST, 8080), "id"), None);
    assert_eq!(outside.get((HOST, 8081), "id").as_deref(), Some(second.id()));
    // However its fork ends.
    processes::kill(second.pid());
    wait_until("the program's end", Duration::from_secs(20), || !processes::is_alive(passt(&second)));
    bench.end();
}

#[test]
fn n1_what_the_mode_user_can_not_keep_is_refused_and_so_is_a_taken_port() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let fork = ["fork", template.tag.as_str(), "--network"];
    for option in [["--egress", "deny"], ["--egress", "203.0.113.0/24"], ["--net", "blue"], ["--rate", "10M"]] {
        bench.offshoot(&[&fork[..], &["user"], &option].concat()).exits(2).refused("needs_tap");
        bench.offshoot(&[&fork[..], &["none"], &option].concat()).exits(2).refused("no_network");
    }
    let _server = Server::http(&bench.world().host);
    bench.offshoot(&[&fork[..], &["user", "-p", "80:80"]].concat()).exits(1).refused("port_taken");
    bench.offshoot(&[&fork[..], &["carrier-pigeon"]].concat()).exits(2).refused("invalid_value");
    bench.assert_empty();
    bench.end();
}

/// Programs that connect forks of this host.
fn connectors(bench: &Bench) -> String {
    bench.world().host.sh("own=$(readlink /proc/self/ns/net)
        for process in /proc/[0-9]*; do
            case $(cat $process/comm 2>/dev/null) in
                passt*) [ \"$(readlink $process/ns/net)\" != \"$own\" ] || echo $process ;;
            esac
        done")
}

#[test]
fn o2_o3_a_fork_without_privileges_that_fails_or_is_killed_leaves_no_program() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let fork = ["fork", template.tag.as_str(), "--network", "user", "-p", "8080:80"];
    for step in ["handoff.network.prepared", "handoff.network.written", "handoff.network.arrived", "fork.acked"] {
        bench.offshoot_with_fault(&format!("{step}:error"), &fork).refused("state_failed");
        wait_until("the program's end", Duration::from_secs(20), || connectors(&bench).is_empty());
        bench.assert_empty();
        let killed = bench.offshoot_with_fault(&format!("{step}:kill"), &fork);
        assert_eq!(killed.code, None, "{step}: {killed}");
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        wait_until("the program's end", Duration::from_secs(20), || connectors(&bench).is_empty());
        bench.assert_empty();
    }
    // The check can fail: it sees that of a fork that lives.
    let alive = bench.fork_one(&template, &fork[2..]);
    assert_eq!(connectors(&bench).trim_end(), format!("/proc/{}", passt(&alive)));
    bench.end();
}
