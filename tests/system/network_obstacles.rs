//! F9: what a fork's network is made of is taken, gone or refused. The fork is made all the same, or fails with a typed error and leaves nothing.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use offshoot_tests::{Bench, Fork, Kind, Run, Template, bench::wait_until, processes, programs};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};

use crate::{
    pool::{pool, spare_pids, spares},
    recovery::{own_leftovers, says_what_to_do},
};

/// The only spare of a pool: its id and its machine's process.
fn one_spare(bench: &Bench, template: &Template) -> (String, u32) {
    assert_eq!(pool(bench, template, 1), 1);
    let id = spares(bench)[0].trim_start_matches(".spare-").to_owned();
    (id, spare_pids(bench)[0])
}

/// Nothing is left of a spare that was taken, and nothing else is in anybody's way.
#[track_caller]
fn is_gone(bench: &Bench, template: &Template, id: &str, pid: u32) {
    assert!(!processes::is_alive(pid), "its machine is left");
    assert_eq!(pool(bench, template, 0), 0);
    let parts = bench.network_parts();
    assert!(parts.iter().all(|part| !part.contains(&id[..12])), "{parts:?}");
    assert!(bench.entries("forks").iter().all(|name| !name.contains(id)));
    assert_eq!(own_leftovers(bench), Vec::<String>::new());
}

/// Forks once; a fork that was made is whole, one that was not says what to do. Whether it was made.
#[track_caller]
fn is_made(bench: &Bench, template: &Template) -> bool {
    let run: Run = bench.offshoot(&["fork", &template.tag]);
    if run.code != Some(0) {
        run.refused("network_failed");
        says_what_to_do(&run);
        return false;
    }
    let fork = Fork { record: run.json()["forks"][0].clone() };
    assert_eq!(fork.record["network"]["state"], "acknowledged");
    assert!(bench.sh(&fork, "ip addr show dev eth0").contains(fork.network("ipv4")));
    let _ = bench.offshoot(&["kill", fork.name()]).ok();
    true
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// A tap that a process has open, for this process too.
fn tap_of(pid: u32) -> OwnedFd {
    let fds = Path::new("/proc").join(pid.to_string()).join("fd");
    let is_tap = |path: &Path| std::fs::read_link(path).is_ok_and(|target| target == Path::new("/dev/net/tun"));
    let mut all = std::fs::read_dir(fds).unwrap().map(|entry| entry.unwrap().path());
    let number = all.find(|path| is_tap(path)).expect("its tap is open");
    let number = number.file_name().unwrap().to_string_lossy().parse().unwrap();
    let process = pidfd_open(Pid::from_raw(pid.cast_signed()).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).unwrap()
}

#[test]
fn f9_a_spare_that_lost_a_part_of_its_network_is_replaced_or_a_typed_error() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Busybox);
    let host = &bench.world().host;
    let dir = bench.network_dir();
    // What can be seen to be gone before the fork runs is made anew.
    for (what, take, made) in [
        ("namespace", "umount -l $dir/ns/$id", true),
        ("namespace's file", "umount -l $dir/ns/$id; rm $dir/ns/$id", true),
        ("record", "rm $dir/links/$id.json", true),
        ("host's rules", "nft delete table inet offshoot", true),
        ("wire", "ip link del ofs${id%????????}", false),
        ("tap", "nsenter --net=$dir/ns/$id ip link del tap0", true),
        ("rules", "nsenter --net=$dir/ns/$id nft flush ruleset", false),
    ] {
        let (id, pid) = one_spare(&bench, &template);
        host.sh(&format!("id={id} dir={}; {take}", dir.display()));
        assert_eq!(is_made(&bench, &template), made, "without its {what}");
        is_gone(&bench, &template, &id, pid);
        // The next one is well.
        assert!(is_made(&bench, &template), "after a spare without its {what}");
    }
    bench.end();
}

#[test]
fn f9_a_tap_that_somebody_holds_is_a_typed_error() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Busybox);
    // A spare that does not answer is no use, and its tap would do for another machine, but for somebody who holds it.
    let (id, pid) = one_spare(&bench, &template);
    signal(pid, Signal::STOP);
    let held = tap_of(pid);
    assert!(!is_made(&bench, &template));
    drop(held);
    is_gone(&bench, &template, &id, pid);
    // The check can fail: without a holder the fork is made.
    let (id, pid) = one_spare(&bench, &template);
    signal(pid, Signal::STOP);
    assert!(is_made(&bench, &template));
    is_gone(&bench, &template, &id, pid);
    bench.end();
}

/// Builds a template of this service.
fn build(bench: &Bench, tag: &str, script: &str) -> Template {
    let dir = tempfile::tempdir().unwrap();
    let recipe = format!(
        "name = \"{tag}\"\nmemory = \"128M\"\n[rootfs]\nkind = \"busybox\"\n\
        [[services]]\nname = \"hostile\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\nready_line = \"done\"\n"
    );
    std::fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
    let _ = bench.offshoot(&["build", dir.path().to_str().unwrap(), "--tag", tag]).ok();
    Template::read(&bench.data(), tag)
}

#[test]
fn f9_a_guest_that_can_not_apply_its_network_is_destroyed_and_one_that_is_given_none_lives() {
    let _ = programs::beside("offshoot-agent");
    let bench = Bench::in_a_world_with_own_data();
    let unbind = "mount -o remount,rw /sys; cd /sys/bus/virtio/drivers/virtio_net; for card in virtio*; do echo $card > unbind; done; ls; echo done; sleep 100000";
    let template = build(&bench, "unbound", unbind);
    let run = bench.offshoot(&["fork", "unbound", "-n", "2", "--name", "deaf"]);
    run.refused("network_refused");
    for failed in run.json()["failed"].as_array().unwrap() {
        let text = failed["error"]["message"].as_str().unwrap();
        assert!(text.contains("no virtio network card") && text.contains("ReconfigureNetwork: failed"), "{text}");
    }
    assert_eq!(run.json()["failed"].as_array().unwrap().len(), 2, "{run}");
    bench.assert_empty();
    let forks = bench.fork(&template, &["-n", "2", "--network", "none"]);
    for fork in &forks {
        wait_until("the sandbox", Duration::from_secs(20), || bench.sh(fork, "ls /sys/class/net") == "lo");
    }
    let _ = bench.offshoot(&["kill", "--all"]).ok();
    let _ = bench.offshoot(&["rmi", "unbound"]).ok();
    bench.end();
}
