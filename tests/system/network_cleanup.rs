//! O3: `doctor` and `cleanup` know what is offshoot's, by exact names and by what was written down, and see nothing else.

use std::{collections::BTreeSet, fs};

use offshoot_tests::{Bench, Kind, world::Place};
use serde_json::Value;

use crate::recovery::own_leftovers;

/// Things of other people, whose names are near ours.
const STRANGERS: &str = "ip link add ofs-br0 type bridge 2>/dev/null || ip link add ofs-br0 type veth
    ip link add ofs258736bef2aa type veth peer name ofs258736bef2ab
    ip link add ofs type veth peer name offshoot0
    ip tuntap add dev ofstap0 mode tap
    nft add table inet offshoot2
    nft add chain inet offshoot2 forward '{ type filter hook forward priority 10; }'
    nft add table ip offshoot
    nft add table inet offshoo";

/// What `doctor` says about the networks that there are.
fn networks(bench: &Bench) -> (String, Value) {
    let doctor = bench.offshoot(&["doctor"]).json();
    let finding = doctor["findings"].as_array().unwrap().iter().find(|finding| finding["name"] == "networks");
    let finding = finding.unwrap_or_else(|| panic!("{doctor}")).clone();
    (finding["status"].as_str().unwrap().to_owned(), finding)
}

/// Links and tables of the host, without counters.
fn seen(host: &Place) -> BTreeSet<String> {
    let names = host.sh("ip -o link show | cut -d: -f2 | cut -d@ -f1 | tr -d ' '; nft list tables");
    names.lines().map(ToOwned::to_owned).collect()
}

#[test]
fn o3_what_others_named_like_ours_is_never_listed_and_never_touched() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let host = &bench.world().host;
    host.sh(STRANGERS);
    let keeper = bench.fork_one(&template, &["--name", "keeper"]);
    // A namespace beside those of forks, one that has the name of a fork that never was, and files that are no records.
    let dir = bench.network_dir();
    host.sh(&format!(
        "touch {dir}/ns/notes {dir}/links/notes.json {dir}/leases/notes {dir}/ns/ABCDEFABCDEFABCDEFAB
        unshare --net mount --bind /proc/self/ns/net {dir}/ns/notes",
        dir = dir.display()
    ));
    let names = [
        "ofs-br0",
        "ofs258736bef2aa",
        "ofs258736bef2ab",
        "offshoot0",
        "ofstap0",
        "offshoot2",
        "offshoo\"",
        "notes",
        "ABCDEF",
    ];
    let before = seen(host);
    for action in ["net.tap:kill", "net.opened:kill", "fork.resumed:kill"] {
        let killed = bench.offshoot_with_fault(action, &["fork", &template.tag]);
        assert_eq!(killed.code, None, "{action}: {killed}");
        assert_ne!(seen(host), before, "{action} left something");
        if action == "net.opened:kill" {
            let (status, finding) = networks(&bench);
            assert_eq!((status.as_str(), &finding["next"]), ("warn", &"offshoot cleanup".into()), "{finding}");
        }
        let plan = bench.offshoot(&["cleanup"]).ok().out();
        assert!(names.iter().all(|name| !plan.contains(name)), "{action}: {plan}");
        assert_eq!(own_leftovers(&bench).len(), 1, "{action}: {plan}");
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        assert_eq!(seen(host), before, "{action}");
    }
    // It counts what is ours, without the stranger's link and files.
    let (status, finding) = networks(&bench);
    let detail = finding["detail"].as_str().unwrap();
    assert_eq!(status, "ok", "{detail}");
    for counted in ["1 fork is linked", "1 of ", " 1 namespaces, 1 wires", "in force"] {
        assert!(detail.contains(counted), "{detail}");
    }
    assert_eq!(seen(host), before, "a look changes nothing");
    // Without the host's rules forks are not kept apart: that is said, and `cleanup` writes them again.
    host.sh("nft delete table inet offshoot");
    let (status, finding) = networks(&bench);
    assert!(status == "missing" && finding["next"].as_str().unwrap().contains("offshoot cleanup"), "{finding}");
    let plan = bench.offshoot(&["cleanup"]).ok().out();
    assert!(plan.contains("written again"), "{plan}");
    let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
    assert_eq!((networks(&bench).0.as_str(), seen(host)), ("ok", before.clone()));
    let _ = bench.offshoot(&["kill", keeper.name()]).ok();
    let gone: BTreeSet<String> = &before - &seen(host);
    assert_eq!(gone, [format!("ofs{}", &keeper.id()[..12])].into(), "what was the fork's is gone, and nothing else");
    for file in ["ns/notes", "ns/ABCDEFABCDEFABCDEFAB", "links/notes.json", "leases/notes"] {
        assert!(dir.join(file).exists(), "{file}");
        host.sh(&format!("umount {0} 2>/dev/null || true; rm {0}", dir.join(file).display()));
    }
    bench.end();
}

#[test]
fn o3_a_link_without_its_fork_is_found_by_its_record_and_one_of_another_home_is_not() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let forks = bench.fork(&template, &["-n", "2", "--name", "lost"]);
    // As if somebody had removed a fork's directory by hand.
    let lost = &forks[0];
    offshoot_tests::processes::kill(lost.pid());
    fs::remove_dir_all(bench.state().join("forks").join(lost.id())).unwrap();
    fs::remove_file(bench.state().join("names").join(lost.name())).unwrap();
    let plan = bench.offshoot(&["cleanup"]).ok().out();
    assert!(plan.contains(lost.id()) && !plan.contains(forks[1].id()), "{plan}");
    // One network, two homes: to the other one, what it has not made is no leftover.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut other = bench.command(&["cleanup", "--yes"]);
    other.env("OFFSHOOT_STATE_DIR", elsewhere.path());
    let done = offshoot_tests::Run::of(other, &[]).ok();
    assert!(!done.out().contains(lost.id()) && !done.out().contains(forks[1].id()), "{done}");
    assert!(bench.network_parts().iter().any(|part| part.contains(&lost.id()[..12])));
    let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
    let parts = bench.network_parts();
    assert!(parts.iter().all(|part| !part.contains(&lost.id()[..12])), "{parts:?}");
    assert!(parts.iter().any(|part| part.contains(&forks[1].id()[..12])), "{parts:?}");
    bench.end();
}
