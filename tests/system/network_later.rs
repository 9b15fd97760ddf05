//! I7: `--wait-network=false`. A fork is there before its network is acknowledged; until then nothing passes, and what becomes of it is
//! in its report.

use std::{fs, path::Path, time::Duration};

use memchr::memmem;
use offshoot_tests::{Bench, Capture, Fork, Kind, Server, Template, bench::wait_until, processes, world::SERVER};

use crate::{
    network_acks::{ACK_PORT, PLUGGED, PULLED},
    pool::{pool, spares},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A fork whose acks do not arrive, and that nobody waits for.
fn unheard(bench: &Bench, template: &Template, args: &[&str]) -> Fork {
    assert_eq!(pool(bench, template, 1), 1);
    let id = spares(bench)[0].trim_start_matches(".spare-").to_owned();
    bench.place_of(&id).sh(PULLED);
    let fork = bench.fork_one(template, &[&["--wait-network=false"], args].concat());
    assert_eq!((fork.id(), fork.network("state")), (id.as_str(), "waiting"));
    fork
}

fn state(bench: &Bench, fork: &Fork) -> String {
    let network = bench.offshoot(&["inspect", fork.name()]).ok().json()["network"].clone();
    network["state"].as_str().unwrap_or_else(|| panic!("no state in {network}")).to_owned()
}

fn reaches_the_server(bench: &Bench, fork: &Fork, seconds: u8) -> bool {
    let ask =
        format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 30 nc -w {seconds} {SERVER} 80 | grep -c 200 || true");
    bench.sh(fork, &ask) == "1"
}

#[test]
fn i7_a_fork_that_nobody_waits_for_is_closed_until_it_acknowledges_and_then_open_kept_or_killed() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let _server = Server::http(&bench.world().outside);
    let late = unheard(&bench, &template, &["--network-timeout-ms", "30000"]);
    assert!(!reaches_the_server(&bench, &late, 2), "it is closed");
    // Whoever waits for it would find no machine.
    bench.offshoot(&["standby", late.name()]).exits(1).refused("fork_busy");
    bench.place_of(late.id()).sh(PLUGGED);
    wait_until("the late ack", PATIENCE, || state(&bench, &late) == "acknowledged");
    assert!(reaches_the_server(&bench, &late, 20));

    let keep = ["--on-network-failure", "keep", "--network-timeout-ms", "3000"];
    let kept = unheard(&bench, &template, &keep);
    let killed = unheard(&bench, &template, &["--network-timeout-ms", "3000"]);
    wait_until("the end of the wait", PATIENCE, || state(&bench, &kept) == "failed");
    // An ack that comes too late by one opens nothing.
    let place = bench.place_of(kept.id());
    place.sh(PLUGGED);
    let capture = Capture::start(&place);
    wait_until("an ack too late", PATIENCE, || capture.any(|frame| frame.datagram_to(ACK_PORT).is_some()));
    assert!(!reaches_the_server(&bench, &kept, 2));
    assert_eq!(state(&bench, &kept), "failed");
    wait_until("the fork's end", PATIENCE, || {
        let ls = bench.ls();
        !ls.iter().any(|(name, _)| name == killed.name()) && !processes::is_alive(killed.pid())
    });
    let parts = bench.network_parts();
    assert!(parts.iter().all(|part| !part.contains(&killed.id()[..12])), "{parts:?}");
    // One that is heard at once is open at once, and the first is not troubled by the others.
    assert_eq!(pool(&bench, &template, 0), 0);
    let heard = bench.fork_one(&template, &["--wait-network=false"]);
    wait_until("the ack", PATIENCE, || state(&bench, &heard) == "acknowledged");
    assert!(reaches_the_server(&bench, &heard, 20) && reaches_the_server(&bench, &late, 20));
    bench.end();
}

/// The processes that wait for networks of forks of this bench.
fn observers(bench: &Bench) -> Vec<u32> {
    let read = |pid: u32, file: &str| fs::read(Path::new("/proc").join(pid.to_string()).join(file)).unwrap_or_default();
    let state = bench.state().as_os_str().as_encoded_bytes();
    let waits = |pid: u32| memmem::find(&read(pid, "cmdline"), b"\0observe-network\0").is_some();
    let ours = |pid: u32| memmem::find(&read(pid, "environ"), state).is_some();
    processes::all().into_iter().filter(|&pid| waits(pid) && ours(pid) && processes::is_alive(pid)).collect()
}

#[test]
fn i7_a_fork_whose_observer_was_killed_has_failed_after_the_deadline_and_is_ended_by_who_comes_next() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let forks = [(); 2].map(|()| {
        let fork = unheard(&bench, &template, &["--network-timeout-ms", "8000"]);
        let observers = observers(&bench);
        assert_eq!(observers.len(), 1, "{observers:?}");
        observers.into_iter().for_each(processes::kill);
        assert_eq!(state(&bench, &fork), "waiting");
        let not_yet = bench.offshoot(&["cleanup"]).ok().out();
        assert!(!not_yet.contains(fork.id()), "{not_yet}");
        fork
    });
    let [used, cleaned] = &forks;
    for fork in &forks {
        wait_until("the deadline", PATIENCE, || state(&bench, fork) == "failed");
        assert!(processes::is_alive(fork.pid()), "nobody has come yet");
    }
    bench.offshoot(&["exec", used.name(), "--", "/bin/true"]).exits(125).refused("network_ack_timeout");
    assert!(!processes::is_alive(used.pid()));
    let plan = bench.offshoot(&["cleanup"]).ok().out();
    assert!(!plan.contains(used.id()) && plan.contains(cleaned.id()), "{plan}");
    let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
    assert!(!processes::is_alive(cleaned.pid()));
    assert_eq!(bench.ls(), []);
    let parts = bench.network_parts();
    let is_of = |part: &String, fork: &Fork| part.contains(&fork.id()[..12]);
    assert!(parts.iter().all(|part| !is_of(part, used) && !is_of(part, cleaned)), "{parts:?}");
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}
