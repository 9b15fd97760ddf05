//! I1: no workload process of a fork runs one instruction before that fork's identity is applied.

use std::time::{SystemTime, UNIX_EPOCH};

use offshoot_tests::{
    Bench, Kind,
    watch::{self, Findings},
};

use crate::{
    pool::{is_from_pool, pool},
    rehearsal::{rehearsed, rehearses},
};

const FORKS: usize = 8;

/// Forks the template, with a pool or without, waits until every writer has seen enough, and checks what they wrote.
fn watch_forks(kind: Kind, writers: usize, with_pool: bool) -> Findings {
    let bench = Bench::new();
    let template = bench.template(kind);
    if with_pool {
        assert_eq!(pool(&bench, &template, FORKS), FORKS as u64);
        assert_eq!(rehearsed(&bench), if rehearses(&template) { FORKS as u64 } else { 0 });
    }
    let asked = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let forks = bench.fork(&template, &["-n", &FORKS.to_string()]);
    assert_eq!(forks.iter().filter(|fork| is_from_pool(fork)).count(), if with_pool { FORKS } else { 0 });
    let logs = tempfile::tempdir().unwrap();
    let mut written = Vec::new();
    for fork in forks {
        // A writer that never gets an identity would never be done.
        let _ = bench.sh(
            &fork,
            &format!(
                "n=0; until [ $(ls /dev/shm/watch | grep -c done) -eq {writers} ] || [ $n -gt 600 ]; do sleep 0.1; n=$((n+1)); done"
            ),
        );
        let to = logs.path().join(fork.id());
        let from = format!("{}:/dev/shm/watch", fork.name());
        let _ = bench.offshoot(&["cp", &from, to.to_str().unwrap()]).ok();
        let entries = watch::read(&to);
        written.push((fork, entries));
    }
    let asked_ns = u64::try_from(asked.as_nanos()).unwrap();
    let findings = watch::check(&written, watch::frozen_ns(&template.manifest), asked_ns);
    if with_pool {
        assert_eq!(pool(&bench, &template, 0), 0);
    }
    bench.end();
    findings
}

/// The positive control: every writer ran after the capture, in every fork.
fn assert_it_ran(findings: &Findings, writers: usize) {
    assert_eq!(findings.writers, [writers; FORKS], "writers that ran in each fork");
    assert!(findings.after.iter().all(|&count| count > 100), "entries after the freeze: {:?}", findings.after);
}

#[test]
fn i1_no_thread_or_process_sees_the_templates_world_after_the_capture() {
    let findings = watch_forks(Kind::Watched, 5, false);
    assert_it_ran(&findings, 5);
    assert!(findings.before > 100 * FORKS, "only {} entries before the freeze", findings.before);
    let (count, first) = (findings.violations.len(), findings.violations.first());
    println!("{} entries before, {:?} after", findings.before, findings.after);
    assert_eq!(count, 0, "the first one: {first:?}");
}

#[test]
fn i1_no_thread_or_process_runs_in_a_rehearsal_or_sees_it() {
    // In a rehearsal the guest has another id, another name and an earlier clock than as a fork: a workload that ran would have seen them.
    let findings = watch_forks(Kind::Watched, 5, true);
    assert_it_ran(&findings, 5);
    let (count, first) = (findings.violations.len(), findings.violations.first());
    println!("{} entries before, {:?} after", findings.before, findings.after);
    assert_eq!(count, 0, "the first one: {first:?}");
}

#[test]
fn i1_python_does_not_see_the_templates_world_after_the_capture() {
    let findings = watch_forks(Kind::Python, 4, false);
    assert_it_ran(&findings, 4);
    assert!(findings.before > 100 * FORKS, "only {} entries before the freeze", findings.before);
    let (count, first) = (findings.violations.len(), findings.violations.first());
    println!("{} entries before, {:?} after", findings.before, findings.after);
    assert_eq!(count, 0, "the first one: {first:?}");
}

#[test]
fn i1_without_the_freeze_the_adversary_is_found_out() {
    // Whether the workload gets to run in the few milliseconds before the identity is applied is the host's scheduler's
    // choice: one try may show nothing.
    let mut findings = watch_forks(Kind::WatchedWithoutFreeze, 5, false);
    for _ in 0..9 {
        if findings.of_one_fork > 0 {
            break;
        }
        findings = watch_forks(Kind::WatchedWithoutFreeze, 5, false);
    }
    assert_it_ran(&findings, 5);
    println!("{} violations, {} of them in one fork only", findings.violations.len(), findings.of_one_fork);
    assert!(findings.of_one_fork > 0, "what was found may be from before the capture");
    for kind in ["another id", "another host name", "the template's wall clock"] {
        assert!(findings.violations.iter().any(|(why, _)| *why == kind), "nothing shows {kind}");
    }
}
