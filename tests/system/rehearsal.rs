//! Spares that have rehearsed: the forks made of them are themselves, and nothing of the rehearsal is to be seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use offshoot_tests::{Bench, Fork, Kind, Template, bench::wait_until};
use serde_json::Value;

use crate::pool::{is_from_pool, pool, spares};

/// What only a guest in a rehearsal is called: the beginning of its names, and of its ids.
const TRACES: [&str; 2] = ["rehearsal-", "0ff50ff5"];
/// Everything that an identity changes, as a workload sees it. (Busybox's `ip` prints how long ago a neighbour was used.)
const SHOW: &str = "hostname; cat /etc/hostname /etc/hosts /etc/machine-id /etc/resolv.conf /proc/sys/kernel/random/boot_id; \
    cd /run/offshoot; find . | sort; for file in $(find . -type f | sort); do echo \"$file: $(cat $file)\"; done; env | sort; \
    ip address; ip route; ip -6 route; ip maddress; cat /proc/net/arp; ip neigh | sed 's/used.*probes 0//'";

/// Whether spares of this template rehearse: those of the engine `kvm` do not.
pub(crate) fn rehearses(template: &Template) -> bool {
    let with_qemu = template.manifest["engine"]["name"] == "qemu";
    assert_eq!(template.manifest["rehearses"], true, "every guest of this build can");
    with_qemu
}

/// How many spares have rehearsed.
pub(crate) fn rehearsed(bench: &Bench) -> u64 {
    let pools = bench.offshoot(&["pool"]).ok().json();
    pools["pools"].as_array().unwrap().iter().map(|pool| pool["rehearsed"].as_u64().unwrap()).sum()
}

fn pool_with(bench: &Bench, template: &Template, size: usize, network: &str) {
    let _ = bench.offshoot(&["pool", &template.tag, &size.to_string(), "--network", network]).ok();
    assert_eq!(spares(bench).len(), size);
    assert_eq!(rehearsed(bench), if rehearses(template) { size as u64 } else { 0 });
}

/// What a fork shows, with a word in place of each thing that is its own.
fn shown(bench: &Bench, fork: &Fork) -> String {
    let mut text = bench.sh(fork, SHOW);
    let network = |field: &str| fork.record["network"][field].as_str().map(str::to_owned);
    let octets = network("ipv6").and_then(|address| address.rsplit_once(':').map(|(_, end)| end.to_owned()));
    // Of the group of its neighbours' questions: three bytes of its address.
    let group = octets.map(|end| format!("ff{:0>6}", &end[end.len().saturating_sub(6)..]));
    let own = [
        ("ID", Some(fork.id().to_owned())),
        ("MACHINE", Some(fork.text("machine_id").to_owned())),
        ("BOOT", Some(fork.text("boot_id").to_owned())),
        ("IPV6", network("ipv6")),
        ("IPV4", network("ipv4")),
        ("MAC", network("mac")),
        ("GROUP", group),
        ("NAME", Some(fork.name().to_owned())),
    ];
    for (word, value) in own {
        if let Some(value) = value {
            text = text.replace(&value, word);
        }
    }
    text.lines().filter(|line| !line.contains("ff02::1:ff")).fold(String::new(), |all, line| all + line + "\n")
}

fn traces(text: &str) -> Vec<&'static str> {
    TRACES.into_iter().filter(|trace| text.contains(trace)).collect()
}

fn template_files(template: &Template) -> BTreeMap<&'static str, Vec<u8>> {
    ["memory.img", "state.bin", "root.img", "manifest.json"]
        .map(|name| (name, fs::read(template.dir().join(name)).unwrap()))
        .into()
}

#[test]
fn i1_forks_that_have_rehearsed_are_themselves_and_show_nothing_of_it() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Busybox);
    let before = template_files(&template);
    for network in ["none", "tap"] {
        // One that has not rehearsed, to compare with.
        let fresh = bench.fork_one(&template, &["--name", "q3", "--network", network]);
        assert!(!is_from_pool(&fresh));
        pool_with(&bench, &template, 2, network);
        // Names as short as can be: what a rehearsal's long ones had left would be behind them.
        let forks: Vec<Fork> =
            ["q1", "q2"].map(|name| bench.fork_one(&template, &["--name", name, "--network", network])).into();
        let expected = shown(&bench, &fresh);
        for fork in &forks {
            assert!(is_from_pool(fork));
            assert_eq!(bench.sh(fork, "cat /etc/hostname"), fork.name());
            let identity = bench.sh(fork, "cat /run/offshoot/identity.json");
            assert_eq!(serde_json::from_str::<Value>(&identity).unwrap()["machine_id"], fork.text("machine_id"));
            assert_eq!(shown(&bench, fork), expected, "{network}");
            assert_eq!(traces(&bench.sh(fork, SHOW)), Vec::<&str>::new(), "{network}");
            let searched = "grep -rlE 'rehearsal-|0ff50ff5' /etc /run /tmp /dev/shm /var 2>/dev/null; true";
            assert_eq!(bench.sh(fork, searched), "", "{network}");
        }
        let all: Vec<&Fork> = forks.iter().chain([&fresh]).collect();
        let distinct = |values: Vec<String>| values.into_iter().collect::<BTreeSet<_>>().len();
        let random = |fork: &&Fork| bench.sh(fork, "head -c 16 /dev/urandom | od -An -tx1");
        assert_eq!(distinct(all.iter().map(random).collect()), 3);
        let facts = &template.manifest["facts"];
        for field in ["id", "hostname", "machine_id", "boot_id"] {
            let of = |fork: &&Fork| fork.text(field).to_owned();
            let templates = facts[field].as_str().unwrap_or_default().trim().to_owned();
            assert_eq!(distinct(all.iter().map(of).chain([templates]).collect()), 4, "{network}: {field}");
        }
        // The check can fail: it finds a trace, and whatever else is different.
        let _ = bench.sh(&forks[0], "echo rehearsal-of-a-fork >> /etc/hosts");
        assert_eq!(traces(&bench.sh(&forks[0], SHOW)), ["rehearsal-"]);
        assert_ne!(shown(&bench, &forks[0]), expected);
        assert_eq!(pool(&bench, &template, 0), 0);
        let _ = bench.offshoot(&["kill", "--all"]).ok();
    }
    // I2: the guests of four rehearsals have written to memory of their own.
    assert!(before == template_files(&template), "the template is as it was");
    bench.end();
}

/// The template with another answer to whether its guest can rehearse.
fn that_says(template: &Template, rehearses: bool) {
    let mut manifest = template.manifest.clone();
    if rehearses {
        manifest["rehearses"] = true.into();
    } else {
        let _ = manifest.as_object_mut().unwrap().remove("rehearses");
    }
    let (path, new) = (template.dir().join("manifest.json"), template.dir().join("manifest.new"));
    // By a rename: the file may be a link.
    fs::write(&new, serde_json::to_vec(&manifest).unwrap()).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn a_template_of_before_has_spares_that_have_not_rehearsed() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    that_says(&template, false);
    assert_eq!((pool(&bench, &template, 2), rehearsed(&bench)), (2, 0));
    let forks = bench.fork(&template, &["-n", "2"]);
    assert!(forks.iter().all(is_from_pool));
    assert_eq!(forks.iter().map(|fork| bench.sh(fork, "cat /etc/machine-id")).collect::<BTreeSet<_>>().len(), 2);
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}

#[test]
fn a_guest_that_can_not_rehearse_is_a_typed_error_and_leaves_nothing() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::WatchedWithoutFreeze);
    assert_eq!(template.manifest["rehearses"], Value::Null, "its workload would see it");
    if template.manifest["engine"]["name"] != "qemu" {
        return bench.end();
    }
    that_says(&template, true);
    let run = bench.offshoot(&["pool", &template.tag, "1"]).exits(1);
    run.refused("rehearsal_failed");
    assert_eq!(bench.entries("forks"), Vec::<String>::new());
    // Forks need no spares.
    let forks = bench.fork(&template, &["-n", "2"]);
    wait_until("they run", Duration::from_secs(20), || {
        forks.iter().all(|fork| bench.sh(fork, "hostname") == fork.text("hostname"))
    });
    let _ = bench.offshoot(&["pool", &template.tag, "0"]).ok();
    bench.end();
}
