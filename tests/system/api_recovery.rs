//! O2 for the daemon: whatever is killed, a daemon that starts finds out what is true, and clients see that.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::net::UnixStream,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use offshoot_tests::{Bench, Daemon, Kind, bench::wait_until, daemon::ask, processes};
use serde_json::{Value, json};

use crate::recovery::{own_leftovers, points};

/// Ids of the forks that the daemon knows, by state.
fn states(daemon: &Daemon) -> BTreeMap<String, String> {
    let list = daemon.get("/v1/forks?limit=1000").expect(200).json();
    let text = |fork: &Value, field: &str| fork[field].as_str().unwrap().to_owned();
    list["forks"].as_array().unwrap().iter().map(|fork| (text(fork, "id"), text(fork, "state"))).collect()
}

#[test]
fn o2_forks_live_through_the_end_and_the_crash_of_the_daemon() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let mut daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({"template": template.tag, "count": 3, "name": "f"}));
    let pids: Vec<u32> = forks.iter().map(|fork| u32::try_from(fork["pid"].as_u64().unwrap()).unwrap()).collect();
    daemon.crash();
    assert!(pids.iter().all(|pid| processes::is_alive(*pid)), "a crash of the daemon ends no fork");
    processes::kill(pids[2]);
    let mut daemon = Daemon::start(&bench, &[]);
    assert_eq!(daemon.sh("f-1", "hostname"), "f-1");
    // The one that died meanwhile was reaped with everything it held.
    daemon.get("/v1/forks/f-3").refused(404, "fork_not_found");
    assert_eq!(states(&daemon).values().collect::<Vec<_>>(), ["running", "running"]);
    assert_eq!(bench.entries("names"), ["f-1", "f-2"]);
    // Taken up again: it is ended, not only forgotten.
    let _ = daemon.delete("/v1/forks/f-2").expect(204);
    assert!(!processes::is_alive(pids[1]));
    assert!(daemon.end().success());
    assert!(processes::is_alive(pids[0]), "an orderly end of the daemon ends no fork");
    bench.end();
}

#[test]
fn o2_there_is_one_daemon_for_a_state_directory() {
    let bench = Bench::new();
    let daemon = Daemon::start(&bench, &[]);
    let refused = bench.offshoot(&["serve"]).exits(1);
    let error = refused.refused("already_served");
    assert!(error["message"].as_str().unwrap().contains(&daemon.pid().to_string()), "{error}");
    assert_eq!(daemon.get("/healthz").status, 200, "the first is not disturbed");
    drop(daemon);
    // Not even a socket that was left, or something else in its place, is in the way or is lost.
    let daemon = Daemon::start(&bench, &[]);
    drop(daemon);
    let place = bench.state().join("api/offshoot.sock");
    let _ = fs::remove_file(&place);
    fs::write(&place, "mine").unwrap();
    bench.offshoot(&["serve"]).exits(2).refused("socket_path_taken");
    assert_eq!(fs::read_to_string(&place).unwrap(), "mine");
    fs::remove_file(&place).unwrap();
    bench.end();
}

#[test]
fn o2_an_orderly_end_lets_requests_end_and_undoes_what_takes_too_long() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let mut daemon = Daemon::start(&bench, &["--grace", "60"]);
    let fork = daemon.fork(&json!({"template": template.tag, "name": "f", "count": 2}));
    assert_eq!(fork.len(), 2);
    thread::scope(|scope| {
        let answer = scope.spawn(|| {
            daemon.post("/v1/forks/f-1/exec", &json!({"argv": ["sh", "-c", "touch /tmp/begun; sleep 3; echo done"]}))
        });
        wait_until("the command runs", Duration::from_secs(30), || {
            bench.exec(&offshoot_tests::Fork { record: json!({"name": "f-1"}) }, &["test", "-e", "/tmp/begun"]).code
                == Some(0)
        });
        daemon.signal(rustix::process::Signal::TERM);
        assert_eq!(answer.join().unwrap().expect(200).json()["stdout"], "done\n");
    });
    assert!(daemon.wait().success());

    // A fork that waits longer than that for an ack is undone, and the others live on.
    let template = bench.template(Kind::Mailboxes);
    let mut daemon = Daemon::start(&bench, &["--grace", "1"]);
    let mailboxes = json!([{"name": "foo", "payload": {}, "wait_for_ack": true, "ack_timeout_ms": 30000}]);
    let body = json!({"template": template.tag, "mailboxes": mailboxes}).to_string();
    let begun = Instant::now();
    thread::scope(|scope| {
        let head = ["Content-Type: application/json"];
        let connection = daemon.connect();
        let asking = scope.spawn(move || ask(connection, "POST", "/v1/forks", &head, body.as_bytes()));
        wait_until("the fork is begun", Duration::from_secs(30), || {
            bench.entries("forks").iter().any(|name| name.starts_with(".new-"))
        });
        daemon.signal(rustix::process::Signal::TERM);
        let _ = asking.join().unwrap();
    });
    assert!(daemon.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(25), "its ack was not awaited to the end");
    assert_eq!((bench.entries("forks").len(), bench.entries("names")), (2, vec!["f-1".to_owned(), "f-2".to_owned()]));
    bench.end();
}

#[test]
fn o2_a_crash_at_any_step_of_a_fork_leaves_nothing_half_made_and_the_key_tells() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let neighbour = bench.fork_one(&template, &["--name", "neighbour"]);
    for point in points("fork").keys() {
        // The daemon is killed at this step of the first fork it makes.
        let mut daemon = Daemon::with_fault(&bench, &format!("{point}:kill"));
        let body = json!({"template": template.tag, "count": 2, "name": "f"}).to_string();
        let head = ["Content-Type: application/json", &format!("Idempotency-Key: {point}")];
        let lost = ask(daemon.connect(), "POST", "/v1/forks", &head, body.as_bytes());
        assert!(lost.is_err() || lost.is_ok_and(|answer| answer.body.is_empty()), "{point}: the daemon dies");
        let _ = daemon.wait();

        let again = Daemon::start(&bench, &[]);
        assert_eq!(own_leftovers(&bench), Vec::<String>::new(), "{point}");
        let there = states(&again);
        assert_eq!(there.get(neighbour.id()).map(String::as_str), Some("running"), "{point}");
        assert!(there.values().all(|state| state == "running"), "{point}: {there:?}");
        let answer = again.request("POST", "/v1/forks", &head, body.as_bytes());
        if there.len() == 1 {
            answer.refused(503, "interrupted");
            // The key is free again.
            let made = again.request("POST", "/v1/forks", &head, body.as_bytes()).expect(201).json();
            assert_eq!(made["results"].as_array().unwrap().len(), 2, "{point}");
        } else {
            let made = answer.expect(201).json();
            let forks: BTreeSet<&str> =
                made["results"].as_array().unwrap().iter().filter_map(|result| result["fork"]["id"].as_str()).collect();
            assert_eq!(forks.len() + 1, there.len(), "{point}: {made}");
        }
        for id in states(&again).keys().filter(|id| *id != neighbour.id()) {
            let _ = again.delete(&format!("/v1/forks/{id}")).expect(204);
        }
        drop(again);
    }
    assert_eq!(bench.sh(&neighbour, "hostname"), "neighbour");
    bench.end();
}

#[test]
fn o2_after_a_reboot_there_are_no_forks_and_no_leftovers() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let mut daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({"template": template.tag, "count": 2}));
    daemon.crash();
    // What a reboot does: every process is gone, and so is the runtime directory.
    for fork in &forks {
        processes::kill(u32::try_from(fork["pid"].as_u64().unwrap()).unwrap());
    }
    wait_until("the machines have ended", Duration::from_secs(30), || processes::inside(bench.state()).is_empty());
    for entry in fs::read_dir(bench.state()).unwrap() {
        fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    let daemon = Daemon::start(&bench, &[]);
    assert!(states(&daemon).is_empty());
    let made = daemon.fork(&json!({"template": template.tag, "count": 2}));
    assert_eq!(made.len(), 2);
    drop(daemon);
    bench.end();
}

#[test]
fn o2_a_full_disk_is_said_and_nothing_is_half_made() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("s");
    let serve = bench.plain(&[]);
    // A file system of its own, that nobody else sees.
    let script = "mount -t tmpfs -o size=96k none \"$OFFSHOOT_STATE_DIR\" && exec \"$0\" serve --socket \"$1\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(serve.get_program()).arg(&socket);
    for (name, value) in serve.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let daemon = Daemon::run(command, &socket);
    let mut made = Vec::new();
    // A fork has some 30 KiB of state: the disk is full after a few.
    let refused = (0..40).find_map(|_| {
        let answer = daemon.post("/v1/forks", &json!({"template": template.tag}));
        match answer.status {
            201 => {
                made.push(answer.json()["results"][0]["fork"]["id"].as_str().unwrap().to_owned());
                None
            }
            _ => Some(answer),
        }
    });
    let problem = refused.expect("the disk is full some time").json();
    assert!(problem["status"].as_u64().unwrap() >= 500 && problem.to_string().contains("No space left"), "{problem}");
    assert_eq!(states(&daemon).into_keys().collect::<BTreeSet<_>>(), made.iter().cloned().collect());
    assert_eq!(daemon.get("/readyz").status, 200);
    for id in &made {
        let _ = daemon.delete(&format!("/v1/forks/{id}")).expect(204);
    }
    let _ = daemon.fork(&json!({"template": template.tag}));
    for id in states(&daemon).keys() {
        let _ = daemon.delete(&format!("/v1/forks/{id}")).expect(204);
    }
    drop(daemon);
    bench.end();
}

/// Random kills under load: of machines and of the daemon, while clients make, ask and end forks. `OFFSHOOT_TEST_KILLS` says how many.
/// Tells clients to end.
struct EndAtDrop<'a>(&'a AtomicBool);

impl Drop for EndAtDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn o2_random_kills_under_load_lose_nothing_and_leave_nothing() {
    let kills: u64 = std::env::var("OFFSHOOT_TEST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let keeper = bench.fork_one(&template, &["--name", "keeper"]);
    let (ending, made) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut daemon = Daemon::start(&bench, &[]);
    let socket = bench.state().join("api/offshoot.sock");
    let mut seed = Instant::now().elapsed().subsec_nanos() as u64 ^ u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    thread::scope(|scope| {
        for client in 0..2 {
            let (template, socket, ending, made) = (&template, &socket, &ending, &made);
            scope.spawn(move || {
                let send = |method: &str, path: &str, body: &Value| {
                    let stream = UnixStream::connect(socket).ok()?;
                    stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
                    let head = ["Content-Type: application/json"];
                    ask(stream, method, path, &head, body.to_string().as_bytes()).ok()
                };
                let mut round = 0;
                while !ending.load(Ordering::Relaxed) {
                    round += 1;
                    let name = format!("c{client}-{round}");
                    let body = json!({"template": template.tag, "name": name});
                    let Some(answer) = send("POST", "/v1/forks", &body) else {
                        thread::sleep(Duration::from_millis(20));
                        continue;
                    };
                    if answer.status == 201 {
                        made.fetch_add(1, Ordering::Relaxed);
                        let asked = send("POST", &format!("/v1/forks/{name}/exec"), &json!({"argv": ["hostname"]}));
                        if let Some(answer) = asked.filter(|answer| answer.status == 200) {
                            assert_eq!(answer.json()["stdout"], format!("{name}\n"), "an answer is the fork's own");
                        }
                        let _ = send("DELETE", &format!("/v1/forks/{name}"), &Value::Null);
                    }
                }
            });
        }
        // Also if something below fails: the clients would go on for ever.
        let _ending = EndAtDrop(&ending);
        for number in 0..kills {
            thread::sleep(Duration::from_millis(20 + random(300)));
            if number % 4 == 0 {
                // However slow the machine is, some forks are made in between.
                let before = made.load(Ordering::Relaxed);
                wait_until("a fork is made", Duration::from_secs(180), || made.load(Ordering::Relaxed) > before);
            }
            let victims: Vec<u32> = processes::inside(bench.state())
                .into_iter()
                .filter(|pid| *pid != keeper.pid() && *pid != daemon.pid())
                .collect();
            if random(4) == 0 || victims.is_empty() {
                daemon.crash();
                daemon = Daemon::start(&bench, &[]);
            } else {
                processes::kill(victims[usize::try_from(random(victims.len() as u64)).unwrap()]);
            }
        }
    });
    assert!(made.load(Ordering::Relaxed) > 2, "there was load");
    daemon.crash();
    let daemon = Daemon::start(&bench, &[]);
    assert_eq!(own_leftovers(&bench), Vec::<String>::new());
    let there = states(&daemon);
    assert_eq!(there.get(keeper.id()).map(String::as_str), Some("running"), "what was not killed lives");
    for id in there.keys() {
        assert_eq!(daemon.sh(id, "echo $OFFSHOOT_ID"), *id);
    }
    // What is on disk and what runs is the same.
    let running = processes::inside(bench.state()).into_iter().filter(|pid| *pid != daemon.pid()).count();
    assert_eq!(running, there.len());
    drop(daemon);
    bench.end();
}
