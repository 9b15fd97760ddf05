//! An idle fork costs the host nothing.

use std::{thread, time::Duration};

use offshoot_tests::{Bench, Kind, processes};

#[test]
fn an_idle_fork_uses_no_cpu() {
    let bench = Bench::new();
    let forks = bench.fork(&bench.template(Kind::Busybox), &["-n", "2"]);
    // What is measured is time itself: the first second belongs to the start.
    thread::sleep(Duration::from_secs(1));
    let before: Vec<u64> = forks.iter().map(|fork| processes::ticks(fork.pid())).collect();
    thread::sleep(Duration::from_secs(3));
    for (fork, before) in forks.iter().zip(before) {
        let used = processes::ticks(fork.pid()) - before;
        println!("{}: {used} ticks of 300", fork.name());
        assert!(used < 9, "{} used {used} of 300 ticks while idle", fork.name());
    }
    // The check can fail: a busy fork is seen.
    let mut busy =
        bench.plain(&["exec", forks[0].name(), "--timeout", "2", "--", "/bin/sh", "-c", "while :; do :; done"]);
    let mut busy = busy.spawn().unwrap();
    let before = processes::ticks(forks[0].pid());
    assert_eq!(busy.wait().unwrap().code(), Some(124), "the loop ran into its time limit");
    assert!(processes::ticks(forks[0].pid()) - before > 9, "a busy fork is not seen");
    bench.end();
}
