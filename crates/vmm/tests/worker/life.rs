//! With whom a worker ends.

use super::*;

#[test]
fn a_killed_worker_takes_no_other_along() {
    let (mut one, mut first) = Worker::start(Purpose::Fork);
    let (mut two, mut second) = Worker::start(Purpose::Fork);
    first.done(&Request::Resume);
    second.done(&Request::Resume);
    one.child.kill().unwrap();
    one.end();
    assert_eq!(first.ask(&Request::Status, None), None);
    assert!(two.is_alive());
    assert_eq!(second.phase(), is(Phase::Running));
}

#[test]
fn who_is_left_before_the_first_run_is_of_no_use() {
    let (mut fork, mut client) = Worker::start(Purpose::Fork);
    client.phase();
    drop(client);
    assert!(fork.end().success());
}

#[test]
fn a_fork_that_runs_and_a_spare_live_on_alone() {
    let (mut fork, mut client) = Worker::start(Purpose::Fork);
    client.done(&Request::Resume);
    drop(client);
    assert_eq!(Client::connect(&fork.dir).phase(), is(Phase::Running));
    let (mut spare, mut client) = Worker::start(Purpose::Spare);
    client.phase();
    drop(client);
    assert_eq!(Client::connect(&spare.dir).phase(), is(Phase::Loaded));
    assert!(fork.is_alive() && spare.is_alive());
}

#[test]
fn a_template_ends_with_its_builder_even_while_it_runs() {
    let (mut template, mut client) = Worker::start(Purpose::Template);
    client.done(&Request::Resume);
    drop(client);
    assert!(template.end().success());
}

#[test]
fn a_worker_that_can_not_start_says_why() {
    let refused = Command::new(program()).arg("{}").stderr(Stdio::piped()).output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("launch document"));
}

/// The host takes a closed connection for the end, and reads the log then.
#[test]
fn a_worker_that_can_not_load_has_said_why_when_its_connection_closes() {
    for _ in 0..20 {
        let (mut worker, mut client) = Worker::start_with(Purpose::Fork, Vec::new(), MEMORY + 4096);
        assert_eq!(client.ask(&Request::Status, None), None);
        let log = worker.log();
        assert!(log.contains("memory file"), "{log}");
        assert_eq!(worker.end().code(), Some(1));
    }
}
