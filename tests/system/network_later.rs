//! I7: `--wait-network=false`. A fork is there before its network is acknowledged; until then nothing passes, and what becomes of it is
//! in its report.

use std::time::Duration;

use offshoot_tests::{Bench, Fork, Kind, Server, Template, bench::wait_until, processes, world::SERVER};

use crate::{
    network_acks::{PLUGGED, PULLED},
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
    bench.place_of(late.id()).sh(PLUGGED);
    wait_until("the late ack", PATIENCE, || state(&bench, &late) == "acknowledged");
    assert!(reaches_the_server(&bench, &late, 20));

    let keep = ["--on-network-failure", "keep", "--network-timeout-ms", "3000"];
    let kept = unheard(&bench, &template, &keep);
    let killed = unheard(&bench, &template, &["--network-timeout-ms", "3000"]);
    wait_until("the end of the wait", PATIENCE, || state(&bench, &kept) == "failed");
    assert!(!reaches_the_server(&bench, &kept, 2));
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
