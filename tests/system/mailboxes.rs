//! I3–I5, I7: mailboxes of any software in the guest, in any language; each fork gets exactly what it was sent.

use std::{collections::BTreeMap, io::Write, thread, time::Instant};

use offshoot_tests::{Bench, Fork, Kind, Run, Template};
use serde_json::{Value, json};

/// Forks with payloads of their own, all made at once.
fn fork_each(bench: &Bench, template: &Template, payloads: &[Vec<(&str, Value)>]) -> Vec<Fork> {
    let one = |payloads: &Vec<(&str, Value)>| {
        let mut args = vec!["fork".to_owned(), template.tag.clone(), "--ack-timeout-ms".into(), "20000".into()];
        for (name, payload) in payloads {
            args.extend(["--mailbox".into(), format!("{name}={payload}"), "--wait-ack".into(), (*name).into()]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let made = bench.offshoot(&args).ok().json();
        let reports = made["forks"][0]["mailboxes"].as_array().unwrap();
        let acknowledged = reports.iter().filter(|report| report["acknowledged"] == true).count();
        assert_eq!(acknowledged, payloads.len(), "{made}");
        Fork { record: made["forks"][0].clone() }
    };
    thread::scope(|scope| {
        let forks: Vec<_> = payloads.iter().map(|payloads| scope.spawn(|| one(payloads))).collect();
        forks.into_iter().map(|fork| fork.join().unwrap()).collect()
    })
}

/// What a program was sent, as it wrote it down.
fn received(bench: &Bench, fork: &Fork, file: &str) -> Value {
    serde_json::from_str(&bench.sh(fork, &format!("cat {file}"))).unwrap()
}

/// A request that must be refused before any fork is begun.
#[track_caller]
fn refuse(bench: &Bench, args: &[&str], exit: i32, code: &str) -> Value {
    let template = bench.template(Kind::Mailboxes);
    let run = bench.offshoot(&[&["fork", template.tag.as_str()], args].concat());
    let error = run.refused(code);
    assert_eq!(run.code, Some(exit), "{run}");
    bench.assert_empty();
    error
}

#[test]
fn i4_mailboxes_are_listed_with_who_planted_them() {
    let bench = Bench::new();
    let template = bench.template(Kind::Mailboxes);
    let listed = bench.offshoot(&["mailboxes", &template.tag]).ok().json();
    let entries: BTreeMap<&str, (u64, &str, bool)> = listed["mailboxes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mailbox| {
            let text = |field: &str| mailbox[field].as_str().unwrap();
            let capacity = mailbox["capacity"].as_u64().unwrap();
            (text("name"), (capacity, text("planted_by"), mailbox["needs_token"].as_bool().unwrap()))
        })
        .collect();
    assert_eq!(entries["app:c"], (3776, "self", false));
    assert_eq!(entries["honest"], (4096, "socket", false));
    assert_eq!(entries["tokened"], (4096, "socket", true));
    assert_eq!(entries["self"], (3776, "self", true));
    assert_eq!(listed["ambiguous"][0]["name"], "double", "{listed}");
    assert!(!entries.contains_key("double"));
    assert!(!listed.to_string().contains("abcd"), "a token is nobody's to see");
}

#[test]
fn i5_each_fork_gets_exactly_its_own_payloads_in_c() {
    let bench = Bench::new();
    let template = bench.template(Kind::Mailboxes);
    let payload =
        |fork: usize, mailbox: &str| json!({ "fork": fork, "mailbox": mailbox, "text": "ü \"quoted\" \\ \n" });
    let payloads: Vec<Vec<(&str, Value)>> = (0..4)
        .map(|fork| ["app:c", "foobar", "honest"].map(|mailbox| (mailbox, payload(fork, mailbox))).to_vec())
        .collect();
    let forks = fork_each(&bench, &template, &payloads);
    for (number, fork) in forks.iter().enumerate() {
        for mailbox in ["app:c", "foobar"] {
            let file = format!("/tmp/mailbox-{mailbox}.json");
            assert_eq!(received(&bench, fork, &file), payload(number, mailbox));
        }
        let event = received(&bench, fork, "/tmp/plant-honest");
        assert_eq!((&event["payload"], &event["fork"]), (&payload(number, "honest"), &json!(fork.id())));
        // The others were sent nothing, and heard nothing.
        assert_eq!(bench.sh(fork, "ls /tmp | grep -c plant"), "1");
    }
    // A fork that is sent nothing hears nothing.
    let bare = bench.fork_one(&template, &[]);
    assert_eq!(bench.sh(&bare, "ls /tmp | grep -c -e plant -e mailbox || true"), "0");
    bench.end();
}

#[test]
fn i5_each_fork_gets_exactly_its_own_payload_in_python() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let payloads: Vec<Vec<(&str, Value)>> = (0..3).map(|fork| vec![("app:python", json!({ "fork": fork }))]).collect();
    for (number, fork) in fork_each(&bench, &template, &payloads).iter().enumerate() {
        assert_eq!(received(&bench, fork, "/tmp/mailbox-app:python.json"), json!({ "fork": number }));
    }
    bench.end();
}

#[test]
fn i5_a_payload_may_fill_its_mailbox_and_come_from_a_file() {
    let bench = Bench::new();
    let template = bench.template(Kind::Mailboxes);
    // Two pages of 3776 bytes carry 4096.
    let text = json!({ "x": "y".repeat(4096 - 8) }).to_string();
    assert_eq!(text.len(), 4096);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let option = format!("honest=@{}", file.path().display());
    let fork = bench.fork_one(&template, &["--mailbox", &option, "--wait-ack", "honest"]);
    assert_eq!(received(&bench, &fork, "/tmp/plant-honest")["payload"]["x"].as_str().unwrap().len(), 4088);
    bench.end();
    let option = format!("honest={}", json!({ "x": "y".repeat(4096 - 7) }));
    refuse(&bench, &["--mailbox", &option], 1, "payload_too_long");
}

#[test]
fn i5_a_wrong_request_is_refused_before_any_work() {
    let bench = Bench::new();
    let good = ["--mailbox", "honest={}"];
    let error = refuse(&bench, &["--mailbox", "unknown={}"], 1, "mailbox_not_found");
    assert!(error["message"].as_str().unwrap().contains("honest"), "it names those that are there: {error}");
    // All or nothing: the good one is not written either.
    refuse(&bench, &[&good[..], &["--mailbox", "hones={}"]].concat(), 1, "mailbox_not_found");
    refuse(&bench, &["--mailbox", "honestly={}"], 1, "mailbox_not_found");
    let error =
        refuse(&bench, &["--mailbox", "double={}", "--mailbox-token", "double=env:PATH"], 1, "mailbox_ambiguous");
    assert!(error["message"].as_str().unwrap().contains("build"), "{error}");
    for payload in ["[1]", "1", "\"text\"", "null", "{", "{}x", "", "{\"a\":}"] {
        refuse(&bench, &["--mailbox", &format!("honest={payload}")], 2, "payload_not_an_object");
    }
    refuse(&bench, &["--mailbox", &format!("app:c={}", json!({ "x": "y".repeat(3776) }))], 1, "payload_too_long");
    refuse(&bench, &[&good[..], &["--mailbox", "honest={}"]].concat(), 2, "given_twice");
    refuse(&bench, &["--mailbox", "offshoot:identity={}"], 2, "mailbox_reserved");
    refuse(&bench, &["--mailbox", "bad name={}"], 2, "invalid_name");
    refuse(&bench, &["--mailbox", "honest"], 2, "no_equals_sign");
    refuse(&bench, &["--wait-ack", "honest"], 2, "mailbox_without_payload");
    refuse(&bench, &[&good[..], &["--ack-timeout-ms", "-1"]].concat(), 2, "negative_ack_timeout");
    refuse(&bench, &[&good[..], &["--ack-timeout-ms", "30001"]].concat(), 2, "out_of_range");
    let many: Vec<String> =
        (0..17).flat_map(|number| ["--mailbox".to_owned(), format!("honest{number}={{}}")]).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refuse(&bench, &many, 2, "too_many_mailboxes");
    refuse(&bench, &many[..32], 1, "mailbox_not_found");
}

#[test]
fn i5_a_token_must_be_the_one_it_was_planted_with() {
    let bench = Bench::new();
    let command = |token: Option<&str>| {
        let template = bench.template(Kind::Mailboxes);
        let mut command =
            bench.command(&["fork", &template.tag, "--mailbox", "tokened={\"a\":1}", "--wait-ack", "tokened"]);
        if let Some(token) = token {
            command.args(["--mailbox-token", "tokened=env:TOKEN"]).env("TOKEN", token);
        }
        Run::of(command, &[])
    };
    for token in [None, Some("abc"), Some("abcde"), Some("Abcd"), Some("abcd\n")] {
        command(token).exits(1).refused("mailbox_token_mismatch");
        bench.assert_empty();
    }
    let _ = command(Some("abcd")).ok();
    // A token for a mailbox that has none is not the one it was planted with.
    let template = bench.template(Kind::Mailboxes);
    let mut surplus =
        bench.command(&["fork", &template.tag, "--mailbox", "honest={}", "--mailbox-token", "honest=env:TOKEN"]);
    surplus.env("TOKEN", "abcd");
    Run::of(surplus, &[]).exits(1).refused("mailbox_token_mismatch");
    bench.end();
}

/// A fork that must be destroyed for want of an ack.
#[track_caller]
fn without_ack(bench: &Bench, args: &[&str], code: &str) -> String {
    let template = bench.template(Kind::Mailboxes);
    let error = bench.offshoot(&[&["fork", template.tag.as_str()], args].concat()).exits(1).refused(code);
    bench.assert_empty();
    error["message"].as_str().unwrap().to_owned()
}

#[test]
fn i7_a_fork_that_does_not_acknowledge_is_destroyed() {
    let bench = Bench::new();
    let start = Instant::now();
    let text =
        without_ack(&bench, &["--mailbox", "foo={}", "--wait-ack", "foo", "--ack-timeout-ms", "700"], "ack_timeout");
    assert!(text.contains("foo") && text.contains("700 ms") && text.contains("destroyed"), "{text}");
    assert!(start.elapsed().as_secs() < 60);
    // Nobody waits for it: the fork is made.
    let template = bench.template(Kind::Mailboxes);
    let fork = bench.fork_one(&template, &["--mailbox", "foo={}"]);
    assert_eq!(fork.record["mailboxes"], json!([{ "name": "foo", "acknowledged": null }]));
    bench.end();
}

#[test]
fn i7_foobars_ack_is_not_foos() {
    let bench = Bench::new();
    let both = ["--mailbox", "foo={}", "--mailbox", "foobar={}", "--ack-timeout-ms", "2000"];
    let text =
        without_ack(&bench, &[&both[..], &["--wait-ack", "foo", "--wait-ack", "foobar"]].concat(), "ack_timeout");
    assert!(text.contains("ack of foo came"), "{text}");
    // The check can fail: foobar itself does acknowledge.
    let template = bench.template(Kind::Mailboxes);
    let _ = bench.fork_one(&template, &[&both[..], &["--wait-ack", "foobar"]].concat());
    bench.end();
}

#[test]
fn i7_a_forged_or_foreign_ack_does_not_count() {
    let bench = Bench::new();
    let forging = ["--mailbox", "forging={}", "--wait-ack", "forging", "--ack-timeout-ms", "2000"];
    let text = without_ack(&bench, &forging, "ack_timeout");
    assert!(text.contains("refused as malformed or forged"), "the forged line came: {text}");
    // Lines that a program relays: another fork's, another mailbox' name, junk.
    let hmac = "a".repeat(64);
    for line in [
        format!("offshoot-ack v=1 stage=applied mailbox=relaying fork={} hmac={hmac}", "0".repeat(20)),
        format!("offshoot-ack v=1 stage=applied mailbox=offshoot:identity fork={} hmac={hmac}", "0".repeat(20)),
        "offshoot-ack v=1 stage=applied mailbox=relaying".to_owned(),
    ] {
        let payload = format!("relaying={}", json!({ "line": line }));
        let args = ["--mailbox", &payload, "--wait-ack", "relaying", "--ack-timeout-ms", "2000"];
        let _ = without_ack(&bench, &args, "ack_timeout");
    }
}

#[test]
fn i7_a_program_that_says_no_is_heard() {
    let bench = Bench::new();
    let text = without_ack(&bench, &["--mailbox", "failing={}", "--wait-ack", "failing"], "identity_refused");
    assert!(text.contains("failing") && text.contains("no room"), "{text}");
}

#[test]
fn i5_payloads_are_in_no_record() {
    let bench = Bench::new();
    let template = bench.template(Kind::Mailboxes);
    let option = "honest={\"key\":\"pay10ad\"}";
    let fork = bench.fork_one(&template, &["--mailbox", option, "--wait-ack", "honest"]);
    let inspected = bench.offshoot(&["inspect", fork.name()]).ok();
    assert!(!inspected.out().contains("pay10ad"));
    assert!(bench.sh(&fork, "cat /tmp/plant-honest").contains("pay10ad"), "it was delivered");
    bench.end();
}

/// Builds a template with this many programs that each plant a mailbox by themselves.
fn build_with_planted(bench: &Bench, count: usize) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let plant = offshoot_tests::programs::source().join("tests/recipes/mailboxes/plant.c");
    offshoot_tests::recipes::compile(&plant, &dir.path().join("plant"));
    let script = format!(
        "for i in $(seq {count}); do /usr/bin/plant self m$i t > /tmp/p$i & done; \
         until [ $(cat /tmp/p* | grep -c planted) -eq {count} ]; do sleep 0.1; done; echo all; wait"
    );
    let recipe = format!(
        "name = \"many\"\nmemory = \"128M\"\n[rootfs]\nkind = \"busybox\"\n\
         [[files]]\npath = \"/usr/bin/plant\"\nsource = \"plant\"\nmode = 0o755\n\
         [[services]]\nname = \"many\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\nready_line = \"all\"\n"
    );
    std::fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
    bench.offshoot(&["build", dir.path().to_str().unwrap(), "--tag", "many"])
}

#[test]
fn i4_sixteen_planted_mailboxes_are_possible_and_seventeen_are_not() {
    let bench = Bench::with_own_data();
    let error = build_with_planted(&bench, 17).exits(1).refused("mailboxes_unusable").to_string();
    assert!(error.contains("17 mailboxes") && error.contains("at most 16"), "{error}");
    let _ = build_with_planted(&bench, 16).ok();
    let listed = bench.offshoot(&["mailboxes", "many"]).ok().json();
    let planted =
        listed["mailboxes"].as_array().unwrap().iter().filter(|mailbox| mailbox["planted_by"] == "self").count();
    assert_eq!(planted, 16, "{listed}");
    let _ = bench.offshoot(&["rmi", "many"]).ok();
    bench.end();
}
