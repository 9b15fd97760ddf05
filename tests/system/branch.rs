//! F6, I15: children of a fork that runs begin where it is, each as itself, and it goes on.

use std::{collections::BTreeSet, fs, time::Duration};

use offshoot_tests::{Bench, Fork, Kind, Run, bench::wait_until};
use serde_json::{Value, json};

use crate::{
    recovery::{own_leftovers, points, says_what_to_do},
    standby::{counted, on_disk, who, work},
};

/// Forks a fork; the children, and what is said of the source.
#[track_caller]
fn fork_from(bench: &Bench, source: &str, args: &[&str]) -> (Vec<Fork>, Value) {
    let made = bench.offshoot(&[&["fork", "--from", source], args].concat()).ok().json();
    assert_eq!(made["failed"], json!([]), "{made}");
    let forks = made["forks"].as_array().unwrap().iter().map(|record| Fork { record: record.clone() }).collect();
    (forks, made["source"].clone())
}

#[test]
fn f6_children_of_a_fork_that_runs_are_themselves_and_begin_at_one_moment() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let secret = bench.state().join("secret");
    fs::write(&secret, "hunter2-of-the-source").unwrap();
    let given = format!("KEY=@{}", secret.display());
    let source = bench.fork_one(&template, &["--name", "source", "--env", "OF=source", "--secret", &given]);
    work(&bench, &source, "source");
    let before = who(&bench, &source);
    let at_first = counted(&bench, &source).0;
    let (children, pause) = fork_from(&bench, "source", &["-n", "3", "--name", "child", "--env", "MINE=yes"]);
    assert!(pause["frozen_micros"].as_u64() >= pause["stopped_micros"].as_u64(), "{pause}");
    // The source is who it was, and goes on.
    assert_eq!(who(&bench, &source), before);
    let now = counted(&bench, &source).0;
    wait_until("the loop going on", Duration::from_secs(20), || counted(&bench, &source).0 > now);

    let template_facts = &template.manifest["facts"];
    let mut seen: Vec<Vec<Value>> = Vec::new();
    let draw = "open('/etc/machine-id').read().strip(), open('/proc/sys/kernel/random/boot_id').read().strip(), \
        os.environ['OFFSHOOT_ID'], os.uname().nodename, os.urandom(16).hex(), random.random(), float(np.random.rand())";
    for fork in children.iter().chain([&source]) {
        seen.push(bench.eval(fork, draw).as_array().unwrap().clone());
    }
    for field in 0..seen[0].len() {
        let distinct: BTreeSet<String> = seen.iter().map(|seen| seen[field].to_string()).collect();
        assert_eq!(distinct.len(), seen.len(), "two share {distinct:?}");
        assert!(template_facts.as_object().unwrap().values().all(|fact| !distinct.contains(&fact.to_string())));
    }
    for child in &children {
        assert_eq!(child.text("source"), source.id());
        // One moment of memory and disk, not before the request, and each goes on by itself.
        assert_eq!(bench.eval(child, "mine, open('/root/kept').read()"), json!(["source", "source"]));
        let (memory, disk) = counted(&bench, child);
        assert_eq!(memory, disk);
        assert!(memory >= at_first);
        wait_until("the loop going on", Duration::from_secs(20), || counted(&bench, child).0 > memory);
        // Nothing of who the source is.
        let own = bench.sh(child, "env; ls /run/offshoot/secrets /run/offshoot/env; cat /run/offshoot/identity.json");
        assert!(own.contains("MINE") && !own.contains("KEY") && !own.contains("OF=source"), "{own}");
        let name = child.name();
        let found = "grep -rlE 'hunter2-of-the-(source)' /run /etc /root /tmp /var /home 2>/dev/null || true";
        assert_eq!(bench.sh(child, found), "", "{name}");
    }
    let found = "grep -rl 'hunter2-of-the-source' /run 2>/dev/null || true";
    assert!(bench.sh(&source, found).contains("secrets/KEY"), "the check can fail");
    assert_eq!(on_disk(&bench, source.id()), Vec::<String>::new(), "children have their own copies");
    // They are no part of each other.
    let _ = bench.eval(&children[0], "mine = 'changed'");
    assert_eq!(bench.eval(&children[1], "mine"), "source");
    let _ = bench.offshoot(&["kill", "source"]).ok();
    assert_eq!(bench.eval(&children[1], "mine"), "source");
    bench.end();
}

#[test]
fn f6_a_branch_of_a_branch_is_one_layer_deep() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let _other = bench.fork_one(&template, &["--name", "other"]);
    let mut last = bench.fork_one(&template, &["--name", "line-0"]);
    let _ = bench.eval(&last, "line = []");
    let mut written = Vec::new();
    for depth in 1..=4 {
        let _ = bench.eval(&last, &format!("line.append({depth}); open('/root/{depth}', 'w').write('x')"));
        let (mut made, source) = fork_from(&bench, last.name(), &["--name", &format!("line-{depth}")]);
        written.push(source["written_bytes"].as_u64().unwrap());
        let next = made.remove(0);
        assert_eq!(next.text("source"), last.id());
        assert_eq!(bench.eval(&next, "line, sorted(os.listdir('/root'))[:4]")[0].as_array().unwrap().len(), depth);
        last = next;
    }
    // What is written is what differs from the template, not a sum of layers.
    assert!(written[3] < written[0] * 3, "{written:?}");
    let _ = bench.offshoot(&["standby", last.name()]).ok();
    let (children, source) = fork_from(&bench, last.name(), &["-n", "2"]);
    assert_eq!(source, Value::Null, "nothing is held up");
    let drawn: BTreeSet<_> =
        children.iter().map(|fork| bench.eval(fork, "str(line), random.random()").to_string()).collect();
    assert_eq!(drawn.len(), 2);
    assert!(drawn.iter().all(|drawn| drawn.contains("[1, 2, 3, 4]")), "{drawn:?}");
    let _ = bench.offshoot(&["resume", last.name()]).ok();
    assert_eq!(bench.eval(&last, "line"), json!([1, 2, 3, 4]));
    bench.end();
}

#[test]
fn i15_what_is_on_disk_of_a_fork_does_not_hold_its_secrets() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    let secret = bench.state().join("secret");
    // Random, and as long as a page: no other memory looks like it.
    let text: String =
        (0..64).map(|index| format!("sealed-{index:02}-{:08x};", 0x9e37_79b9_u32.wrapping_mul(index + 1))).collect();
    fs::write(&secret, &text).unwrap();
    let given = format!("KEY=@{}", secret.display());
    let forks = [
        bench.fork_one(&template, &["--name", "first", "--secret", &given]),
        bench.fork_one(&template, &["--name", "second", "--secret", &given]),
    ];
    let _ = bench.sh(&forks[0], "echo planted-$((40+2))-in-the-clear > /tmp/planted");
    let _ = bench.offshoot(&["standby", "first", "second"]).ok();
    let holds = |fork: &Fork, text: &str| {
        let dir = bench.data().join("snapshots").join(fork.id());
        let files = fs::read_dir(dir).unwrap().flatten().map(|entry| fs::read(entry.path()).unwrap());
        files.into_iter().any(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    assert!(holds(&forks[0], "planted-42-in-the-clear"), "the check can fail");
    assert!(!holds(&forks[1], "planted-42-in-the-clear"));
    for fork in &forks {
        for part in text.as_bytes().chunks(20) {
            let part = std::str::from_utf8(part).unwrap();
            assert!(!holds(fork, part), "{part} of the secret is on disk");
        }
    }
    let (children, _) = fork_from(&bench, "first", &["-n", "2"]);
    for child in &children {
        assert_eq!(bench.sh(child, "ls /run/offshoot/secrets"), "");
    }
    let _ = bench.offshoot(&["resume", "first", "second"]).ok();
    for fork in &forks {
        assert_eq!(bench.sh(fork, "cat /run/offshoot/secrets/KEY"), text.trim_end());
    }
    bench.end();
}

#[test]
fn i11_a_child_has_none_of_its_sources_connections_and_the_source_keeps_them() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Networked);
    let source = bench.fork_one(&template, &["--name", "source", "--net", "shared"]);
    let peer = bench.fork_one(&template, &["--name", "peer", "--net", "shared"]);
    let _ = bench.sh(&peer, "setsid sh -c 'nc -l -p 7070 -e cat' >/dev/null 2>&1 &");
    let _ = bench.sh(&peer, "until netstat -ltn | grep -q :7070; do sleep 0.1; done");
    let connect = format!(
        "mkfifo /tmp/to.in; setsid sh -c 'nc {} 7070 <>/tmp/to.in >/tmp/to.out; echo $? >/tmp/to.end' >/dev/null 2>&1 & \
         echo first >/tmp/to.in; until grep -q first /tmp/to.out; do sleep 0.1; done",
        peer.address()
    );
    let _ = bench.sh(&source, &connect);
    let established = "awk '$4 == \"01\" && $2 !~ /^0100007F/ { print $2, $3 }' /proc/net/tcp";
    assert_ne!(bench.sh(&source, established), "", "the check can fail");
    let (children, _) = fork_from(&bench, "source", &["-n", "2", "--net", "shared"]);
    for child in &children {
        assert_eq!(bench.sh(child, established), "", "{}", child.name());
        wait_until("the connection's end", Duration::from_secs(20), || {
            bench.sh(child, "test -e /tmp/to.end && echo ended || true") == "ended"
        });
        assert_ne!(child.address(), source.address());
    }
    let _ = bench.sh(&source, "echo second >/tmp/to.in");
    wait_until("the answer", Duration::from_secs(20), || bench.sh(&source, "cat /tmp/to.out") == "first\nsecond");
    bench.end();
}

#[test]
fn o2_a_fork_of_a_fork_that_fails_or_dies_anywhere_leaves_the_source_as_it_was() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let neighbour = bench.fork_one(&template, &["--name", "neighbour"]);
    let source = bench.fork_one(&template, &["--name", "source"]);
    work(&bench, &source, "source");
    let before = who(&bench, &source);
    let mut all: Vec<String> = points("capture").into_keys().collect();
    all.extend(["fork.loaded", "fork.acked"].map(ToOwned::to_owned));
    for point in &all {
        for action in ["error", "kill"] {
            let run: Run = bench
                .offshoot_with_fault(&format!("{point}:{action}"), &["fork", "--from", "source", "--name", "child"]);
            assert_ne!(run.code, Some(0), "{point}:{action}: {run}");
            if action == "error" {
                says_what_to_do(&run);
            } else {
                let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
            }
            let (memory, disk) = counted(&bench, &source);
            assert_eq!(memory, disk, "{point}:{action}");
            wait_until("the loop going on", Duration::from_secs(20), || counted(&bench, &source).0 > memory);
            assert_eq!(who(&bench, &source), before, "{point}:{action}");
            assert_eq!(bench.ls().len(), 2, "{point}:{action}");
            assert_eq!(own_leftovers(&bench), Vec::<String>::new(), "{point}:{action}");
            assert_eq!(on_disk(&bench, source.id()), Vec::<String>::new(), "{point}:{action}");
        }
    }
    assert_eq!(bench.eval(&neighbour, "1 + 1"), 2);
    let (children, _) = fork_from(&bench, "source", &["--name", "child"]);
    assert_eq!(bench.eval(&children[0], "mine"), "source", "the check can fail");
    // A machine that is killed in the middle is a fork that died; nobody waits for it.
    let run = bench.offshoot_with_fault("capture.paused:kill-engine", &["fork", "--from", "source"]);
    assert_ne!(run.code, Some(0), "{run}");
    bench.offshoot(&["eval", "source", "--", "1"]).exits(1).refused("fork_dead");
    bench.end();
}

#[test]
fn requests_that_can_not_be_met_leave_the_source_alone() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let forks = bench.fork(&template, &["-n", "2", "--name", "source"]);
    bench.offshoot(&["fork", "--from", "nobody"]).exits(1).refused("fork_not_found");
    bench.offshoot(&["fork", "--from", "source-1", "-n", "0"]).exits(2).refused("out_of_range");
    bench.offshoot(&["fork", "--from", "source-1", &template.tag]).exits(2).refused("argument_conflict");
    bench.offshoot(&["fork", "--from", "source-1", "--name", "source-2"]).exits(1).refused("name_conflict");
    bench.offshoot(&["fork", "--from", "source-1", "--mailbox", "none={}"]).exits(1).refused("mailbox_not_found");
    // Whatever can be seen without its memory is seen before it is frozen: a command that got that far dies.
    let large = format!("A={}", "a".repeat(100_000));
    let many: Vec<String> = (0..17).flat_map(|number| ["--mailbox".to_owned(), format!("m{number}={{}}")]).collect();
    let wrong: [(&[&str], &str); 6] = [
        (&["--env", "LD_PRELOAD=/tmp/x.so"], "variable_not_allowed"),
        (&["--env", &large], "identity_too_long"),
        (&["--mailbox", "offshoot:identity={}"], "mailbox_reserved"),
        (&["--mailbox", "m=[]"], "payload_not_an_object"),
        (&["--mailbox", "m={}", "--ack-timeout-ms", "30001"], "out_of_range"),
        (&many.iter().map(String::as_str).collect::<Vec<_>>(), "too_many_mailboxes"),
    ];
    let begin = |args: &[&str]| {
        bench.offshoot_with_fault("capture.noted:kill", &[&["fork", "--from", "source-2"], args].concat())
    };
    for (args, code) in wrong {
        let _ = begin(args).refused(code);
    }
    assert_eq!(begin(&["--mailbox", "none={}"]).code, None, "the check can fail");
    for fork in &forks {
        assert_eq!(bench.sh(fork, "hostname"), fork.name());
        assert_eq!(on_disk(&bench, fork.id()), Vec::<String>::new());
    }
    assert_eq!(own_leftovers(&bench), Vec::<String>::new());
    bench.end();
}
