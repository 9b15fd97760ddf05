//! The daemon: what the command line does, over HTTP, with real guests.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixDatagram,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use offshoot_tests::{Bench, Daemon, Kind, bench::wait_until, processes};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

fn field<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} is no text in {value}"))
}

#[test]
fn o1_forks_made_over_the_api_are_themselves_and_the_command_line_s_as_well() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let mut daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({
        "template": template.tag, "name": "w", "env": {"COMMON": "1"}, "labels": {"job": "x"},
        "children": [
            {"env": {"OWN": "one"}, "secrets": {"KEY": "hunter2-one"}},
            {"env": {"OWN": "two"}, "secrets": {"KEY": "hunter2-two"}, "files": [{"path": "/etc/own", "content": "two", "mode": "0600"}]},
        ],
    }));
    let script = "echo $OFFSHOOT_ID $OFFSHOOT_NAME $COMMON $OWN; cat /run/offshoot/secrets/KEY /etc/machine-id";
    let said: Vec<String> = forks.iter().map(|fork| daemon.sh(field(fork, "id"), script)).collect();
    for ((fork, said), own) in forks.iter().zip(&said).zip(["one", "two"]) {
        let (id, name, machine) = (field(fork, "id"), field(fork, "name"), field(fork, "machine_id"));
        assert_eq!(*said, format!("{id} {name} 1 {own}\nhunter2-{own}{machine}"));
        assert_eq!(fork["secrets"], json!(["KEY"]));
        assert!(!fork.to_string().contains("hunter2"));
        assert_ne!(machine, template.manifest["facts"]["machine_id"]);
    }
    assert_ne!(forks[0]["machine_id"], forks[1]["machine_id"]);
    assert_eq!(daemon.sh("w-2", "stat -c %a /etc/own; cat /etc/own"), "600\ntwo");

    // The other door leads to the same forks.
    // They are made side by side, so either may be the older one, and the first in a list.
    let names: BTreeSet<String> = bench.ls().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["w-1", "w-2"].map(str::to_owned).into());
    let theirs = bench.fork_one(&template, &["--name", "theirs"]);
    let list = daemon.get("/v1/forks").expect(200).json();
    assert_eq!((&list["total"], &list["forks"][2]["id"]), (&3.into(), &theirs.id().into()));
    let labelled = daemon.get("/v1/forks?label=job=x&state=running&limit=1").expect(200).json();
    assert_eq!((&labelled["total"], labelled["forks"].as_array().unwrap().len()), (&2.into(), 1));
    let next = format!("/v1/forks?label=job=x&limit=1&after={}", field(&labelled, "next"));
    let next = daemon.get(&next).expect(200).json();
    assert_eq!(next["next"], Value::Null);
    let paged = [&labelled, &next].map(|page| field(&page["forks"][0], "name").to_owned());
    assert_eq!(BTreeSet::from(paged), names);
    let _ = daemon.delete("/v1/forks/theirs").expect(204);
    daemon.get("/v1/forks/theirs").refused(404, "fork_not_found");
    assert_eq!(bench.offshoot(&["inspect", "theirs"]).exits(1).error()["code"], "fork_not_found");

    // No secret is in what the daemon keeps and says.
    assert!(!daemon.said().concat().contains("hunter2"));
    assert!(daemon.end().success());
    assert_eq!(bench.sh_of("w-1", "echo $OWN"), "one", "forks live on when the daemon ends");
    bench.end();
}

#[test]
fn o5_a_wrong_request_is_refused_before_any_work_and_names_its_field() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let tag = template.tag.as_str();
    for (body, status, code, at) in [
        (json!({"template": tag, "cuont": 1}), 400, "invalid_request", "cuont"),
        (json!({"template": tag, "count": 0}), 400, "invalid_request", "count"),
        (json!({"template": tag, "from": "x"}), 400, "invalid_request", "template"),
        (json!({"template": "../../etc"}), 400, "invalid_request", "template"),
        (json!({"template": "absent"}), 404, "template_not_found", ""),
        (json!({"from": "absent"}), 404, "fork_not_found", "from"),
        (json!({"template": tag, "secrets": "hunter2"}), 400, "invalid_request", "secrets"),
        (
            json!({"template": tag, "mailboxes": [{"name": "none", "payload": {}}]}),
            422,
            "mailbox_not_found",
            "mailboxes",
        ),
        (json!({"template": tag, "mailboxes": [{"name": "a", "payload": []}]}), 422, "mailbox_not_found", "mailboxes"),
        (
            json!({"template": tag, "mailboxes": [{"name": "offshoot:identity", "payload": {}}]}),
            400,
            "mailbox_reserved",
            "mailboxes",
        ),
        (json!({"template": tag, "children": [{}, {"labels": {"": "x"}}]}), 400, "invalid_field", "children[1].labels"),
        (json!({"template": tag, "children": [{"env": {"A": "\0"}}]}), 400, "invalid_field", "children[0].env"),
        (json!({"template": tag, "env": {"LD_PRELOAD": "/x"}}), 422, "variable_not_allowed", "env"),
        (json!({"template": tag, "limits": {"pids": 0}}), 400, "out_of_range", "limits.pids"),
        (json!({"template": tag, "limits": {"pids": 0}, "children": [{}]}), 400, "out_of_range", "limits.pids"),
        (json!({"template": tag, "network": {"timeout_ms": 30001}}), 400, "out_of_range", "network.timeout_ms"),
    ] {
        let problem = daemon.post("/v1/forks", &body).refused(status, code);
        if !at.is_empty() {
            assert_eq!(problem["field"], at, "{problem}");
        }
        assert!(!problem.to_string().contains("hunter2"), "{problem}");
    }
    daemon.request("POST", "/v1/forks", &[], b"{}").refused(415, "unsupported_media_type");
    let huge = vec![b' '; 9 << 20];
    daemon.request("POST", "/v1/forks", &["Content-Type: application/json"], &huge).refused(413, "body_too_large");
    daemon.get("/v1/nothing").refused(404, "no_such_route");
    daemon.delete("/v1/version").refused(405, "method_not_allowed");
    assert_eq!(bench.entries("forks"), Vec::<String>::new());
    drop(daemon);
    bench.end();
}

#[test]
fn o1_a_batch_has_one_result_for_each_and_all_or_nothing_leaves_nothing() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let _ = daemon.fork(&json!({"template": template.tag, "name": "taken"}));
    let children = json!([{"name": "free-1"}, {"name": "taken"}, {"name": "free-2"}]);
    let made = daemon.post("/v1/forks", &json!({"template": template.tag, "children": children})).expect(201).json();
    let names: Vec<_> =
        made["results"].as_array().unwrap().iter().map(|result| result["fork"]["name"].clone()).collect();
    assert_eq!(names, [json!("free-1"), Value::Null, json!("free-2")]);
    assert_eq!(made["results"][1]["error"]["code"], "name_conflict");
    for name in ["free-1", "free-2"] {
        let _ = daemon.delete(&format!("/v1/forks/{name}")).expect(204);
    }
    let body = json!({"template": template.tag, "children": children, "all_or_nothing": true});
    let problem = daemon.post("/v1/forks", &body).refused(409, "name_conflict");
    let codes: Vec<_> =
        problem["results"].as_array().unwrap().iter().map(|result| result["error"]["code"].clone()).collect();
    assert_eq!(codes, ["undone", "name_conflict", "undone"]);
    assert_eq!(daemon.get("/v1/forks").json()["total"], 1);
    drop(daemon);
    bench.end();
}

#[test]
fn i7_mailboxes_over_the_api_are_listed_checked_before_any_work_and_awaited() {
    let bench = Bench::new();
    let template = bench.template(Kind::Mailboxes);
    let daemon = Daemon::start(&bench, &[]);
    let listed = daemon.get(&format!("/v1/templates/{}/mailboxes", template.tag)).expect(200).json();
    for (name, planted_by, needs_token) in
        [("app:c", "self", false), ("honest", "socket", false), ("tokened", "socket", true), ("self", "self", true)]
    {
        let mut all = listed["mailboxes"].as_array().unwrap().iter();
        let mailbox = all.find(|mailbox| mailbox["name"] == name).unwrap_or_else(|| panic!("no {name} in {listed}"));
        assert_eq!((&mailbox["planted_by"], &mailbox["needs_token"]), (&planted_by.into(), &needs_token.into()));
    }
    assert_eq!(listed["ambiguous"][0]["name"], "double", "{listed}");

    let body = |mailboxes: Value| json!({"template": template.tag, "mailboxes": mailboxes});
    let honest = json!({"name": "honest", "payload": {}});
    let many: Vec<Value> = (0..17).map(|number| json!({"name": format!("m{number}"), "payload": {}})).collect();
    let long = json!({"x": "y".repeat(3776)});
    for (mailboxes, status, code) in [
        (json!(many), 400, "too_many_mailboxes"),
        (json!([honest, honest]), 400, "mailbox_twice"),
        (json!([honest, {"name": "app:c", "payload": long}]), 422, "payload_too_long"),
        (json!([{"name": "honest", "payload": {}, "ack_timeout_ms": 30001}]), 400, "out_of_range"),
        (json!([{"name": "honest", "payload": [1]}]), 400, "payload_not_an_object"),
        (json!([{"name": "double", "payload": {}}]), 422, "mailbox_ambiguous"),
        (json!([{"name": "tokened", "payload": {}}]), 422, "mailbox_token_mismatch"),
        (json!([{"name": "tokened", "token": "hunter2", "payload": {}}]), 422, "mailbox_token_mismatch"),
    ] {
        let problem = daemon.post("/v1/forks", &body(mailboxes)).refused(status, code);
        assert_eq!(problem["field"], "mailboxes", "{problem}");
        assert!(!problem.to_string().contains("hunter2"), "{problem}");
        assert_eq!(bench.entries("forks"), Vec::<String>::new(), "{code}: nothing is begun");
    }

    // `foo` never acknowledges; that `foobar` does is no help.
    let waiting = |name: &str| json!({"name": name, "payload": {}, "wait_for_ack": true, "ack_timeout_ms": 2000});
    let problem = daemon.post("/v1/forks", &body(json!([waiting("foo"), waiting("foobar")])));
    let problem = problem.refused(504, "ack_timeout");
    assert!(problem["detail"].as_str().unwrap().contains("ack of foo came"), "{problem}");
    assert_eq!(["forks", "names"].map(|folder| bench.entries(folder)), [Vec::<String>::new(), Vec::new()]);
    let figures = daemon.get("/metrics").expect(200).text();
    assert!(figures.contains("offshoot_ack_failures_total{code=\"ack_timeout\"} 1\n"), "{figures}");
    let made = daemon.fork(&body(json!([{"name": "foo", "payload": {}}, waiting("foobar")])));
    let acknowledged = json!([{"name": "foo", "acknowledged": null}, {"name": "foobar", "acknowledged": true}]);
    assert_eq!(made[0]["mailboxes"], acknowledged);
    drop(daemon);
    bench.end();
}

#[test]
fn o1_the_same_key_makes_forks_once() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let body = json!({"template": template.tag, "count": 2}).to_string();
    let head = ["Content-Type: application/json", "Idempotency-Key: job-1"];
    let send = |body: &str| daemon.request("POST", "/v1/forks", &head, body.as_bytes());
    let first = send(&body).expect(201).json();
    assert_eq!(send(&body).expect(201).json(), first);
    let other = json!({"template": template.tag}).to_string();
    send(&other).refused(409, "idempotency_key_reused");
    assert_eq!(daemon.get("/v1/forks").json()["total"], 2);
    // A request that was refused before any work gives its key back.
    let head = ["Content-Type: application/json", "Idempotency-Key: job-2"];
    let wrong = json!({"template": "absent"}).to_string();
    for _ in 0..2 {
        daemon.request("POST", "/v1/forks", &head, wrong.as_bytes()).refused(404, "template_not_found");
    }
    drop(daemon);
    bench.end();
}

#[test]
fn f3_commands_files_logs_and_eval_over_the_api() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({"template": template.tag, "count": 2}));
    let [one, two] = [0, 1].map(|index| format!("/v1/forks/{}", field(&forks[index], "id")));

    let ran = daemon.post(
        &format!("{one}/exec"),
        &json!({"argv": ["sh", "-c", "cat; echo $A >&2; exit 7"], "stdin": "in\n", "env": {"A": "b"}}),
    );
    let ran = ran.expect(200).json();
    assert_eq!((&ran["code"], &ran["stdout"], &ran["stderr"]), (&7.into(), &"in\n".into(), &"b\n".into()));
    let slow = daemon.post(&format!("{one}/exec"), &json!({"argv": ["sleep", "100"], "timeout_ms": 300})).expect(200);
    assert_eq!(slow.json()["timed_out"], true);

    // Values are each fork's own, and what is no JSON is kept as text.
    let eval = |fork: &str, code: &str| daemon.post(&format!("{fork}/eval"), &json!({"code": code})).expect(200).json();
    let random: BTreeSet<String> =
        [&one, &two].iter().map(|fork| eval(fork, "import random; random.random()")["value"].to_string()).collect();
    assert_eq!(random.len(), 2);
    assert_eq!(eval(&one, "float('nan')")["value_text"], "NaN");
    assert_eq!(eval(&one, "1/0")["exception"]["kind"], "exception");

    // A file of more than one piece, both ways; only the fork that it was written to has it.
    let content: Vec<u8> = (0..3_000_001_u32).map(|number| (number % 251) as u8).collect();
    let at = format!("{one}/files?path=/tmp/big&mode=0640");
    let _ = daemon.request("PUT", &at, &["Content-Type: application/octet-stream"], &content).expect(204);
    assert!(daemon.get(&format!("{one}/files?path=/tmp/big")).expect(200).body == content);
    daemon.get(&format!("{two}/files?path=/tmp/big")).refused(422, "guest_refused");
    daemon.get(&format!("{one}/files?path=/etc")).refused(422, "not_a_file");
    daemon.get(&format!("{one}/files?path=relative")).refused(400, "invalid_request");
    let tar = daemon.get(&format!("{one}/files?path=/etc&format=tar")).expect(200);
    let mut archive = tar::Archive::new(tar.body.as_slice());
    assert!(archive.entries().unwrap().any(|entry| entry.unwrap().path().unwrap().ends_with("passwd")));
    let mut empty = daemon.request("PUT", &format!("{two}/files?path=/tmp/none"), &["Content-Length: 0"], &[]);
    empty = empty.expect(204);
    drop(empty);
    assert_eq!(daemon.get(&format!("{two}/files?path=/tmp/none")).expect(200).body.len(), 0);

    let pong = daemon.post(&format!("{two}/ping"), &Value::Null).expect(200).json();
    assert_eq!((&pong["fork"], &pong["state"]), (&forks[1]["id"], &"running".into()));
    daemon.events(&format!("{one}/logs"), |kind, data| {
        if kind == "log" {
            STANDARD.decode(field(data, "data_base64")).unwrap();
        }
        kind == "end"
    });
    drop(daemon);
    bench.end();
}

fn attach(daemon: &Daemon, fork: &str) -> WebSocket<std::os::unix::net::UnixStream> {
    let url = format!("ws://offshoot/v1/forks/{fork}/exec");
    tungstenite::client(url, daemon.connect()).expect("the WebSocket opens").0
}

/// Both streams, and the last message.
fn to_the_end(socket: &mut WebSocket<std::os::unix::net::UnixStream>) -> (String, String, Value) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match socket.read().expect("messages come") {
            Message::Binary(bytes) if bytes[0] == 1 => out.extend_from_slice(&bytes[1..]),
            Message::Binary(bytes) => err.extend_from_slice(&bytes[1..]),
            Message::Text(text) => {
                let [out, err] = [out, err].map(|bytes| String::from_utf8(bytes).unwrap());
                return (out, err, serde_json::from_str(&text).unwrap());
            }
            _ => {}
        }
    }
}

#[test]
fn f3_a_command_over_a_websocket_has_input_signals_and_a_terminal() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({"template": template.tag, "count": 2}));
    let id = field(&forks[0], "id");

    let mut socket = attach(&daemon, id);
    socket.send(Message::text(json!({"argv": ["sh", "-c", "cat; echo end >&2; exit 3"]}).to_string())).unwrap();
    for line in ["one\n", "two\n"] {
        socket.send(Message::binary(line.as_bytes().to_vec())).unwrap();
    }
    socket.send(Message::text(json!({"close_stdin": true}).to_string())).unwrap();
    let (out, err, last) = to_the_end(&mut socket);
    assert_eq!((out.as_str(), err.as_str(), &last["exit"]["code"]), ("one\ntwo\n", "end\n", &3.into()));

    let mut socket = attach(&daemon, id);
    let script = "trap 'stty size; exit 5' TERM; stty size; while :; do sleep 0.1; done";
    let start = json!({"argv": ["sh", "-c", script], "tty": {"rows": 33, "cols": 99}});
    socket.send(Message::text(start.to_string())).unwrap();
    let Message::Binary(first) = socket.read().unwrap() else { panic!("no output") };
    assert!(String::from_utf8_lossy(&first).contains("33 99"));
    socket.send(Message::text(json!({"resize": {"rows": 44, "cols": 88}}).to_string())).unwrap();
    socket.send(Message::text(json!({"signal": 15}).to_string())).unwrap();
    let (out, _, last) = to_the_end(&mut socket);
    assert!(out.contains("44 88") && last["exit"]["code"] == 5, "{out} {last}");

    // A client that goes away takes its command along.
    let mut socket = attach(&daemon, id);
    socket.send(Message::text(json!({"argv": ["sleep", "4321"]}).to_string())).unwrap();
    wait_until("the command runs", Duration::from_secs(30), || {
        daemon.sh(id, "ps | grep -c '[s]leep 4321'; true") == "1"
    });
    drop(socket);
    wait_until("the command has ended", Duration::from_secs(30), || {
        daemon.sh(id, "ps | grep -c '[s]leep 4321'; true") == "0"
    });

    // A client that does not read holds up nobody else.
    let mut lazy = attach(&daemon, id);
    lazy.send(Message::text(json!({"argv": ["sh", "-c", "yes | head -c 20000000"]}).to_string())).unwrap();
    assert_eq!(daemon.sh(id, "echo still here"), "still here");
    drop(lazy);

    let mut socket = attach(&daemon, id);
    socket.send(Message::text("{\"argv\": []}")).unwrap();
    let (_, _, last) = to_the_end(&mut socket);
    assert_eq!(last["problem"]["code"], "invalid_request");
    daemon.get(&format!("/v1/forks/{id}/exec")).refused(400, "invalid_request");
    drop(daemon);
    bench.end();
}

#[test]
fn o1_events_tell_of_what_anybody_does() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    thread::scope(|scope| {
        let mut stream = daemon.connect();
        write!(stream, "GET /v1/events HTTP/1.0\r\n\r\n").unwrap();
        let heard = scope.spawn(move || {
            let (mut text, mut buffer) = (String::new(), [0; 4096]);
            while !(text.matches("event: fork.removed").count() >= 5 && text.contains("fork.died")) {
                let count = stream.read(&mut buffer).unwrap();
                assert_ne!(count, 0, "the events ended: {text}");
                text += &String::from_utf8_lossy(&buffer[..count]);
            }
            text
        });
        let ours = daemon.fork(&json!({"template": template.tag, "name": "ours"}));
        let theirs = bench.fork_one(&template, &["--name", "theirs"]);
        processes::kill(theirs.pid());
        wait_until("it is dead", Duration::from_secs(30), || {
            daemon.get("/v1/forks/theirs").expect(200).json()["state"] == "dead"
        });
        let more = daemon.fork(&json!({"template": template.tag, "count": 4, "name": "more"}));
        for fork in &more {
            let _ = daemon.delete(&format!("/v1/forks/{}", field(fork, "id"))).expect(204);
        }
        let _ = daemon.delete("/v1/forks/ours").expect(204);
        let text = heard.join().unwrap();
        for (kind, id) in [
            ("fork.created", field(&ours[0], "id")),
            ("fork.created", theirs.id()),
            ("fork.died", theirs.id()),
            ("fork.removed", field(&ours[0], "id")),
        ] {
            let told = text.split("\n\n").any(|event| event.contains(&format!("event: {kind}")) && event.contains(id));
            assert!(told, "{kind} {id} in {text}");
        }
        let ended = text.split("\n\n").filter(|event| event.contains("event: fork.died"));
        assert_eq!(
            ended.filter(|event| !event.contains(theirs.id())).count(),
            0,
            "what is removed has not died: {text}"
        );
        // No zombie: the dead machine was not the daemon's child, but ours was.
        let children = processes::children(daemon.pid());
        assert_eq!(children, Vec::<u32>::new());
    });
    // Who comes back is told what it missed.
    let mut kinds = Vec::new();
    daemon.events("/v1/events?after=0", |kind, _| {
        kinds.push(kind.to_owned());
        kind == "fork.removed"
    });
    assert_eq!(kinds[..2], ["missed", "fork.created"], "0 is of before this daemon");
    drop(daemon);
    bench.end();
}

#[test]
fn f7_standby_and_resume_over_the_api_and_forks_of_a_fork() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({"template": template.tag, "count": 2, "name": "s"}));
    let eval = |fork: &str, code: &str| {
        let answer = daemon.post(&format!("/v1/forks/{fork}/eval"), &json!({"code": code}));
        if answer.status == 422 {
            return json!(answer.json()["code"]);
        }
        answer.expect(200).json()["value"].clone()
    };
    assert_eq!(eval("s-1", "state = 41; state"), 41);
    let moved = daemon.post("/v1/forks/s-1/standby", &Value::Null).expect(200).json();
    assert_eq!((&moved["fork"]["state"], &moved["fork"]["pid"]), (&"standby".into(), &Value::Null));
    daemon.post("/v1/forks/s-1/eval", &json!({"code": "state"})).refused(409, "fork_in_standby");
    daemon.post("/v1/forks/s-1/standby", &Value::Null).refused(409, "fork_in_standby");
    assert_eq!(daemon.get("/v1/forks?state=standby").json()["total"], 1);
    let resumed = daemon.post("/v1/forks/s-1/resume", &Value::Null).expect(200).json();
    assert_eq!(resumed["fork"]["state"], "running");
    for same in ["id", "machine_id", "boot_id", "name"] {
        assert_eq!(resumed["fork"][same], forks[0][same], "{same}");
    }
    assert_eq!(eval("s-1", "state + 1"), 42);
    daemon.post("/v1/forks/s-2/resume", &Value::Null).refused(409, "fork_runs");

    let made = daemon.post("/v1/forks", &json!({"from": "s-1", "count": 2, "name": "c"})).expect(201).json();
    let children: Vec<Value> =
        made["results"].as_array().unwrap().iter().map(|result| result["fork"].clone()).collect();
    let held_up = |what: &str| made["source"][format!("{what}_micros")].as_u64().unwrap();
    assert!(held_up("asked") >= held_up("frozen") && held_up("frozen") >= held_up("stopped"), "{made}");
    let ids: BTreeSet<&str> = children.iter().chain(&forks).map(|fork| field(fork, "machine_id")).collect();
    assert_eq!(ids.len(), 4);
    for child in &children {
        assert_eq!(child["source"], forks[0]["id"]);
        assert_eq!(eval(field(child, "id"), "state"), 41);
        assert_eq!(daemon.sh(field(child, "id"), "hostname"), field(child, "name"));
    }
    assert_eq!(eval("s-1", "state = 1; state"), 1);
    assert_eq!(eval("c-1", "state"), 41);
    drop(daemon);
    bench.end();
}

#[test]
fn o1_templates_are_built_as_jobs_with_progress() {
    let bench = Bench::with_own_data();
    // As a unit of systemd's with UMask=0077 begins, and a shell's usual limit of open files.
    let offshoot = bench.plain(&["serve"]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "umask 077; ulimit -Sn 256; exec \"$0\" \"$@\""]);
    command.arg(offshoot.get_program()).args(offshoot.get_args());
    for (name, value) in offshoot.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let daemon = Daemon::run(command, &bench.state().join("api/offshoot.sock"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let [soft, most] = [0, 1].map(|at| files.split_whitespace().nth(at).unwrap());
    assert!(soft == most || soft == "65536", "{files}");
    for (body, status, code) in [
        (json!({"recipe": "/etc", "tag": "a"}), 400, "invalid_request"),
        (json!({"recipe": "../x", "tag": "a"}), 400, "invalid_request"),
        (json!({"recipe": "busybox", "tag": "../a"}), 400, "invalid_request"),
        (json!({"recipe": "absent", "tag": "a"}), 404, "recipe_not_found"),
    ] {
        daemon.post("/v1/templates", &body).refused(status, code);
    }
    let job = daemon.post("/v1/templates", &json!({"recipe": "busybox", "tag": "tiny", "memory_bytes": 128 << 20}));
    let job = job.expect(202).json();
    let mut steps = BTreeSet::new();
    let mut last = Value::Null;
    daemon.events(&format!("/v1/jobs/{}/events", field(&job, "id")), |kind, data| {
        steps.insert(field(data, "step").to_owned());
        last = data.clone();
        kind != "job.progress"
    });
    assert_eq!((&last["state"], &last["result"]["tag"]), (&"done".into(), &"tiny".into()), "{last}");
    assert!(steps.len() > 2, "{steps:?}");
    daemon.post("/v1/templates", &json!({"recipe": "busybox", "tag": "tiny"})).refused(409, "template_exists");
    assert_eq!(daemon.get("/v1/templates").json()["templates"][0]["tag"], "tiny");
    assert_eq!(daemon.get("/v1/templates/tiny/mailboxes").json(), json!({"mailboxes": [], "ambiguous": []}));

    let job = daemon.post("/v1/templates/tiny/verify", &json!({"count": 2})).expect(202).json();
    let at = format!("/v1/jobs/{}", field(&job, "id"));
    wait_until("it is verified", Duration::from_secs(120), || daemon.get(&at).json()["state"] != "running");
    assert_eq!(daemon.get(&at).json()["result"]["passed"], true);
    let _ = daemon.delete("/v1/templates/tiny").expect(204);
    daemon.get("/v1/templates/tiny").refused(404, "template_not_found");
    daemon.get("/v1/jobs/absent").refused(404, "job_not_found");
    drop(daemon);
    bench.end();
}

#[test]
fn o1_figures_are_served_to_prometheus() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let forks = daemon.fork(&json!({"template": template.tag, "count": 2}));
    let text = daemon.get("/metrics").expect(200).text();
    for line in [
        "offshoot_forks{state=\"running\"} 2",
        "offshoot_forks_made_total{engine=",
        "offshoot_fork_duration_seconds_count{engine=",
        "side=\"guest\",step=\"entropy\"",
        "offshoot_forks_memory_bytes{kind=\"private\"}",
        "offshoot_http_requests_total{method=\"POST\",route=\"/v1/forks\",status=\"201\"} 1",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(text.trim_end().ends_with("# EOF"));
    processes::kill(u32::try_from(forks[0]["pid"].as_u64().unwrap()).unwrap());
    let begun = Instant::now();
    wait_until("a dead fork is counted", Duration::from_secs(30), || {
        daemon.get("/metrics").text().contains("offshoot_forks{state=\"dead\"} 1")
    });
    assert!(begun.elapsed() < Duration::from_secs(30));
    drop(daemon);
    bench.end();
}

#[test]
fn o1_each_fork_is_a_trace_with_its_steps_and_systemd_is_told_when_requests_are_taken() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    // As much of a collector as it takes for a client of HTTP/2 to send: an empty SETTINGS frame. Texts in what it sends are plain.
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let notified = bench.state().join("notify");
    let systemd = UnixDatagram::bind(&notified).unwrap();
    systemd.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut command = bench.plain(&["serve"]);
    let port = collector.local_addr().unwrap().port();
    command
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}"))
        .env("OTEL_BSP_SCHEDULE_DELAY", "200");
    command.env("NOTIFY_SOCKET", &notified);
    let mut daemon = Daemon::run(command, &bench.state().join("api/offshoot.sock"));
    let heard = || {
        let mut buffer = [0; 256];
        let count = systemd.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    };
    assert_eq!(heard(), "READY=1");

    let forks = daemon.fork(&json!({"template": template.tag, "count": 2, "secrets": {"KEY": "hunter2"}}));
    let (mut stream, _) = collector.accept().unwrap();
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let wanted = [field(&forks[0], "id"), field(&forks[1], "id"), "offshoot.fork.id", "entropy", "thaw", "credited"];
    let (mut sent, mut buffer) = (Vec::new(), [0; 4096]);
    while let Some(missing) = wanted.iter().find(|text| !sent.windows(text.len()).any(|part| part == text.as_bytes())) {
        let count = stream.read(&mut buffer).unwrap_or_else(|error| panic!("{missing} was not sent: {error}"));
        assert_ne!(count, 0, "{missing} was not sent");
        sent.extend_from_slice(&buffer[..count]);
    }
    assert!(!sent.windows(7).any(|part| part == b"hunter2"));
    drop((stream, collector));
    assert!(daemon.end().success());
    assert_eq!(heard(), "STOPPING=1");
    bench.end();
}
