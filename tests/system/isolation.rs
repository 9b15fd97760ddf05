//! F2: what one fork writes, to disk or memory, no other fork sees.

use offshoot_tests::{Bench, Kind};

#[test]
fn f2_writes_to_disk_and_memory_stay_in_their_fork() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let forks = bench.fork(&template, &["-n", "2", "--name", "twin"]);
    let write = "echo $OFFSHOOT_ID > /root-file; echo $OFFSHOOT_ID >> /etc/passwd; rm /bin/vi; mkdir /new; \
        echo $OFFSHOOT_ID > /dev/shm/memory; echo $OFFSHOOT_ID > /tmp/temporary; sync";
    let look = "cat /root-file /dev/shm/memory /tmp/temporary 2>/dev/null; tail -n 1 /etc/passwd; ls -d /bin/vi /new 2>/dev/null; true";
    let untouched = bench.sh(&forks[1], look);
    assert!(untouched.contains("/bin/vi") && !untouched.contains("/new"), "{untouched}");

    let _ = bench.sh(&forks[0], write);
    let written = bench.sh(&forks[0], look);
    assert_eq!(written.matches(forks[0].id()).count(), 4, "the check sees what was written: {written}");
    assert!(written.contains("/new") && !written.contains("/bin/vi"), "{written}");

    assert_eq!(bench.sh(&forks[1], look), untouched);
    // A later fork of the template starts where the template is, not where another fork got to.
    let later = bench.fork_one(&template, &["--name", "later"]);
    assert_eq!(bench.sh(&later, look), untouched);
    // And the other way round, with what both have.
    let _ = bench.sh(&forks[1], write);
    assert_eq!(bench.sh(&forks[0], look), written);
    bench.end();
}
