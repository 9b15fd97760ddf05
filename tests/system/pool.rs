//! Spare machines: forks that are made of them are forks like any other, and the pool leaves nothing behind.

use std::{collections::BTreeSet, thread, time::Duration};

use offshoot_tests::{Bench, Fork, Kind, Run, Template, bench::wait_until, processes};

use crate::{
    recovery::{own_leftovers, points, says_what_to_do},
    rehearsal::rehearses,
};

/// Sets the size; answers with how many are ready.
pub(crate) fn pool(bench: &Bench, template: &Template, size: usize) -> u64 {
    let set = bench.offshoot(&["pool", &template.tag, &size.to_string()]).ok().json();
    set["pools"].as_array().unwrap().first().map_or(0, |pool| pool["ready"].as_u64().unwrap())
}

fn ready(bench: &Bench) -> u64 {
    let pools = bench.offshoot(&["pool"]).ok().json();
    pools["pools"].as_array().unwrap().iter().map(|pool| pool["ready"].as_u64().unwrap()).sum()
}

pub(crate) fn is_from_pool(fork: &Fork) -> bool {
    fork.record["host_steps"].as_array().unwrap().iter().any(|step| step["step"] == "take over a spare")
}

/// Directories of spares.
pub(crate) fn spares(bench: &Bench) -> Vec<String> {
    bench.entries("forks").into_iter().filter(|name| name.starts_with(".spare-")).collect()
}

pub(crate) fn spare_pids(bench: &Bench) -> Vec<u32> {
    let dirs = spares(bench).into_iter().map(|name| bench.state().join("forks").join(name));
    dirs.flat_map(|dir| processes::inside(&dir)).collect()
}

#[test]
fn i1_forks_from_a_pool_are_themselves() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    assert_eq!(pool(&bench, &template, 2), 2);
    // Two come from the pool, one does not; everything is compared with everything, the template too.
    let verdict = bench.offshoot(&["verify", &template.tag, "-n", "3"]).ok().json();
    assert_eq!((&verdict["passed"], verdict["rows"].as_array().unwrap().len()), (&true.into(), 4), "{verdict}");
    wait_until("the pool fills itself again", Duration::from_secs(20), || ready(&bench) == 2);

    let forks = bench.fork(&template, &["-n", "3", "--env", "GIVEN=yes"]);
    assert_eq!(forks.iter().filter(|fork| is_from_pool(fork)).count(), 2);
    let ids: BTreeSet<_> = forks.iter().map(|fork| bench.sh(fork, "echo $OFFSHOOT_ID $GIVEN; hostname")).collect();
    let said: BTreeSet<_> = forks.iter().map(|fork| format!("{} yes\n{}", fork.id(), fork.text("hostname"))).collect();
    assert_eq!(ids, said);
    wait_until("the pool fills itself again", Duration::from_secs(20), || ready(&bench) == 2);
    // Spares are no forks.
    assert_eq!(bench.ls().len(), 3);
    assert_eq!(own_leftovers(&bench), Vec::<String>::new());
    let _ = bench.offshoot(&["kill", "--all"]).ok();
    assert_eq!(spares(&bench).len(), 2, "the pool stays");
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}

#[test]
fn a_spare_does_not_run_and_is_taken_once() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    assert_eq!(pool(&bench, &template, 3), 3);
    let pids = spare_pids(&bench);
    assert_eq!(pids.len(), 3);
    let ticks = || pids.iter().map(|&pid| processes::ticks(pid)).sum::<u64>();
    let before = ticks();
    thread::sleep(Duration::from_secs(1));
    assert!(ticks() - before <= 2, "a machine that does not run uses no processor time");

    // Six commands at once and three spares. The pool fills itself meanwhile, so there may be more from it than three.
    let forks: Vec<Fork> = thread::scope(|scope| {
        let all: Vec<_> = (0..6).map(|_| scope.spawn(|| bench.fork_one(&template, &[]))).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let distinct = |field: &str| forks.iter().map(|fork| fork.text(field).to_owned()).collect::<BTreeSet<_>>().len();
    assert_eq!((distinct("id"), distinct("machine_id"), distinct("boot_id")), (6, 6, 6));
    assert_eq!(forks.iter().map(Fork::pid).collect::<BTreeSet<_>>().len(), 6);
    assert!(forks.iter().filter(|fork| is_from_pool(fork)).count() >= 3);
    assert!(forks.iter().all(|fork| bench.sh(fork, "cat /etc/machine-id") == fork.text("machine_id")));

    // A limit of the host's is taken on at the start.
    wait_until("the pool is full", Duration::from_secs(20), || ready(&bench) == 3);
    assert!(!is_from_pool(&bench.fork_one(&template, &["--memory-limit", "64M"])));
    assert!(is_from_pool(&bench.fork_one(&template, &["--pids", "50"])));
    assert_eq!(pool(&bench, &template, 0), 0);
    bench.end();
}

#[test]
fn o3_a_dead_spare_is_replaced_and_costs_no_fork() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    assert_eq!(pool(&bench, &template, 2), 2);
    let pids = spare_pids(&bench);
    pids.iter().copied().for_each(processes::kill);
    wait_until("they are gone", Duration::from_secs(5), || !pids.iter().any(|&pid| processes::is_alive(pid)));
    assert_eq!(own_leftovers(&bench).len(), 2);
    let fork = bench.fork_one(&template, &["--name", "undisturbed"]);
    assert!(!is_from_pool(&fork));
    wait_until("the pool is filled anew", Duration::from_secs(20), || ready(&bench) == 2);
    assert_eq!(own_leftovers(&bench), Vec::<String>::new());

    // One that does not answer: stopped, it can not be talked to.
    for pid in spare_pids(&bench) {
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }
    let second = bench.fork_one(&template, &["--name", "undisturbed-too"]);
    assert!(!is_from_pool(&second));
    assert_eq!(bench.sh(&second, "hostname"), "undisturbed-too");

    // The pool goes with its template, and the forks stay.
    wait_until("the pool is filled anew", Duration::from_secs(20), || ready(&bench) == 2);
    let _ = bench.offshoot(&["rmi", &template.tag]).ok();
    assert_eq!(spares(&bench), Vec::<String>::new());
    assert_eq!(bench.sh(&fork, "hostname"), "undisturbed");
    bench.end();
}

#[test]
fn o2_whatever_fails_around_a_spare_leaves_nothing() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let mut own = points("pool");
    if !rehearses(&template) {
        own.retain(|point, _| !point.starts_with("pool.rehears"));
    }
    assert!(own.len() >= 2);
    for (point, machine) in own {
        let command = ["pool", template.tag.as_str(), "1"];
        let run = bench.offshoot_with_fault(&format!("{point}:error"), &command);
        run.refused("state_failed");
        assert_eq!(bench.entries("forks"), Vec::<String>::new(), "{point}");
        if machine {
            let run = bench.offshoot_with_fault(&format!("{point}:kill-engine"), &command);
            run.refused("engine_failed");
            assert_eq!(bench.entries("forks"), Vec::<String>::new(), "{point}");
        }
        let run = bench.offshoot_with_fault(&format!("{point}:kill"), &command);
        assert_eq!(run.code, None, "{run}");
        assert_eq!(own_leftovers(&bench).len(), 1, "{point}");
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        assert_eq!(pool(&bench, &template, 0), 0);
        bench.assert_empty();
    }
    for (point, machine) in points("fork") {
        for action in ["error", "kill", "kill-engine"] {
            if action == "kill-engine" && (!machine || point == "fork.acked") {
                continue;
            }
            assert_eq!(pool(&bench, &template, 1), 1);
            let spare = spares(&bench).remove(0);
            let pid = spare_pids(&bench)[0];
            let run = bench.offshoot_with_fault(&format!("{point}:{action}"), &["fork", &template.tag]);
            assert_ne!(run.code, Some(0), "{point}:{action}");
            if action == "kill" {
                assert_eq!(own_leftovers(&bench).len(), 1, "{point}");
                let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
            } else {
                says_what_to_do(&run);
            }
            assert!(!bench.entries("forks").contains(&spare), "{point}:{action}: it was taken");
            assert!(!processes::is_alive(pid), "{point}:{action}: its machine is left");
            assert_eq!(pool(&bench, &template, 0), 0);
            bench.assert_empty();
        }
    }
}

#[test]
fn o5_a_wrong_pool_is_a_typed_error() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let refused = |args: &[&str], exit: i32, code: &str| {
        let run: Run = bench.offshoot(&[&["pool"], args].concat()).exits(exit);
        run.refused(code);
    };
    refused(&["nope", "1"], 1, "template_not_found");
    refused(&["nope"], 1, "template_not_found");
    refused(&[&template.tag, "257"], 2, "pool_too_large");
    refused(&[&template.tag, "-1"], 2, "unknown_argument");
    refused(&[&template.tag, "many"], 2, "invalid_value");
    refused(&["../x", "1"], 2, "invalid_value");
    assert_eq!(bench.offshoot(&["pool"]).ok().json()["pools"], serde_json::json!([]));
    bench.end();
}
