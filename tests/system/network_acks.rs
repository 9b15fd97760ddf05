//! F9, I7: acknowledgements over the wire that are lost, late or forged. Which way it went is in the fork's report.

use std::{
    collections::BTreeMap,
    net::UdpSocket,
    process::{Child, Stdio},
    time::Duration,
};

use offshoot_tests::{Bench, Capture, Fork, Kind, Run, Template, bench::wait_until, capture::Frame, world::Place};
use serde_json::Value;

use crate::pool::{pool, spares};

pub(crate) const ACK_PORT: u16 = 28518;
const PATIENCE: Duration = Duration::from_secs(60);
/// Lets none of a fork's own acks in, as a host whose rules are wrong would. What a workload says comes from the port 9999.
pub(crate) const PULLED: &str = "nft 'add table inet pulled
    add chain inet pulled input { type filter hook input priority -10; }
    add rule inet pulled input iifname tap0 udp dport 28518 udp sport != 9999 drop'";
/// Lets them in again.
pub(crate) const PLUGGED: &str = "nft delete table inet pulled";

/// A spare and what can be seen of it.
struct Spare {
    id: String,
    place: Place,
    capture: Capture,
}

/// As many spares, with the leg pulled, and no other.
fn pulled(bench: &Bench, template: &Template, count: usize) -> Vec<Spare> {
    assert_eq!(pool(bench, template, count), count as u64);
    let spares = spares(bench).into_iter().map(|spare| {
        let id = spare.trim_start_matches(".spare-").to_owned();
        let place = bench.place_of(&id);
        place.sh(PULLED);
        Spare { capture: Capture::start(&place), id, place }
    });
    spares.collect()
}

impl Spare {
    fn acks(&self) -> Vec<Vec<u8>> {
        let frames = self.capture.frames();
        frames.iter().filter_map(|frame| frame.datagram_to(ACK_PORT)).map(<[u8]>::to_vec).collect()
    }

    /// How often the guest was given its network.
    fn announcements(&self) -> usize {
        // ARP, from the sender to itself.
        let is = |frame: &Frame| frame.0[12..14] == [8, 6] && frame.source() == frame.destination();
        self.capture.frames().iter().filter(|frame| is(frame)).count()
    }

    /// Whether the guest had to look for its gateway: who is given its network by the agent knows it.
    fn has_asked_for_the_gateway(&self) -> bool {
        self.capture.any(|frame| {
            frame.0[12..14] == [8, 6] && frame.source() != frame.destination() && frame.mac().starts_with("02:6f:")
        })
    }
}

fn start(bench: &Bench, args: &[&str]) -> Child {
    let mut command = bench.command(&[&["fork"], args].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn end(child: Child) -> Run {
    let output = child.wait_with_output().unwrap();
    Run { args: "fork".into(), code: output.status.code(), stdout: output.stdout, stderr: output.stderr }
}

fn by_id(made: &Value) -> BTreeMap<String, Fork> {
    let forks = made["forks"].as_array().unwrap().iter().map(|record| Fork { record: record.clone() });
    forks.map(|fork| (fork.id().to_owned(), fork)).collect()
}

#[test]
fn f9_a_late_ack_is_helped_along_and_the_report_says_how_and_without_one_the_fork_is_destroyed() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let spares = pulled(&bench, &template, 4);
    let [never, late, reconfigured, commands] = &spares[..] else { panic!("four spares") };
    let forking = start(&bench, &[&template.tag, "-n", "4", "--network-timeout-ms", "15000"]);
    let plug_when = |spare: &Spare, what: &str, is: &dyn Fn(&Spare) -> bool| {
        wait_until(what, PATIENCE, || is(spare));
        spare.place.sh(PLUGGED);
    };
    plug_when(late, "an ack that is lost", &|spare| spare.acks().len() >= 3);
    plug_when(reconfigured, "the second configuration", &|spare| spare.announcements() >= 2);
    plug_when(commands, "the third configuration", &Spare::has_asked_for_the_gateway);
    let run = end(forking);

    run.refused("network_ack_timeout");
    let made = run.json();
    assert_eq!(made["failed"].as_array().unwrap().len(), 1, "{run}");
    let text = made["failed"][0]["error"]["message"].as_str().unwrap();
    for part in ["15000 ms", "ReconfigureNetwork: done", "ip: done"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(never.acks().len() > 3, "it went on trying");
    let forks = by_id(&made);
    assert_eq!(forks.len(), 3);
    assert!(!forks.contains_key(&never.id));
    let parts = bench.network_parts();
    assert!(parts.iter().all(|part| !part.contains(&never.id[..12])), "{parts:?}");
    assert!(bench.entries("forks").iter().all(|name| !name.contains(&never.id)));

    for (spare, ways, steps) in [
        // On a busy host the first second may have been two.
        (late, &["datagram", "reconfigured"][..], 0),
        (reconfigured, &["reconfigured"], 1),
        (commands, &["commands"], 2),
    ] {
        let fork = &forks[&spare.id];
        let network = bench.offshoot(&["inspect", fork.name()]).ok().json()["network"].clone();
        assert_eq!(network["state"], "acknowledged");
        assert!(ways.contains(&network["way"].as_str().unwrap()), "{network}");
        let troubles = network["troubles"].as_array().map_or(&[][..], Vec::as_slice);
        let tried = troubles.iter().filter(|trouble| trouble.as_str().unwrap().contains("no ack came")).count();
        assert!(tried >= steps, "{network}");
        // Whichever way it went, it has all of its network.
        let own =
            bench.sh(fork, "cat /sys/class/net/eth0/address; ip addr show dev eth0; ping -c 1 -W 20 198.51.100.2");
        for field in ["mac", "ipv4", "ipv6"] {
            let value = network[field].as_str().unwrap_or_default();
            assert!(own.contains(value), "{} has no {field} {value}: {own}", network["way"]);
        }
    }
    // One that nothing was done to says so.
    assert_eq!(pool(&bench, &template, 0), 0);
    let plain = bench.fork_one(&template, &[]);
    assert_eq!(plain.network("way"), "datagram");
    bench.end();
}

#[test]
fn i7_a_forged_ack_never_counts_and_the_right_one_does() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let mut spares = pulled(&bench, &template, 2);
    // What another fork said in truth.
    let (of_another, spare) = (spares.remove(0), spares.remove(0));
    let other = start(&bench, &[&template.tag, "--network-timeout-ms", "30000"]);
    wait_until("another fork's ack", PATIENCE, || !of_another.acks().is_empty() || !spare.acks().is_empty());
    let (of_another, spare) = if spare.acks().is_empty() { (of_another, spare) } else { (spare, of_another) };
    let anothers = String::from_utf8(of_another.acks().remove(0)).unwrap();
    assert!(anothers.contains(&of_another.id));

    let record = std::fs::read(bench.network_dir().join("links").join(format!("{}.json", spare.id))).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    let gateway = record["addresses"]["gateway_v4"].as_str().unwrap_or_else(|| panic!("no gateway in {record}"));
    let hmac = anothers.split_once(" hmac=").unwrap().1;
    let line = |mailbox: &str, fork: &str, hmac: &str| {
        format!("offshoot-ack v=1 stage=applied mailbox={mailbox} fork={fork} hmac={hmac}")
    };
    let own = "offshoot:identity";
    let forged = [
        line(own, &spare.id, &"a".repeat(64)),
        line(own, &spare.id, hmac),
        line("foobar", &spare.id, hmac),
        line(own, &"0".repeat(20), hmac),
        anothers.replace(&of_another.id, &spare.id),
        anothers,
        "offshoot-ack v=1".into(),
    ];
    let said = tempfile::NamedTempFile::new().unwrap();
    let lines: Vec<String> = forged.iter().map(|line| format!("{gateway} {ACK_PORT} {line}\n")).collect();
    std::fs::write(said.path(), lines.concat()).unwrap();
    let file = format!("/etc/say=@{}", said.path().display());
    // It takes the other spare, as long as the first fork is not made and the pool has no third.
    let mut forking = start(&bench, &[&template.tag, "--file", &file, "--network-timeout-ms", "30000"]);
    wait_until("the second fork", PATIENCE, || !spare.acks().is_empty());
    of_another.place.sh(PLUGGED);
    let _ = end(other).ok();

    let is_forged = |ack: &Vec<u8>| forged.iter().any(|forged| forged.as_bytes() == ack);
    wait_until("forged acks", PATIENCE, || {
        let acks = spare.acks();
        forged.iter().all(|forged| acks.iter().filter(|ack| *ack == forged.as_bytes()).count() >= 3)
    });
    // The right one, to the letter, from another address than the fork's.
    wait_until("the right ack", PATIENCE, || spare.acks().iter().any(|ack| !is_forged(ack)));
    let right = spare.acks().into_iter().find(|ack| !is_forged(ack)).unwrap();
    assert!(String::from_utf8_lossy(&right).contains(&spare.id));
    spare.place.sh("ip link set lo up
        nft insert rule inet offshoot output oifname lo accept
        nft insert rule inet offshoot input iifname lo accept");
    let sender = spare.place.within(|| UdpSocket::bind((gateway, 0))).unwrap();
    for _ in 0..3 {
        sender.send_to(&right, (gateway, ACK_PORT)).unwrap();
    }
    // All of it was taken and judged.
    wait_until("an empty queue", PATIENCE, || {
        spare
            .place
            .sh("cat /proc/thread-self/net/udp")
            .lines()
            .any(|line| line.contains(":6F66 ") && line.contains(" 00000000:00000000 "))
    });
    assert_eq!(forking.try_wait().unwrap(), None, "a forged ack was taken for the fork's");
    spare.place.sh(PLUGGED);
    let made = end(forking).ok().json();
    let fork = &by_id(&made)[&spare.id];
    assert_eq!(fork.record["network"]["state"], "acknowledged");
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}
