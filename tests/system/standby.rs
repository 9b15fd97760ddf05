//! F7: a fork leaves memory for disk and comes back as the same fork, whatever ends in the middle.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use offshoot_tests::{Bench, Fork, Kind, Server, Template, bench::wait_until, processes};
use serde_json::{Value, json};

use crate::recovery::{on_a_small_disk, own_leftovers, points, says_what_to_do};

/// A variable, a file, and a loop that counts in memory and on disk under one lock.
pub(crate) const WORK: &str = "
import threading, time
lock, counted = threading.Lock(), 0
def count():
    global counted
    while True:
        with lock:
            counted += 1
            with open('/root/counted', 'w') as file: file.write(str(counted))
        time.sleep(0.001)
threading.Thread(target=count, daemon=True).start()
open('/root/kept', 'w').write(mine)
";

/// What the loop has counted: in memory, and on disk.
pub(crate) fn counted(bench: &Bench, fork: &Fork) -> (u64, u64) {
    let both = bench.eval(fork, "(lock.acquire(), counted, int(open('/root/counted').read()), lock.release())[1:3]");
    (both[0].as_u64().unwrap(), both[1].as_u64().unwrap())
}

pub(crate) fn work(bench: &Bench, fork: &Fork, mine: &str) {
    let _ = bench.eval(fork, &format!("mine = {mine:?}\n{WORK}"));
}

/// All that says who a fork is.
pub(crate) fn who(bench: &Bench, fork: &Fork) -> Vec<String> {
    let script = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /run/offshoot/id /run/offshoot/name; echo; env | sort; \
        cat /run/offshoot/secrets/*; cat /sys/class/net/eth0/address /etc/resolv.conf";
    bench.sh(fork, script).lines().filter(|line| !line.starts_with("_=")).map(ToOwned::to_owned).collect()
}

fn snapshots(bench: &Bench) -> PathBuf {
    bench.data().join("snapshots")
}

/// What is on disk of a fork: in standby, or half made.
pub(crate) fn on_disk(bench: &Bench, id: &str) -> Vec<String> {
    let entries = fs::read_dir(snapshots(bench)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| name.contains(id)).collect()
}

fn state(bench: &Bench, fork: &Fork) -> String {
    bench.offshoot(&["inspect", fork.name()]).ok().json()["state"].as_str().unwrap().to_owned()
}

fn wall_clock_is_right(bench: &Bench, fork: &Fork) {
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let before = now();
    let seen = bench.eval(fork, "time.time()").as_f64().unwrap();
    assert!(seen > before - 1.0 && seen < now() + 1.0, "{seen} at {before}");
}

#[test]
fn f7_forks_come_back_from_standby_as_they_were() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let secret = bench.state().join("secret");
    fs::write(&secret, "hunter2-of-the-first").unwrap();
    let given = format!("KEY=@{}", secret.display());
    let first =
        bench.fork_one(&template, &["--name", "first", "--env", "A=1", "--label", "team=x", "--secret", &given]);
    let second = bench.fork_one(&template, &["--name", "second"]);
    for fork in [&first, &second] {
        work(&bench, fork, fork.name());
    }
    let before = [who(&bench, &first), who(&bench, &second)];
    let runtime = bench.eval(&first, "os.getpid()");
    let counts = [counted(&bench, &first), counted(&bench, &second)];

    let moved = bench.offshoot(&["standby", "first", "second"]).ok().json();
    assert_eq!((moved["forks"].as_array().unwrap().len(), &moved["failed"]), (2, &json!([])));
    for fork in [&first, &second] {
        assert!(!processes::is_alive(fork.pid()));
        assert_eq!(state(&bench, fork), "standby");
        assert_eq!(on_disk(&bench, fork.id()), [fork.id()]);
        bench.offshoot(&["exec", fork.name(), "--", "/bin/true"]).exits(125).refused("fork_in_standby");
        bench.offshoot(&["eval", fork.name(), "--", "1"]).exits(1).refused("fork_in_standby");
    }
    // Memory is released, the disk holds what was dirtied, and nothing of it is a leftover.
    assert_eq!(processes::inside(bench.state()), Vec::<u32>::new());
    let standby = &bench.offshoot(&["inspect", "first"]).ok().json()["standby"];
    let (dirty, disk) = (standby["dirty_bytes"].as_u64().unwrap(), standby["disk_bytes"].as_u64().unwrap());
    assert!(dirty > 1 << 20 && disk < dirty + (1 << 20), "{standby}");
    assert_eq!(own_leftovers(&bench), Vec::<String>::new());
    bench.offshoot(&["standby", "first"]).exits(1).refused("fork_in_standby");
    bench.offshoot(&["fork", &template.tag, "--name", "first"]).exits(1).refused("name_conflict");

    let _ = bench.offshoot(&["resume", "first", "second"]).ok();
    for (index, fork) in [&first, &second].into_iter().enumerate() {
        assert_eq!(state(&bench, fork), "alive");
        assert_eq!(on_disk(&bench, fork.id()), Vec::<String>::new());
        assert_eq!(who(&bench, fork), before[index]);
        assert_eq!(bench.eval(fork, "mine, open('/root/kept').read()"), json!([fork.name(), fork.name()]));
        wall_clock_is_right(&bench, fork);
        let (memory, disk) = counted(&bench, fork);
        assert_eq!(memory, disk);
        assert!(memory >= counts[index].0);
        wait_until("the loop going on", Duration::from_secs(20), || counted(&bench, fork).0 > memory);
    }
    assert_eq!(bench.eval(&first, "os.getpid()"), runtime, "the same process");
    assert_ne!(who(&bench, &first), who(&bench, &second));
    assert!(before[0].iter().any(|line| line.contains("hunter2-of-the-first")), "the check can fail");
    bench.offshoot(&["resume", "first"]).exits(1).refused("fork_runs");
    // Again, and on.
    let _ = bench.offshoot(&["standby", "first"]).ok();
    let _ = bench.offshoot(&["resume", "first"]).ok();
    assert_eq!(who(&bench, &first), before[0]);
    let _ = bench.offshoot(&["standby", "second"]).ok();
    let _ = bench.offshoot(&["kill", "second"]).ok();
    assert_eq!(on_disk(&bench, second.id()), Vec::<String>::new());
    bench.end();
}

#[test]
fn i9_two_resumes_of_one_standby_draw_different_random_bytes() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Python);
    let fork = bench.fork_one(&template, &["--name", "twice", "--network", "none"]);
    let _other = bench.fork_one(&template, &["--network", "none"]);
    let _ = bench.eval(&fork, "kept = random.random()");
    let _ = bench.offshoot(&["standby", "twice"]).ok();
    let (own, disk) = (bench.state().join("forks").join(fork.id()), snapshots(&bench).join(fork.id()));
    let copy = bench.state().join("copy");
    let copy_to = |from: &PathBuf, to: &PathBuf| {
        assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    };
    fs::create_dir(&copy).unwrap();
    let (own_copy, disk_copy) = (copy.join("fork"), copy.join("disk"));
    copy_to(&own, &own_copy);
    copy_to(&disk, &disk_copy);
    let draw = || {
        let _ = bench.offshoot(&["resume", "twice"]).ok();
        let drawn =
            bench.eval(&fork, "os.urandom(16).hex(), random.random(), float(np.random.rand()), str(uuid.uuid4())");
        (bench.eval(&fork, "kept"), drawn)
    };
    let (kept, first) = draw();
    // The same once more, from a copy.
    let pid = bench.offshoot(&["inspect", "twice"]).ok().json()["process"]["pid"].as_u64().unwrap();
    processes::kill(u32::try_from(pid).unwrap());
    wait_until("its end", Duration::from_secs(20), || !processes::is_alive(u32::try_from(pid).unwrap()));
    fs::remove_dir_all(&own).unwrap();
    copy_to(&own_copy, &own);
    copy_to(&disk_copy, &disk);
    let (again, second) = draw();
    assert_eq!(kept, again, "it is the same moment");
    for (one, other) in first.as_array().unwrap().iter().zip(second.as_array().unwrap()) {
        assert_ne!(one, other);
    }
    bench.end();
}

#[test]
fn n_a_fork_in_standby_keeps_its_address_and_its_port() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let _server = Server::http(&bench.world().outside);
    let fork = bench.fork_one(&template, &["--name", "kept", "-p", "8080:80"]);
    let other = bench.fork_one(&template, &["--name", "other"]);
    let ask = |address: std::net::Ipv4Addr, port| bench.world().host.get((address, port), "id");
    let here = std::net::Ipv4Addr::LOCALHOST;
    assert_eq!(ask(fork.address(), 80).as_deref(), Some(fork.id()));
    let _ = bench.offshoot(&["standby", "kept"]).ok();
    assert_eq!(bench.offshoot(&["inspect", "kept"]).ok().json()["network"]["ipv4"], fork.record["network"]["ipv4"]);
    let third = bench.fork_one(&template, &["--name", "third"]);
    assert!(![fork.address(), other.address()].contains(&third.address()));
    bench.offshoot(&["fork", &template.tag, "-p", "8080:80"]).exits(1).refused("port_taken");
    let _ = bench.offshoot(&["resume", "kept"]).ok();
    for (address, port, fork) in
        [(fork.address(), 80, &fork), (here, 8080, &fork), (other.address(), 80, &other), (third.address(), 80, &third)]
    {
        assert_eq!(ask(address, port).as_deref(), Some(fork.id()), "{address}:{port}");
    }
    bench.end();
}

/// A fork with work of its own, and who it is.
fn moved(bench: &Bench, template: &Template) -> (Fork, Vec<String>) {
    let fork = bench.fork_one(template, &["--name", "moved"]);
    work(bench, &fork, "moved");
    let before = who(bench, &fork);
    (fork, before)
}

/// Points of an operation, without those that say that it is done.
fn points_of(operations: &[&str]) -> Vec<String> {
    operations.iter().flat_map(|operation| points(operation).into_keys()).collect()
}

#[test]
fn o2_a_standby_that_fails_or_dies_anywhere_leaves_a_fork_that_runs_or_one_in_standby() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let neighbour = bench.fork_one(&template, &["--name", "neighbour"]);
    let (fork, before) = moved(&bench, &template);
    let points = points_of(&["capture", "standby"]);
    assert!(points.len() >= 7, "{points:?}");
    // Those after which the fork goes on are of a fork of it.
    for point in points.iter().filter(|point| !["capture.told", "capture.resumed"].contains(&point.as_str())) {
        for action in ["error", "kill"] {
            let run = bench.offshoot_with_fault(&format!("{point}:{action}"), &["standby", "moved"]);
            assert_ne!(run.code, Some(0), "{point}:{action}: {run}");
            if action == "error" {
                assert!(run.err().contains("fault injected"), "{point}: {run}");
                says_what_to_do(&run);
            } else if point.as_str() == "capture.paused" {
                // Whoever looks sees it, and touches nothing.
                assert_eq!(own_leftovers(&bench).iter().filter(|path| path.contains("/forks/")).count(), 1);
            }
            let is_done = point == "standby.committed";
            if is_done {
                bench.offshoot(&["eval", "moved", "--", "1"]).exits(1).refused("fork_in_standby");
                let _ = bench.offshoot(&["resume", "moved"]).ok();
            }
            // The next command finds it well.
            let (memory, disk) = counted(&bench, &fork);
            assert_eq!(memory, disk, "{point}:{action}");
            wait_until("the loop going on", Duration::from_secs(20), || counted(&bench, &fork).0 > memory);
            assert_eq!(who(&bench, &fork), before, "{point}:{action}");
            assert_eq!(own_leftovers(&bench), Vec::<String>::new(), "{point}:{action}");
            assert_eq!(on_disk(&bench, fork.id()), Vec::<String>::new(), "{point}:{action}");
        }
    }
    assert_eq!(bench.eval(&neighbour, "1 + 1"), 2);
    let _ = bench.offshoot(&["standby", "moved"]).ok();
    assert_eq!(state(&bench, &fork), "standby", "the check can fail");
    bench.end();
}

#[test]
fn o2_a_resume_that_fails_or_dies_anywhere_leaves_a_fork_in_standby_or_one_that_runs() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let neighbour = bench.fork_one(&template, &["--name", "neighbour"]);
    let (mut fork, mut before) = moved(&bench, &template);
    let points = points_of(&["resume"]);
    assert!(points.len() >= 7, "{points:?}");
    for point in &points {
        for action in ["error", "kill", "kill-engine"] {
            let _ = bench.offshoot(&["standby", "moved"]).ok();
            let run = bench.offshoot_with_fault(&format!("{point}:{action}"), &["resume", "moved"]);
            if run.code == Some(0) {
                // There was no machine to be killed.
                assert_eq!(action, "kill-engine", "{point}");
            } else if point != "resume.committed" {
                bench.offshoot(&["eval", "moved", "--", "1"]).exits(1).refused("fork_in_standby");
                assert_eq!(
                    processes::inside(&bench.state().join("forks").join(fork.id())),
                    Vec::<u32>::new(),
                    "{point}"
                );
                let _ = bench.offshoot(&["resume", "moved"]).ok();
            }
            if point == "resume.committed" && action == "kill-engine"
                || point == "resume.acked" && action == "kill-engine" && run.code == Some(0)
            {
                // It ended after it had come back: a fork that died, as any may. The other points are another's.
                let _ = bench.offshoot(&["kill", "moved"]).ok();
                (fork, before) = moved(&bench, &template);
                continue;
            }
            assert_eq!(bench.eval(&fork, "mine"), "moved", "{point}:{action}");
            assert_eq!(who(&bench, &fork), before, "{point}:{action}");
            assert_eq!(own_leftovers(&bench), Vec::<String>::new(), "{point}:{action}");
        }
    }
    assert_eq!(bench.eval(&neighbour, "1 + 1"), 2);
    bench.end();
}

#[test]
fn a_full_disk_during_standby_is_a_typed_error_and_the_fork_runs_on() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Python);
    let fork = bench.fork_one(&template, &["--name", "large", "--network", "none"]);
    let other = bench.fork_one(&template, &["--name", "other", "--network", "none"]);
    let _ = bench.eval(&fork, "ballast = os.urandom(8 << 20); len(ballast)");
    let script = format!(
        "\"$OFFSHOOT\" --json standby large >/dev/null; code=$?; find '{}' -mindepth 1; exit $code",
        snapshots(&bench).display()
    );
    for size in ["64k", "4m"] {
        let run = on_a_small_disk(&bench, &snapshots(&bench), &format!("size={size}"), &script);
        let _ = run.refused("engine_failed");
        says_what_to_do(&run);
        assert_eq!(run.out(), "", "something is left: {run}");
        assert_eq!(bench.eval(&fork, "len(ballast)"), 8 << 20);
    }
    let _ = bench.offshoot(&["standby", "large"]).ok();
    let _ = bench.offshoot(&["resume", "large"]).ok();
    assert_eq!(bench.eval(&fork, "len(ballast)"), 8 << 20);
    assert_eq!(bench.eval(&other, "1"), 1);
    bench.end();
}

#[test]
fn what_was_changed_on_disk_is_refused_and_the_fork_stays_in_standby() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    let forks = bench.fork(&template, &["-n", "2", "--name", "kept", "--network", "none"]);
    let _ = bench.offshoot(&["standby", "kept-1", "kept-2"]).ok();
    let dir = snapshots(&bench).join(forks[0].id());
    for file in ["delta.bin", "state.bin"] {
        let path = dir.join(file);
        let good = fs::read(&path).unwrap();
        for at in [9, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            bench.offshoot(&["resume", "kept-1"]).exits(1).refused("snapshot_unusable");
            bench.offshoot(&["fork", "--from", "kept-1"]).exits(1).refused("snapshot_unusable");
        }
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        bench.offshoot(&["resume", "kept-1"]).exits(1).refused("snapshot_unusable");
        fs::write(&path, &good).unwrap();
    }
    // Another fork's pages are not this one's.
    let (own, other) = (dir.join("delta.bin"), snapshots(&bench).join(forks[1].id()).join("delta.bin"));
    let good = fs::read(&own).unwrap();
    fs::copy(other, &own).unwrap();
    bench.offshoot(&["resume", "kept-1"]).exits(1).refused("snapshot_unusable");
    fs::write(&own, good).unwrap();
    let _ = bench.offshoot(&["resume", "kept-1", "kept-2"]).ok();
    assert_eq!(bench.sh(&forks[0], "hostname"), "kept-1");
    // Nor is a template that goes away, or comes back as another one.
    let _ = bench.offshoot(&["standby", "kept-1"]).ok();
    bench.offshoot(&["rmi", &template.tag]).exits(1).refused("template_in_use");
    let _ = bench.offshoot(&["kill", "kept-1"]).ok();
    let _ = bench.offshoot(&["rmi", &template.tag]).ok();
    bench.offshoot(&["standby", "kept-2"]).exits(1).refused("template_gone");
    assert_eq!(bench.sh(&forks[1], "hostname"), "kept-2");
    bench.end();
}

#[test]
fn one_thing_at_a_time_is_done_to_a_fork() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let forks = bench.fork(&template, &["-n", "2", "--name", "busy"]);
    // Many at once: each works or says that somebody else is at it, and in the end there is one fork.
    let ends: Vec<Value> = std::thread::scope(|scope| {
        let verbs: [&[&str]; 6] = [
            &["standby", "busy-1"],
            &["fork", "--from", "busy-1"],
            &["resume", "busy-1"],
            &["standby", "busy-1"],
            &["resume", "busy-1"],
            &["fork", "--from", "busy-1"],
        ];
        let threads: Vec<_> = verbs.iter().map(|verb| scope.spawn(|| bench.offshoot(verb))).collect();
        let code =
            |run: offshoot_tests::Run| if run.code == Some(0) { json!("ok") } else { run.error()["code"].clone() };
        threads.into_iter().map(|thread| code(thread.join().unwrap())).collect()
    });
    for end in &ends {
        assert!(["ok", "fork_busy", "fork_in_standby", "fork_runs"].contains(&end.as_str().unwrap()), "{ends:?}");
    }
    if state(&bench, &forks[0]) == "standby" {
        let _ = bench.offshoot(&["resume", "busy-1"]).ok();
    }
    assert_eq!(bench.sh(&forks[0], "hostname"), "busy-1");
    assert_eq!(own_leftovers(&bench), Vec::<String>::new());
    assert_eq!(on_disk(&bench, forks[0].id()), Vec::<String>::new());
    bench.end();
}
