//! O2, O3: whatever step of making a fork's network fails, nothing of it is left; after a kill `cleanup` leaves nothing.
//!
//! The steps are read from the source, so that a new one is tested as well.

use std::{collections::BTreeSet, fs};

use offshoot_tests::{Bench, Fork, Kind, Run, Server, Template, programs, world::SERVER};

use crate::{
    pool::pool,
    recovery::{own_leftovers, says_what_to_do},
};

/// Every step of a handoff and of a link.
fn steps() -> Vec<String> {
    let handoffs = fs::read_to_string(programs::source().join("crates/host/src/handoff/mod.rs")).unwrap();
    let ends = handoffs.split("point(handoff.name(), \"").skip(1).map(|rest| rest.split('"').next().unwrap());
    let handoff = |end: &str| ["network", "identity", "mailboxes"].map(|name| format!("handoff.{name}.{end}"));
    let mut steps: Vec<String> = ends.flat_map(handoff).collect();
    steps.extend(link_steps());
    steps
}

fn link_steps() -> Vec<String> {
    let net = fs::read_to_string(programs::source().join("crates/net/src/fault.rs")).unwrap();
    let list = net.split("STEPS: [").nth(1).unwrap().split("];").next().unwrap();
    list.split('"').filter(|text| text.starts_with("net.")).map(ToOwned::to_owned).collect()
}

/// A fork with all the parts that a network can have, and what was there before it.
struct Neighbour<'a> {
    bench: &'a Bench,
    fork: Fork,
    parts: BTreeSet<String>,
    rules: String,
    _server: Server,
}

impl<'a> Neighbour<'a> {
    fn new(bench: &'a Bench, template: &Template) -> Self {
        let server = Server::http(&bench.world().outside);
        let fork = bench.fork_one(template, &["--name", "neighbour", "--net", "blue", "-p", "8080:80"]);
        let mut neighbour = Self { bench, fork, parts: BTreeSet::new(), rules: String::new(), _server: server };
        (neighbour.parts, neighbour.rules) = (neighbour.parts(), neighbour.rules());
        assert!(neighbour.parts.len() >= 5 && neighbour.rules.contains("8080"), "{:?}", neighbour.parts);
        neighbour
    }

    fn parts(&self) -> BTreeSet<String> {
        // A link's index is no part of it.
        let parts = self.bench.network_parts().into_iter();
        parts.map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()).to_owned()).collect()
    }

    fn rules(&self) -> String {
        self.bench.world().host.sh("nft list table inet offshoot")
    }

    /// It is well, and nothing but it is there.
    #[track_caller]
    fn is_alone(&self, point: &str) {
        assert_eq!(self.bench.entries("forks"), [self.fork.id()], "{point}");
        assert_eq!(self.bench.entries("names"), ["neighbour"], "{point}");
        assert_eq!(own_leftovers(self.bench), Vec::<String>::new(), "{point}");
        assert_eq!(self.parts(), self.parts, "{point}");
        assert_eq!(self.rules(), self.rules, "{point}");
    }

    #[track_caller]
    fn is_connected(&self) {
        let (host, outside) = (&self.bench.world().host, &self.bench.world().outside);
        let id = Some(self.fork.id().to_owned());
        assert_eq!(outside.get((offshoot_tests::world::HOST, 8080), "id"), id);
        assert_eq!(host.get((self.fork.address(), 80), "id"), id);
        let asked = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 30 nc -w 10 {SERVER} 80 | tail -n 1");
        assert_eq!(self.bench.sh(&self.fork, &asked), format!("{SERVER} {}", offshoot_tests::world::HOST));
    }
}

/// What is asked of forks that fail: everything that there is to make.
const ALL: [&str; 6] = ["--net", "green", "-p", "8081:80", "--rate", "10M"];

#[test]
fn the_steps_are_found() {
    assert_eq!(steps().iter().filter(|step| step.starts_with("handoff.")).count(), 9);
    assert!(link_steps().len() >= 12, "{:?}", link_steps());
}

#[test]
fn o2_a_network_that_fails_at_any_step_leaves_nothing() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let neighbour = Neighbour::new(&bench, &template);
    let fork = [&["fork", template.tag.as_str(), "--name", "failing"], &ALL[..]].concat();
    for step in steps() {
        let run = bench.offshoot_with_fault(&format!("{step}:error"), &fork);
        let code = run.error()["code"].clone();
        assert!(["state_failed", "network_failed"].contains(&code.as_str().unwrap()), "{step}: {run}");
        says_what_to_do(&run);
        assert!(run.err().contains("fault injected"), "{step}: {run}");
        neighbour.is_alone(&step);
    }
    neighbour.is_connected();
    // The check can fail: without a fault there is more.
    let _ = bench.fork_one(&template, &ALL);
    assert_ne!((neighbour.parts(), neighbour.rules()), (neighbour.parts.clone(), neighbour.rules.clone()));
    bench.end();
}

#[test]
fn o3_cleanup_removes_the_network_that_a_killed_fork_left_and_nothing_else() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let neighbour = Neighbour::new(&bench, &template);
    let fork = [&["fork", template.tag.as_str(), "--name", "killed"], &ALL[..]].concat();
    let mut left = 0;
    for step in steps() {
        let run = bench.offshoot_with_fault(&format!("{step}:kill"), &fork);
        assert_eq!(run.code, None, "{step}: {run}");
        assert_eq!(own_leftovers(&bench).len(), 1, "{step}");
        left += usize::from(neighbour.parts() != neighbour.parts);
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        neighbour.is_alone(&step);
    }
    assert!(left >= 10, "after only {left} of them there was something of a network");
    neighbour.is_connected();
    bench.end();
}

#[test]
fn o2_o3_the_network_of_a_spare_that_fails_or_is_killed_leaves_nothing() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let neighbour = Neighbour::new(&bench, &template);
    let ahead: Vec<String> = link_steps()
        .into_iter()
        .filter(|step| !["net.shared", "net.rate", "net.opened"].contains(&step.as_str()))
        .collect();
    for step in ahead.iter().map(String::as_str).chain(["pool.network", "pool.kept"]) {
        let command = ["pool", template.tag.as_str(), "1"];
        let failed = bench.offshoot_with_fault(&format!("{step}:error"), &command);
        let code = failed.error()["code"].clone();
        assert!(["state_failed", "network_failed"].contains(&code.as_str().unwrap()), "{step}: {failed}");
        neighbour.is_alone(step);
        let killed: Run = bench.offshoot_with_fault(&format!("{step}:kill"), &command);
        assert_eq!(killed.code, None, "{step}: {killed}");
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        neighbour.is_alone(step);
    }
    // One that is ready goes with its pool.
    assert_eq!(pool(&bench, &template, 1), 1);
    assert_ne!(neighbour.parts(), neighbour.parts);
    assert_eq!(pool(&bench, &template, 0), 0);
    neighbour.is_alone("the pool's end");
    neighbour.is_connected();
    bench.end();
}
