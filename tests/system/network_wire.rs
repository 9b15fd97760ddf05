//! N3: what forks' cards and wires carry, from before they run. Nothing of their template, and nothing before they have answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use offshoot_tests::{Bench, Capture, Fork, Kind, Template, bench::wait_until, capture::Frame, world::SERVER};
use tempfile::NamedTempFile;

use crate::{
    network_acks::{PLUGGED, PULLED},
    pool::{pool, spares},
    rehearsal::rehearses,
};

/// Of every template's card: 02 and `offsh`, with which every ack begins too. So what datagrams say is left out when it is looked for.
const TEMPLATE_MAC: [u8; 6] = [0x02, 0x6f, 0x66, 0x66, 0x73, 0x68];
/// The end of the group of its link-local address (RFC 4291, 2.7.1), which the kernel makes of that.
const TEMPLATE_GROUP: [u8; 4] = [0xff, 0x66, 0x73, 0x68];
/// An address that the template had while it was warmed.
const TEMPLATE_ADDRESS: [u8; 4] = [192, 0, 2, 77];
const GATEWAY_MAC: &str = "0e:6f:66:00:00:01";
const ACK_PORT: u16 = 28518;
const PATIENCE: Duration = Duration::from_secs(60);
/// What the workload says to the server, again and again, as soon as it runs.
const SAID: &[u8] = b"a workload that can not wait";
const SAID_TO: u16 = 9;

/// What is wrong with a frame that was seen in a fork's namespace, or on its wire.
fn wrong(frame: &Frame, mac: &str, own: &BTreeSet<IpAddr>) -> Option<&'static str> {
    let is_own = |address: Option<IpAddr>| address.is_some_and(|address| own.contains(&address));
    // What a card, or the host's end of a wire, says of the groups that it is in: nobody's.
    let is_nobodys = frame.source().is_some_and(|source| source == Ipv6Addr::UNSPECIFIED);
    if frame.contains(&TEMPLATE_MAC) {
        Some("the template's card")
    } else if frame.contains(&TEMPLATE_GROUP) {
        Some("a group of the template's")
    } else if frame.contains(&TEMPLATE_ADDRESS) {
        Some("the template's address")
    } else if frame.is_on_wire() {
        let is_its = is_nobodys || is_own(frame.source()) || is_own(frame.destination());
        (!is_its).then_some("another address on the wire")
    } else if frame.mac() == mac {
        (!is_nobodys && !is_own(frame.source())).then_some("another address from its card")
    } else {
        (frame.mac() != GATEWAY_MAC).then_some("another card")
    }
}

fn own(fork: &Fork) -> BTreeSet<IpAddr> {
    let of = |field: &str| fork.record["network"][field].as_str().map(|text| text.parse().unwrap());
    ["ipv4", "ipv6"].into_iter().filter_map(of).collect()
}

fn is_said(frame: &Frame) -> bool {
    frame.datagram_to(SAID_TO) == Some(SAID)
}

/// What the workload said, and what left its namespace.
fn said(frames: &[Frame]) -> (usize, usize) {
    let said = |on_wire| frames.iter().filter(|frame| is_said(frame) && frame.is_on_wire() == on_wire).count();
    (said(false), said(true))
}

/// A workload's orders.
fn orders() -> (NamedTempFile, String) {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{SERVER} {SAID_TO} {}\n", String::from_utf8_lossy(SAID))).unwrap();
    let option = format!("/etc/say=@{}", file.path().display());
    (file, option)
}

/// Eight spares, watched from before they are forks.
fn watched(bench: &Bench, template: &Template) -> BTreeMap<String, Capture> {
    assert_eq!(pool(bench, template, 8), 8);
    let spares = spares(bench);
    let ids = spares.iter().map(|spare| spare.trim_start_matches(".spare-"));
    ids.map(|id| (id.to_owned(), Capture::start(&bench.place_of(id)))).collect()
}

/// All that was seen of these forks is their own, and the first of it is that they say who they are.
fn are_themselves(forks: &[Fork], captures: &BTreeMap<String, Capture>, host: &Capture) {
    assert_eq!(forks.len(), captures.len());
    for fork in forks {
        let (capture, own, mac) = (&captures[fork.id()], own(fork), fork.network("mac"));
        let is_its = |frame: &Frame| frame.source().is_some_and(|source| own.contains(&source));
        let is_out = |frame: &Frame| frame.is_on_wire() && is_said(frame) && is_its(frame);
        wait_until("what the fork says", PATIENCE, || capture.any(is_out) && host.any(is_out));
        let frames = capture.frames();
        for frame in &frames {
            assert_eq!(wrong(frame, mac, &own), None, "{}: {frame:02x?}", fork.name());
        }
        // ARP: it announces itself before it says anything else.
        let announced = frames.iter().position(|frame| frame.mac() == mac && is_its(frame)).unwrap();
        assert_eq!(frames[announced].0[12..14], [8, 6], "{:02x?}", frames[announced]);
        assert!(frames.iter().position(|frame| frame.is_on_wire() && is_its(frame)).unwrap() > announced);
    }
    let all: BTreeSet<IpAddr> = forks.iter().flat_map(own).collect();
    for frame in host.frames().iter().filter(|frame| frame.is_on_wire()) {
        assert_eq!(wrong(frame, "", &all), None, "{frame:02x?}");
    }
}

/// How many frames a spare's card has sent so far.
fn sent(bench: &Bench, id: &str) -> u64 {
    let counters = bench.place_of(id).sh("cat /proc/net/dev");
    let of_tap = counters.lines().find_map(|line| line.trim_start().strip_prefix("tap0:")).unwrap();
    of_tap.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn n3_no_frame_of_eight_forks_is_ever_their_templates() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let host = Capture::start(&bench.world().host);
    let captures = watched(&bench, &template);
    // They have spoken, if they have rehearsed, and nothing of it has left their namespaces.
    let spoken = captures.keys().filter(|id| sent(&bench, id) > 0).count();
    assert_eq!(spoken, if rehearses(&template) { captures.len() } else { 0 });
    let rehearsals = host.frames();
    let (_file, option) = orders();
    let forks = bench.fork(&template, &["-n", "8", "--file", &option, "--network-timeout-ms", "30000"]);
    assert_eq!(forks.iter().map(Fork::id).collect::<BTreeSet<_>>(), captures.keys().map(String::as_str).collect());
    are_themselves(&forks, &captures, &host);
    let is_a_forks = |frame: &&Frame| forks.iter().flat_map(own).any(|address| frame.source() == Some(address));
    assert_eq!(rehearsals.iter().find(is_a_forks), None, "before they were forks");
    assert!(host.frames().iter().any(|frame| is_a_forks(&frame)), "the check can fail");

    // The check can fail: it knows another's frame, and the template's.
    let (mac, own_of) = (forks[0].network("mac"), own(&forks[0]));
    let frame =
        captures[forks[0].id()].frames().into_iter().find(|frame| frame.mac() == mac && is_said(frame)).unwrap();
    assert_eq!(wrong(&frame, forks[1].network("mac"), &own(&forks[1])), Some("another card"));
    assert_eq!(wrong(&frame, mac, &own(&forks[1])), Some("another address from its card"));
    let mut forged = frame.clone();
    forged.0[6..12].copy_from_slice(&TEMPLATE_MAC);
    assert_eq!(wrong(&forged, mac, &own_of), Some("the template's card"));
    let mut forged = frame;
    forged.0[26..30].copy_from_slice(&TEMPLATE_ADDRESS);
    assert_eq!(wrong(&forged, mac, &own_of), Some("the template's address"));
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}

#[test]
fn n3_nothing_leaves_eight_forks_that_run_until_their_acks_have_come() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let host = Capture::start(&bench.world().host);
    let captures = watched(&bench, &template);
    for id in captures.keys() {
        bench.place_of(id).sh(PULLED);
    }
    let (_file, option) = orders();
    let args = ["-n", "8", "--file", &option, "--wait-network=false", "--network-timeout-ms", "30000"];
    let forks = bench.fork(&template, &args);
    // Their workloads run and speak; their acks are sent, and lost.
    for fork in &forks {
        let capture = &captures[fork.id()];
        wait_until("what a closed fork says", PATIENCE, || {
            capture.any(|frame| frame.datagram_to(ACK_PORT).is_some()) && said(&capture.frames()).0 >= 5
        });
    }
    for fork in &forks {
        assert_eq!(fork.network("state"), "waiting");
        assert_eq!(said(&captures[fork.id()].frames()).1, 0, "{} is closed", fork.name());
    }
    assert!(!host.any(|frame| frame.is_on_wire() && is_said(frame)));
    for fork in &forks {
        bench.place_of(fork.id()).sh(PLUGGED);
    }
    // The check can fail: when the acks come, so does the rest.
    are_themselves(&forks, &captures, &host);
    for fork in &forks {
        let network = bench.offshoot(&["inspect", fork.name()]).ok().json()["network"].clone();
        assert_eq!(network["state"], "acknowledged", "{network}");
    }
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}
