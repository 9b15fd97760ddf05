//! N3: what forks' cards and wires carry, from before they run. Nothing of their template, and nothing before they have answered.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    process::{Child, Stdio},
    time::Duration,
};

use offshoot_tests::{Bench, Capture, Fork, Kind, bench::wait_until, capture::Frame, world::SERVER};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::pool::{pool, spares};

/// Of every template's card.
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

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// What left a namespace: on its wire, from these addresses.
fn left(frames: &[Frame]) -> usize {
    frames.iter().filter(|frame| frame.is_on_wire() && is_said(frame)).count()
}

#[test]
fn n3_nothing_leaves_eight_forks_before_they_have_answered_and_nothing_ever_as_their_template() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    assert_eq!(pool(&bench, &template, 8), 8);
    let ids: Vec<String> = spares(&bench).iter().map(|spare| spare.trim_start_matches(".spare-").to_owned()).collect();
    let captures: Vec<(&String, Capture)> = ids.iter().map(|id| (id, Capture::start(&bench.place_of(id)))).collect();
    let host = Capture::start(&bench.world().host);

    let said = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(said.path(), format!("{SERVER} {SAID_TO} {}\n", String::from_utf8_lossy(SAID))).unwrap();
    let file = format!("/etc/say=@{}", said.path().display());
    let mut fork = bench.command(&["fork", &template.tag, "-n", "8", "--file", &file, "--network-timeout-ms", "30000"]);
    let forking = fork.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();

    // A fork announces itself before its workload runs, and answers after. From here on nobody hears the answer.
    let seen = |is: fn(&Frame) -> bool| captures.iter().filter(|(_, capture)| capture.any(is)).count();
    wait_until("the first announcement", PATIENCE, || seen(|frame| !frame.is_on_wire()) > 0);
    signal(&forking, Signal::STOP);
    wait_until("what a workload says", PATIENCE, || {
        captures.iter().any(|(_, capture)| {
            let frames = capture.frames();
            left(&frames) == 0 && frames.iter().filter(|frame| is_said(frame)).count() >= 5
        })
    });
    let held: Vec<&String> = captures
        .iter()
        .filter(|(id, capture)| {
            let is_closed = !bench.place_of(id).sh("nft list chain inet offshoot forward").contains("accept");
            let frames = capture.frames();
            assert!(!is_closed || left(&frames) == 0, "{id} is closed, and something left it");
            is_closed && frames.iter().any(is_said)
        })
        .map(|(id, _)| *id)
        .collect();
    assert!(!held.is_empty(), "no fork was caught before its answer was heard");
    signal(&forking, Signal::CONT);

    let output = forking.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    let forks: Vec<Fork> =
        made["forks"].as_array().unwrap().iter().map(|record| Fork { record: record.clone() }).collect();
    assert_eq!(forks.iter().map(Fork::id).collect::<BTreeSet<_>>(), ids.iter().map(String::as_str).collect());
    // The capture sees what forks say in their own name, in their namespaces and on the host.
    for fork in &forks {
        let (_, capture) = captures.iter().find(|(id, _)| *id == fork.id()).unwrap();
        let own = own(fork);
        let is_its = |frame: &Frame| is_said(frame) && frame.source().is_some_and(|source| own.contains(&source));
        wait_until("what the fork says", PATIENCE, || {
            capture.any(|frame| frame.is_on_wire() && is_its(frame)) && host.any(is_its)
        });
        let frames = capture.frames();
        let mac = fork.network("mac");
        for frame in &frames {
            assert_eq!(wrong(frame, mac, &own), None, "{}: {frame:02x?}", fork.name());
        }
        let first = |is: &dyn Fn(&Frame) -> bool| frames.iter().position(is).unwrap();
        // ARP: it announces itself before it says anything else.
        let announced =
            first(&|frame| frame.mac() == mac && frame.source().is_some_and(|source| own.contains(&source)));
        assert_eq!(frames[announced].0[12..14], [8, 6], "{:02x?}", frames[announced]);
        assert!(frames.iter().any(|frame| frame.datagram_to(ACK_PORT).is_some()));
        assert!(first(&|frame| frame.is_on_wire() && is_its(frame)) > announced);
    }
    let all: BTreeSet<IpAddr> = forks.iter().flat_map(own).collect();
    for frame in host.frames().iter().filter(|frame| frame.is_on_wire()) {
        assert_eq!(wrong(frame, "", &all), None, "{frame:02x?}");
    }

    // The check can fail: it knows another's frame, and the template's.
    let frame = |capture: &Capture| capture.frames().into_iter().find(|frame| frame.mac() == forks[0].network("mac"));
    let frame = frame(&captures.iter().find(|(id, _)| *id == forks[0].id()).unwrap().1).unwrap();
    assert_eq!(wrong(&frame, forks[1].network("mac"), &own(&forks[1])), Some("another card"));
    let mut forged = frame.clone();
    forged.0[6..12].copy_from_slice(&TEMPLATE_MAC);
    assert_eq!(wrong(&forged, forks[0].network("mac"), &own(&forks[0])), Some("the template's card"));
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}
