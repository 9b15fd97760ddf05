//! I13, I14: services that wait for who they are, the variables and the payload they are given, and the endpoint that tells it.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    process::Stdio,
    time::Duration,
};

use offshoot_tests::{Bench, Daemon, Fork, Kind, bench::wait_until};
use serde_json::{Value, json};

use crate::forward::{forward, forward_far};

const LIMIT: Duration = Duration::from_secs(60);

/// What is answered to a request at the identity endpoint, through `offshoot forward`: the status and the body.
fn ask(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn post(address: &str, payload: &Value) -> u16 {
    ask(address, "POST", "/internal/fork-identity", &payload.to_string()).0
}

/// What the endpoint tells a program of the fork.
fn told(bench: &Bench, fork: &Fork) -> (u16, Value) {
    let answer = bench.sh(fork, "ask get");
    let (status, body) = answer.split_once(' ').unwrap();
    (status.parse().unwrap(), serde_json::from_str(body).unwrap())
}

fn logs(bench: &Bench, fork: &Fork) -> String {
    bench.plain_ok(&["logs", fork.name()])
}

fn said(bench: &Bench, fork: &Fork, line: &str) {
    wait_until(line, LIMIT, || logs(bench, fork).contains(line));
}

#[test]
fn i13_i14_forks_wait_for_the_payload_that_is_posted_and_each_has_its_own() {
    let bench = Bench::new();
    let template = bench.template(Kind::Services);
    let forks = bench.fork(&template, &["-n", "2", "--name", "w", "--network", "none"]);
    for fork in &forks {
        let steps = fork.record["guest_steps"].as_array().unwrap();
        let outcome = |name: &str| {
            let step = steps.iter().find(|step| step["step"] == format!("service.{name}"));
            step.unwrap_or_else(|| panic!("{steps:?}"))["outcome"].clone()
        };
        assert_eq!(outcome("early"), "hook-ran-before-thaw");
        assert_eq!(
            (outcome("waiting"), outcome("stubborn"), outcome("told")),
            ("waits".into(), "stopped".into(), "told".into())
        );

        // The hook had its fork's name, and the workload stood still beside it.
        let logs = logs(&bench, fork);
        let hook = logs.lines().find_map(|line| line.split_once("hook of ")).unwrap_or_else(|| panic!("{logs}")).1;
        let (name, ticks) = hook.split_once(": ").unwrap();
        let (before, after) = ticks.split_once(' ').unwrap();
        assert_eq!((name, before), (fork.name(), after));
        let ticks = "cat /tmp/ticks";
        assert_ne!(bench.sh(fork, ticks), before, "it goes on afterwards");
        assert!(logs.contains(&format!("told {} of nobody", fork.name())), "{logs}");

        // Nobody knows the payload yet, and the template's value of its variable is not there either.
        assert_eq!(told(&bench, fork), (202, json!({"state": "waiting"})));
        assert_eq!(bench.sh(fork, "echo ${TENANT-none} $OFFSHOOT_NAME"), format!("none {}", fork.name()));
        assert!(!logs.contains("waited for"), "{logs}");
    }

    let endpoints = forks.iter().map(|fork| forward(&bench, fork, &["identity"])).collect::<Vec<_>>();
    let at = |index: usize| endpoints[index].addresses[0].as_str();
    assert_eq!(bench.sh(&forks[0], "ask post '{\"tenant\": \"evil\"}'"), "403", "the workload is not the host");
    assert_eq!(ask(at(0), "POST", "/internal/fork-identity", "{").0, 400);
    assert_eq!(post(at(0), &json!({"PATH": "/evil"})), 400);
    assert_eq!(post(at(0), &json!({"tenant": "x".repeat(70_000)})), 413);
    assert_eq!(told(&bench, &forks[0]).0, 202, "nothing of that was applied");

    // The second is never told the first one's, and the first not the second one's.
    for (index, tenant) in ["acme", "beta"].into_iter().enumerate() {
        let payload = json!({"tenant": tenant, "note": "n"});
        assert_eq!(post(at(index), &payload), 204);
        assert_eq!(post(at(index), &payload), 204, "again");
        assert_eq!(post(at(index), &json!({"tenant": "other"})), 409);
    }
    for (fork, tenant) in forks.iter().zip(["acme", "beta"]) {
        let name = fork.name();
        let (status, who) = told(&bench, fork);
        assert_eq!((status, &who["id"], &who["name"]), (200, &json!(fork.id()), &json!(name)));
        assert_eq!(who["fields"], json!({"tenant": tenant, "note": "n"}));
        // 204 meant that all of them had it.
        let logs = logs(&bench, fork);
        for line in [
            format!("waited for {name} of {tenant}"),
            format!("begun for {name} of {tenant}"),
            format!("told {name} of {tenant}"),
        ] {
            assert!(logs.contains(&line), "{line}: {logs}");
        }
        assert!(!logs.contains("the-template"), "{logs}");
        assert_eq!(bench.sh(fork, "echo $TENANT; cat /run/offshoot/env/TENANT"), format!("{tenant}\n{tenant}"));
        let file: Value = serde_json::from_str(&bench.sh(fork, "cat /run/offshoot/identity.json")).unwrap();
        assert_eq!((&file["fields"]["note"], &file["env"]["TENANT"]), (&json!("n"), &json!(tenant)));
        // One stubborn shell: the template's has been ended although it takes no signal that can be refused.
        assert_eq!(bench.sh(fork, "ps | grep -c '[b]egun for'"), "1");
    }

    // What one service may use holds for it, in each fork, and for nobody else.
    let tried = |text: &str| (text.contains("memory 0\n"), text.matches("process ").count());
    for fork in &forks {
        let (memory, processes) = tried(&logs(&bench, fork));
        assert!(!memory && (1..8).contains(&processes), "{}", logs(&bench, fork));
    }
    let script = "dd if=/dev/zero of=/dev/null bs=24M count=1 2>/dev/null; echo memory $?; \
        n=0; while [ $n -lt 20 ]; do sleep 1 & n=$((n+1)); echo process $n; done";
    assert_eq!(tried(&bench.sh(&forks[1], script)), (true, 20), "the check can fail");

    // Two services that have asked a thousand times each saw it whole or not at all.
    for fork in &forks {
        wait_until("both services have raced", LIMIT, || logs(&bench, fork).matches("whole ").count() == 2);
        let logs = logs(&bench, fork);
        for line in logs.lines().filter_map(|line| line.split_once("absent ")) {
            let numbers: Vec<u32> =
                line.1.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
            assert!(numbers[0] > 0 && numbers[1] > 0 && numbers[2] == 0, "{logs}");
        }
    }
    // The endpoint is on the loopback too, and takes no page of a browser for a local program.
    let wget = |host: &str| {
        bench.sh(&forks[1], &format!("wget -q -O - --header 'Host: {host}' http://127.0.0.1:9511/internal/fork-identity/config || echo refused"))
    };
    assert!(wget("localhost:9511").contains("\"beta\""));
    assert_eq!(wget("evil.example"), "refused");
    drop(endpoints);
    bench.end();
}

#[test]
fn i14_a_fork_of_a_fork_waits_anew_and_one_that_comes_back_does_not() {
    let bench = Bench::new();
    let template = bench.template(Kind::Services);
    let source = bench.fork_one(&template, &["--name", "source", "--network", "none"]);
    let endpoint = forward(&bench, &source, &["identity"]);
    assert_eq!(post(&endpoint.addresses[0], &json!({"tenant": "acme"})), 204);
    let made =
        bench.offshoot(&["fork", "--from", "source", "-n", "2", "--name", "child", "--network", "none"]).ok().json();
    let children: Vec<Fork> =
        made["forks"].as_array().unwrap().iter().map(|fork| Fork { record: fork.clone() }).collect();
    for child in &children {
        assert_eq!(told(&bench, child), (202, json!({"state": "waiting"})));
        assert_eq!(bench.sh(child, "echo ${TENANT-none}; ls /run/offshoot/env"), "none");
        assert_eq!(bench.sh(child, "ps | grep -c '[w]aited for' || true"), "0", "the source's is stopped");
    }
    let other = forward(&bench, &children[1], &["identity"]);
    assert_eq!(post(&other.addresses[0], &json!({"tenant": "gamma"})), 204);
    assert_eq!(told(&bench, &children[1]).1["fields"], json!({"tenant": "gamma"}));
    assert_eq!(told(&bench, &children[0]).0, 202);
    assert_eq!(told(&bench, &source).1["fields"], json!({"tenant": "acme"}));

    // One that comes while its fork is captured is kept for it, and no child has it.
    let own = forward(&bench, &children[0], &["identity"]);
    let capture = ["fork", "--from", children[0].name(), "--name", "grandchild", "--network", "none"];
    let mut capturing = bench.command(&capture).stdout(Stdio::null()).spawn().unwrap();
    assert_eq!(post(&own.addresses[0], &json!({"tenant": "delta"})), 204);
    assert!(capturing.wait().unwrap().success());
    assert_eq!(told(&bench, &children[0]).1["fields"], json!({"tenant": "delta"}));
    let get = ["exec", "grandchild", "--", "/bin/sh", "-c", "ask get"];
    assert!(bench.plain_ok(&get).starts_with("202 "));
    drop((endpoint, other, own));

    let _ = bench.offshoot(&["standby", "source"]).ok();
    let _ = bench.offshoot(&["resume", "source"]).ok();
    let (status, who) = told(&bench, &source);
    assert_eq!((status, &who["id"], &who["fields"]), (200, &json!(source.id()), &json!({"tenant": "acme"})));
    let endpoint = forward(&bench, &source, &["identity"]);
    assert_eq!(post(&endpoint.addresses[0], &json!({"tenant": "acme"})), 204);
    assert_eq!(post(&endpoint.addresses[0], &json!({"tenant": "gamma"})), 409);
    drop(endpoint);
    bench.end();
}

/// A recipe with an `[identity]` of this kind.
fn build(bench: &Bench, tag: &str, more: &str) {
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "name = \"mine\"\nmemory = \"128M\"\n[env]\nTENANT = \"the-template\"\n[rootfs]\nkind = \"busybox\"\n{more}"
    );
    fs::write(dir.path().join("recipe.toml"), text).unwrap();
    let _ = bench.offshoot(&["build", dir.path().to_str().unwrap(), "--tag", tag]).ok();
}

#[test]
fn i13_labels_become_variables_and_nobody_sets_what_programs_are_run_by() {
    let bench = Bench::with_own_data();
    let service = "[[services]]\nname = \"web\"\ncommand = [\"/bin/sh\", \"-c\", \"echo for ${TENANT-nobody}; exec sleep 100000\"]\non_fork = \"wait\"\nready_line = \"for\"\n";
    build(&bench, "labelled", &format!("[identity]\nport = 9511\n[identity.fields]\ntenant = \"TENANT\"\n{service}"));
    let fork = |args: &[&str]| bench.offshoot(&[&["fork", "labelled", "--network", "none"], args].concat());
    let made = |args: &[&str]| Fork { record: fork(args).ok().json()["forks"][0].clone() };
    let (acme, own, bare) = (
        made(&["--name", "acme", "--label", "tenant=acme", "--label", "x=y"]),
        made(&["--name", "own", "--label", "tenant=acme", "--env", "TENANT=own"]),
        made(&["--name", "bare"]),
    );
    for (fork, tenant, fields) in [
        (&acme, "acme", json!({"tenant": "acme"})),
        (&own, "own", json!({"tenant": "acme"})),
        (&bare, "nobody", json!({})),
    ] {
        assert_eq!(bench.sh(fork, "echo ${TENANT-nobody}"), tenant);
        said(&bench, fork, &format!("for {tenant}"));
        let answer = bench.sh(fork, "wget -q -O - http://127.0.0.1:9511/internal/fork-identity/config");
        let who: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!((&who["id"], &who["fields"]), (&json!(fork.id()), &fields));
        assert!(!logs(&bench, fork).contains("the-template"));
    }
    let endpoint = forward(&bench, &acme, &["identity"]);
    assert_eq!(post(&endpoint.addresses[0], &json!({"tenant": "other"})), 409, "it came with the fork");
    drop(endpoint);

    for variable in ["PATH=/evil", "LD_PRELOAD=/evil.so", "PYTHONPATH=/evil"] {
        let refused = fork(&["--env", variable]).exits(1).refused("variable_not_allowed");
        assert!(!refused.to_string().contains("/evil"), "{refused}");
    }
    assert_eq!(bench.ls().len(), 3, "nothing was made");
    // Where no payload is waited for, a template says so: the answer is in its service's error.
    let asks = "[[services]]\nname = \"asks\"\ncommand = [\"/bin/sh\", \"-c\", \"wget -q -O - http://127.0.0.1:9511/internal/fork-identity/config 2>/tmp/answer; echo asked; exec sleep 100000\"]\nready_line = \"asked\"\n";
    build(&bench, "allowing", &format!("[identity]\npayload = \"off\"\nport = 9511\nallow = [\"PATH\"]\n{asks}"));
    let run = bench.offshoot(&["fork", "allowing", "--network", "none", "--env", "PATH=/bin:/own"]).ok().json();
    let allowed = Fork { record: run["forks"][0].clone() };
    assert_eq!(bench.sh(&allowed, "echo $PATH"), "/bin:/own");
    assert!(bench.sh(&allowed, "cat /tmp/answer").contains("404 Not Found"));
    let endpoint = forward(&bench, &allowed, &["identity"]);
    assert_eq!(ask(&endpoint.addresses[0], "GET", "/internal/fork-identity/config", "").0, 200);
    assert_eq!(post(&endpoint.addresses[0], &json!({})), 409);
    drop(endpoint);
    let _ = bench
        .offshoot(&["fork", "allowing", "--network", "none", "--env", "LD_PRELOAD=x"])
        .exits(1)
        .refused("variable_not_allowed");
    // Where the recipe has no [identity] there is no endpoint.
    build(&bench, "without", "");
    let without =
        Fork { record: bench.offshoot(&["fork", "without", "--network", "none"]).ok().json()["forks"][0].clone() };
    assert_eq!(bench.sh(&without, "ls /run/offshoot/identity.sock || echo none"), "none");
    bench.end();
}

#[test]
fn i14_a_service_that_does_not_get_ready_fails_its_fork_and_the_others_live() {
    let bench = Bench::with_own_data();
    let service = "[[services]]\nname = \"web\"\ncommand = [\"/bin/sh\", \"-c\", \"case $TENANT in acme) echo ready;; late) echo waiting for better weather;; *) echo no tenant $TENANT; exit 9;; esac; exec sleep 100000\"]\non_fork = \"wait\"\nready_line = \"ready\"\ntimeout_s = 5\n";
    build(&bench, "picky", &format!("[identity]\n[identity.fields]\ntenant = \"TENANT\"\n{service}"));
    let fork = |name: &str, tenant: &str| {
        bench.offshoot(&["fork", "picky", "--network", "none", "--name", name, "--label", &format!("tenant={tenant}")])
    };
    let good = fork("good", "acme").ok().json()["forks"][0].clone();
    let text = fork("bad", "evil").exits(1).error().to_string();
    assert!(text.contains("web") && text.contains("no tenant evil") && text.contains('9'), "{text}");
    // One that never gets ready.
    let text = fork("slow", "late").exits(1).error().to_string();
    let never = "service web did not write \\\"ready\\\" in time";
    assert!(text.contains(never) && text.contains("waiting for better weather"), "{text}");
    assert_eq!(bench.ls(), [("good".to_owned(), true)]);
    assert_eq!(bench.sh(&Fork { record: good }, "echo $TENANT"), "acme");
    bench.end();
}

#[test]
fn i14_a_payload_that_takes_too_long_is_504_and_the_same_again_waits_for_it() {
    let bench = Bench::with_own_data();
    // Half a minute is what a post may take.
    let service = "[[services]]\nname = \"web\"\ncommand = [\"/bin/sh\", \"-c\", \"sleep 33; echo ready for $TENANT; exec sleep 100000\"]\non_fork = \"wait\"\nready_line = \"ready\"\n";
    build(
        &bench,
        "slow",
        &format!("[identity]\npayload = \"post\"\nport = 9511\n[identity.fields]\ntenant = \"TENANT\"\n{service}"),
    );
    let made = bench.offshoot(&["fork", "slow", "--network", "none"]).ok().json()["forks"][0].clone();
    let fork = Fork { record: made };
    let endpoint = forward(&bench, &fork, &["identity"]);
    let acme = json!({"tenant": "acme"});
    assert_eq!(post(&endpoint.addresses[0], &acme), 504);
    let (status, who) = ask(&endpoint.addresses[0], "GET", "/internal/fork-identity/config", "");
    assert!(
        status == 200 && who.contains("acme"),
        "it has its payload, and its service is being started: {status} {who}"
    );
    assert_eq!(post(&endpoint.addresses[0], &acme), 204);
    assert_eq!(logs(&bench, &fork).matches("ready for acme").count(), 1);
    drop(endpoint);
    bench.end();
}

#[test]
fn i14_a_payload_is_posted_through_the_daemon_as_well() {
    let bench = Bench::new();
    let template = bench.template(Kind::Services);
    let daemon = Daemon::start(&bench, &[]);
    let forks = bench.fork(&template, &["-n", "2", "--name", "far", "--network", "none"]);
    for (fork, tenant) in forks.iter().zip(["acme", "beta"]) {
        let forwarding = forward_far(&bench, fork, &["identity"]);
        assert_eq!(post(&forwarding.addresses[0], &json!({"tenant": tenant})), 204);
        assert_eq!(told(&bench, fork).1["fields"], json!({"tenant": tenant}));
    }
    let path = |to: &str| format!("/v1/forks/far-1/ports/{to}");
    for wrong in ["0", "65536", "identities", "-1"] {
        daemon.get(&path(wrong)).refused(400, "invalid_request");
    }
    drop(daemon);
    bench.end();
}
