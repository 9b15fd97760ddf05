//! F9: limits hold, in the guest and around its process on the host; one that is not possible is an error.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use offshoot_tests::{Bench, Fork, Kind, Run, bench::wait_until, processes, programs};

/// Takes 128 MiB and touches them.
const TAKE_MEMORY: &str = "dd if=/dev/zero of=/dev/null bs=128M count=1 2>/dev/null; echo $?";
/// Starts 20 processes and counts along.
const START_PROCESSES: &str = "n=0; while [ $n -lt 20 ]; do sleep 5 & n=$((n+1)); echo $n; done";

fn fork(bench: &Bench, limits: &[&str]) -> Fork {
    bench.fork_one(&bench.template(Kind::Busybox), limits)
}

#[test]
fn f9_memory_is_limited_in_the_guest() {
    let bench = Bench::new();
    // The one template whose guest has this much.
    let template = bench.template(Kind::Python);
    let limited = bench.fork_one(&template, &["--memory-limit", "128M"]);
    let free = bench.fork_one(&template, &[]);
    assert_eq!(bench.sh(&free, TAKE_MEMORY), "0", "the check can fail");
    assert_ne!(bench.sh(&limited, TAKE_MEMORY), "0");
    // What was killed is the greedy process, not the fork.
    assert_eq!(bench.sh(&limited, "echo alive"), "alive");
    assert_eq!(limited.record["limits"]["memory"], 128 << 20);
    bench.end();
}

#[test]
fn f9_processes_are_limited_in_the_guest() {
    let bench = Bench::new();
    let (limited, free) = (fork(&bench, &["--pids", "8"]), fork(&bench, &[]));
    let started = |fork: &Fork| {
        let run = bench.exec(fork, &["/bin/sh", "-c", START_PROCESSES]);
        run.out().lines().last().map_or(0, |line| line.parse::<u32>().unwrap())
    };
    assert_eq!(started(&free), 20, "the check can fail");
    let few = started(&limited);
    assert!((1..=8).contains(&few), "{few} processes were started");
    wait_until("room for a process", Duration::from_secs(30), || {
        bench.exec(&limited, &["/bin/echo", "alive"]).out() == "alive\n"
    });
    bench.end();
}

/// Processor time of a fork's machine while its workload burns for two seconds, in clock ticks.
fn burnt(bench: &Bench, fork: &Fork) -> u64 {
    let script = ["exec", fork.name(), "--timeout", "6", "--", "/bin/sh", "-c", "while :; do :; done"];
    let mut burning = bench.plain(&script).stdout(Stdio::null()).spawn().unwrap();
    // What is measured is time itself; the first second belongs to the start.
    thread::sleep(Duration::from_secs(1));
    let before = processes::ticks(fork.pid());
    thread::sleep(Duration::from_secs(3));
    let burnt = processes::ticks(fork.pid()) - before;
    assert_eq!(burning.wait().unwrap().code(), Some(124), "it burnt until its time limit");
    burnt
}

#[test]
fn f9_processor_time_is_limited() {
    let bench = Bench::new();
    let (limited, free) = (fork(&bench, &["--cpus", "0.1"]), fork(&bench, &[]));
    let (little, much) = (burnt(&bench, &limited), burnt(&bench, &free));
    println!("{little} ticks of 300 with 0.1 CPUs, {much} without a limit");
    assert!(little < 60, "0.1 CPUs used {little} of 300 ticks");
    assert!(much > 2 * little, "the check can fail: {much} of 300 ticks without a limit, {little} with");
    bench.end();
}

#[test]
fn f9_the_hosts_groups_fence_the_process_and_go_with_the_fork() {
    let bench = Bench::new();
    let limited = fork(&bench, &["--memory-limit", "64M", "--cpus", "0.5"]);
    let groups: Vec<&str> =
        limited.record["cgroups"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
    assert!(!groups.is_empty());
    for group in &groups {
        let members = fs::read_to_string(Path::new(group).join("cgroup.procs")).unwrap();
        assert!(members.lines().any(|line| line == limited.pid().to_string()), "{group}: {members}");
    }
    let read = |names: [&str; 2]| {
        let files = groups.iter().flat_map(|group| names.map(|name| Path::new(group).join(name)));
        files.filter_map(|file| fs::read_to_string(file).ok()).next().unwrap().trim().to_owned()
    };
    let memory: u64 = read(["memory.max", "memory.limit_in_bytes"]).parse().unwrap();
    assert!((64 << 20..256 << 20).contains(&memory), "{memory}");
    assert!(read(["cpu.max", "cpu.cfs_quota_us"]).starts_with("50000"));
    // Its name is taken: what was made for the second one goes, the first one's stays.
    let again = ["fork", &bench.template(Kind::Busybox).tag, "--name", limited.name(), "--cpus", "0.5"];
    bench.offshoot(&again).exits(1).refused("name_conflict");
    assert!(groups.iter().all(|group| Path::new(group).exists()));
    bench.end();
    assert!(!groups.iter().any(|group| Path::new(group).exists()), "{groups:?} are left");
}

#[test]
fn f9_a_limit_that_is_not_possible_is_an_error() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    // A host without control groups: they are hidden in a mount namespace of the command's own.
    let without_groups = |limits: &[&str]| {
        let mut command = Command::new(programs::distribution("unshare", "util-linux"));
        let script = "umount --recursive /sys/fs/cgroup && exec \"$@\"";
        command.args(["--mount", "--propagation", "private", "/bin/sh", "-c", script, "sh"]);
        let fork = bench.command(&[&["fork", template.tag.as_str()], limits].concat());
        command.arg(fork.get_program()).args(fork.get_args());
        fork.get_envs().for_each(|(name, value)| match value {
            Some(value) => drop(command.env(name, value)),
            None => drop(command.env_remove(name)),
        });
        Run::of(command, &[])
    };
    for limits in [["--memory-limit", "64M"], ["--cpus", "0.5"]] {
        let error = without_groups(&limits).exits(1).refused("limit_not_possible");
        assert!(error["message"].as_str().unwrap().contains(limits[0]), "{error}");
        bench.assert_empty();
    }
    // Without limits it is possible, and so is one that the guest alone keeps.
    let _ = without_groups(&["--name", "free"]).ok();
    let _ = without_groups(&["--pids", "8"]).ok();
    bench.end();
}

#[test]
fn f9_senseless_limits_are_refused() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    for limits in
        [["--memory-limit", "1K"], ["--memory-limit", "x"], ["--cpus", "0"], ["--cpus", "-1"], ["--pids", "0"]]
    {
        let _ = bench.offshoot(&[&["fork", template.tag.as_str()], &limits[..]].concat()).exits(2).error();
    }
    bench.end();
}
