//! A command that is told to stop undoes what is unfinished, at whatever moment it is told.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use offshoot_tests::{Bench, Kind, Run, bench::wait_until, processes};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    pool::{pool, spare_pids, spares},
    recovery::own_leftovers,
};

/// Starts `offshoot ARGS`, signals it as soon as `begun` holds, and expects the exit code by convention and the typed error.
#[track_caller]
fn interrupt(bench: &Bench, args: &[&str], signal: Signal, begun: impl FnMut() -> bool) -> Run {
    let mut command = bench.command(args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the command's work", Duration::from_secs(120), begun);
    kill_process(pid(&child), signal).unwrap();
    let output = child.wait_with_output().unwrap();
    let run = Run { args: args.join(" "), code: output.status.code(), stdout: output.stdout, stderr: output.stderr }
        .exits(128 + signal.as_raw());
    run.refused("interrupted");
    run
}

fn pid(child: &Child) -> Pid {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).unwrap()
}

#[test]
fn o2_an_interrupted_build_leaves_no_machine_and_no_template() {
    let bench = Bench::with_own_data();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let _ = interrupt(&bench, &["build", "busybox", "--tag", "t"], signal, || {
            !processes::inside(&bench.data()).is_empty()
        });
        bench.assert_empty();
        assert_eq!(bench.offshoot(&["templates"]).ok().json()["templates"], serde_json::json!([]));
        assert!(bench.leftovers().is_empty());
    }
}

#[test]
fn o2_an_interrupted_fork_keeps_what_it_names_and_nothing_else() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let half_made = || bench.entries("forks").iter().any(|name| name.starts_with('.'));
    for at_least in [0, 2] {
        let enough =
            || half_made() && bench.entries("forks").iter().filter(|name| !name.starts_with('.')).count() >= at_least;
        let run = interrupt(&bench, &["fork", &template.tag, "-n", "200"], Signal::TERM, enough);
        let made = run.json()["forks"].as_array().unwrap().clone();
        assert!((at_least..200).contains(&made.len()), "{} forks were made", made.len());
        let listed = bench.ls();
        assert_eq!(listed.len(), made.len());
        for fork in &made {
            assert!(listed.contains(&(fork["name"].as_str().unwrap().to_owned(), true)), "{fork}");
        }
        assert!(bench.leftovers().is_empty());
        bench.end();
    }
}

#[test]
fn o2_an_interrupted_pool_keeps_the_spares_that_are_ready_and_no_machine_besides() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    // A machine has been started: it is loading its template, or rehearsing.
    let has_machine = |name: &String| {
        name.starts_with(".new-") && bench.state().join("forks").join(name).join("process.json").exists()
    };
    for at_least in [0, 1, 3] {
        let begun = || spares(&bench).len() >= at_least && bench.entries("forks").iter().any(has_machine);
        let _ = interrupt(&bench, &["pool", &template.tag, "64"], Signal::TERM, begun);
        let ready = spares(&bench);
        assert!((at_least..64).contains(&ready.len()), "{ready:?}");
        assert_eq!(bench.entries("forks"), ready);
        let sorted = |mut pids: Vec<u32>| {
            pids.sort_unstable();
            pids
        };
        assert_eq!(sorted(processes::inside(bench.state())), sorted(spare_pids(&bench)));
        assert!(own_leftovers(&bench).is_empty());
        assert_eq!(pool(&bench, &template, 0), 0);
        bench.assert_empty();
    }
}

#[test]
fn o2_interrupted_verify_and_bench_leave_no_fork() {
    let bench = Bench::new();
    let tag = bench.template(Kind::Busybox).tag;
    let verify = ["verify", &tag, "-n", "8"];
    let measure = ["bench", &tag, "-n", "4", "--rounds", "100"];
    for args in [&verify[..], &measure] {
        for published in [false, true] {
            let begun = || bench.entries("forks").iter().any(|name| name.starts_with('.') != published);
            let _ = interrupt(&bench, args, Signal::INT, begun);
            bench.assert_empty();
            assert!(bench.leftovers().is_empty());
        }
    }
}
