//! F4, I9: the warmed Node answers, and whatever it draws is each fork's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use offshoot_tests::{Bench, Fork, Kind, bench::wait_until};
use serde_json::{Value, json};

use crate::{
    pool::{is_from_pool, pool},
    rehearsal::{rehearsed, rehearses},
};

#[test]
fn f4_node_answers_with_values_prints_and_errors() {
    let bench = Bench::new();
    let forks = bench.fork(&bench.template(Kind::Node), &["-n", "2"]);
    let eval = |code: &str| bench.offshoot(&["eval", forks[0].name(), "--timeout", "120", "--", code]);
    assert_eq!(eval("1 + 1").ok().json()["value"], 2);
    assert_eq!(eval("({ a: [1, null, 'ü'] })").ok().json()["value"], json!({ "a": [1, null, "ü"] }));
    assert_eq!(
        eval("await new Promise((resolve) => setTimeout(resolve, 10, 'waited'))").ok().json()["value"],
        "waited"
    );
    let floats = eval("[NaN, Infinity, -Infinity, 0.5]").ok().json();
    assert_eq!(floats["value_text"].as_str().unwrap(), "[NaN,Infinity,-Infinity,0.5]");
    let big = eval("10n").ok().json();
    assert_eq!((&big["value"], &big["repr"]), (&Value::Null, &"10n".into()));
    assert_eq!(eval("[10n, undefined]").ok().json()["value"], json!([{ "$js": "10n" }, { "$js": "undefined" }]));
    let printed = eval("console.log('out'); console.error('err'); 3").ok().json();
    assert_eq!(
        (&printed["stdout"], &printed["stderr"], &printed["value"]),
        (&"out\n".into(), &"err\n".into(), &3.into())
    );
    let failed = eval("function deep() { return nothing.here }\nconsole.log('before'); deep()").exits(1);
    failed.refused("exception");
    let document = failed.json();
    assert_eq!(document["stdout"], "before\n");
    assert_eq!(document["exception"]["message"], "ReferenceError: nothing is not defined");
    assert!(document["exception"]["stack"].as_str().unwrap().contains("at deep (<eval-"), "{document}");
    eval("1 +").exits(1).refused("exception");
    // State stays in its fork.
    let _ = eval("const mine = 5").ok();
    assert_eq!(eval("mine").ok().json()["value"], 5);
    bench.offshoot(&["eval", forks[1].name(), "--", "mine"]).exits(1).refused("exception");
    bench.end();
}

#[test]
fn f4_node_is_interrupted_and_a_dead_one_is_reported_and_started_again() {
    let bench = Bench::new();
    let fork = bench.fork_one(&bench.template(Kind::Node), &["--env", "REGION=eu"]);
    for code in ["for (;;) {}", "await 1; for (;;) {}", "await new Promise(() => {})"] {
        bench.offshoot(&["eval", fork.name(), "--timeout", "2", "--", code]).exits(1).refused("eval_timeout");
        assert_eq!(bench.eval(&fork, "2 + 2"), 4);
    }
    bench.offshoot(&["eval", fork.name(), "--", "process.exit(3)"]).exits(1).refused("runtime_died");
    // The new one is warm too, and it is still the same fork.
    wait_until("the runtime's restart", Duration::from_secs(120), || {
        bench.offshoot(&["eval", fork.name(), "--", "1"]).code == Some(0)
    });
    assert_eq!(bench.eval(&fork, "[process.env.REGION, offshootGuest.fork.id]"), json!(["eu", fork.id()]));
    bench.end();
}

/// What each generator of a fork answers, and what a timer drew before anybody asked.
fn draws(bench: &Bench, fork: &Fork) -> BTreeMap<String, String> {
    let code = "const worker = new worker_threads.Worker(`const { parentPort } = require('worker_threads');
            parentPort.postMessage([Math.random(), require('crypto').randomUUID()])`, { eval: true });
        const pool = await new Promise((resolve) => crypto.randomBytes(8, (error, bytes) => resolve(bytes.toString('hex'))));
        const early = draws.find((draw) => draw.name !== undefined);
        ({ random: Math.random(), uuid: crypto.randomUUID(), int: crypto.randomInt(2 ** 47), pool,
            bytes: crypto.randomBytes(8).toString('hex'), web: crypto.webcrypto.randomUUID(),
            values: crypto.webcrypto.getRandomValues(new Uint32Array(2)).join(),
            key: crypto.generateKeyPairSync('x25519').publicKey.export({ type: 'spki', format: 'der' }).toString('hex'),
            worker: (await new Promise((resolve) => worker.on('message', resolve))).join(),
            context: vm.runInContext('Math.random()', context), 'new context': vm.runInNewContext('Math.random()'),
            ...Object.fromEntries(Object.entries(early).map(([name, value]) => [`early ${name}`, value])) })";
    let run = bench.offshoot(&["eval", fork.name(), "--timeout", "120", "--", code]).ok().json();
    let drawn = run["value"].as_object().unwrap_or_else(|| panic!("{run}"));
    drawn.iter().map(|(name, value)| (name.clone(), value.to_string())).collect()
}

/// The generators that drew the same in two of these.
fn alike(drawn: &[BTreeMap<String, String>]) -> BTreeSet<&str> {
    let same = |name: &&String| drawn.iter().map(|drawn| &drawn[*name]).collect::<BTreeSet<_>>().len() < drawn.len();
    drawn[0].keys().filter(same).map(String::as_str).collect()
}

#[test]
fn i9_node_draws_differ_among_forks_also_those_of_a_timer_right_after_the_thaw() {
    let bench = Bench::new();
    let template = bench.template(Kind::Node);
    // Two are made of spares that have rehearsed (with the engine `qemu`), one is not.
    assert_eq!((pool(&bench, &template, 2), rehearsed(&bench)), (2, if rehearses(&template) { 2 } else { 0 }));
    let forks = bench.fork(&template, &["-n", "3", "--env", "REGION=eu"]);
    assert_eq!(forks.iter().filter(|fork| is_from_pool(fork)).count(), 2);
    assert_eq!(pool(&bench, &template, 0), 0);
    for fork in &forks {
        let steps = fork.record["guest_steps"].as_array().unwrap();
        let openssl =
            steps.iter().find(|step| step["step"] == "runtime.openssl").unwrap_or_else(|| panic!("{steps:?}"));
        assert!(openssl["outcome"].as_str().unwrap().starts_with("reseeded-"), "{openssl}");
    }
    let drawn: Vec<_> = forks.iter().map(|fork| draws(&bench, fork)).collect();
    assert!(drawn[0].len() >= 18, "{:?}", drawn[0]);
    assert_eq!(alike(&drawn), BTreeSet::new(), "{drawn:#?}");
    for (fork, drawn) in forks.iter().zip(&drawn) {
        assert_eq!(drawn["early name"], json!(fork.name()).to_string(), "a timer ran before the fork was itself");
        let seen =
            bench.eval(fork, "[process.env.REGION, process.env.OFFSHOOT_ID, offshootGuest.fork.name, os.hostname()]");
        assert_eq!(seen, json!(["eu", fork.id(), fork.name(), fork.text("hostname")]));
    }
    // Each with the template too.
    let verdict = bench.offshoot(&["verify", &template.tag, "-n", "2"]).ok().json();
    let fields: Vec<&String> = verdict["rows"][0]["values"].as_object().unwrap().keys().collect();
    assert!(fields.iter().any(|field| field.contains("crypto.randomUUID()")), "verify asks the runtime: {fields:?}");
    bench.end();
}

#[test]
fn i9_a_node_whose_bridge_refreshes_nothing_draws_the_same_in_forks_and_verify_says_so() {
    let bench = Bench::new();
    let template = bench.template(Kind::NodeStale);
    let forks = bench.fork(&template, &["-n", "2"]);
    let drawn: Vec<_> = forks.iter().map(|fork| draws(&bench, fork)).collect();
    let alike = alike(&drawn);
    for name in ["random", "uuid", "int", "bytes", "values", "key", "context", "early uuid", "early random"] {
        assert!(alike.contains(name), "{name} is fresh without the bridge: {alike:?}");
    }
    let verdict = bench.offshoot(&["verify", &template.tag, "-n", "2"]).exits(1).json();
    let shared: BTreeSet<_> =
        verdict["shared"].as_array().unwrap().iter().map(|shared| shared["field"].to_string()).collect();
    for probe in ["Math.random()", "crypto.randomBytes()", "a new key"] {
        assert!(shared.iter().any(|field| field.contains(probe)), "{probe}: {verdict}");
    }
    bench.end();
}

#[test]
fn i9_a_value_that_was_drawn_before_the_capture_is_found_and_one_that_is_drawn_on_identity_is_not() {
    let bench = Bench::new();
    let template = bench.template(Kind::Node);
    let parent = bench.fork_one(&template, &["--name", "parent"]);
    // A fork of a fork: what its program keeps is copied, unless it asks to be told.
    let keep = "var kept = crypto.randomUUID(); var session; offshootGuest.onIdentity(() => { session = crypto.randomUUID() }); 1";
    assert_eq!(bench.eval(&parent, keep), 1);
    let made = bench.offshoot(&["fork", "--from", parent.name(), "-n", "2"]).ok().json();
    let ask = |name: &str| {
        bench.offshoot(&["eval", name, "--", "[kept, session, offshootGuest.fork.name]"]).ok().json()["value"].clone()
    };
    let children: Vec<Value> =
        made["forks"].as_array().unwrap().iter().map(|fork| ask(fork["name"].as_str().unwrap())).collect();
    let parents = ask(parent.name());
    assert_eq!(children[0][0], children[1][0]);
    assert_eq!(children[0][0], parents[0]);
    let sessions: BTreeSet<String> = [&children[0], &children[1], &parents].map(|seen| seen[1].to_string()).into();
    assert_eq!(sessions.len(), 3, "{sessions:?}");
    assert_ne!(children[0][2], children[1][2]);
    bench.end();
}
