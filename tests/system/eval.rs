//! F4, I9: the warmed Python answers, and its random state is each fork's own.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use offshoot_tests::{Bench, Kind, Run, bench::wait_until};

#[test]
fn f4_values_prints_and_errors_come_back() {
    let bench = Bench::new();
    let forks = bench.fork(&bench.template(Kind::Python), &["-n", "2"]);
    let eval = |code: &str| bench.offshoot(&["eval", forks[0].name(), "--", code]);
    assert_eq!(eval("1 + 1").ok().json()["value"], 2);
    assert_eq!(eval("{'a': [1, None, 'ü']}").ok().json()["value"], serde_json::json!({ "a": [1, null, "ü"] }));
    assert_eq!(eval("int(np.arange(10).sum())").ok().json()["value"], 45);
    let floats = eval("[float('nan'), float('inf'), -float('inf'), 0.5]").ok().json();
    assert_eq!(floats["value_text"].as_str().unwrap().replace(' ', ""), "[NaN,Infinity,-Infinity,0.5]");
    let printed = eval("import sys; print('out'); print('err', file=sys.stderr); 3").ok().json();
    assert_eq!(
        (&printed["stdout"], &printed["stderr"], &printed["value"]),
        (&"out\n".into(), &"err\n".into(), &3.into())
    );
    assert_eq!(eval("object").ok().json()["repr"], "<class 'object'>");

    let failed = eval("def deep():\n    return 1 / 0\nprint('before')\ndeep()").exits(1);
    failed.refused("exception");
    let document = failed.json();
    assert_eq!(document["stdout"], "before\n");
    assert!(document["exception"]["message"].as_str().unwrap().contains("division by zero"), "{document}");
    assert!(document["exception"]["stack"].as_str().unwrap().contains("deep"), "{document}");
    eval("1 +").exits(1).refused("exception");

    // State stays in its fork.
    let _ = eval("mine = 5").ok();
    assert_eq!(eval("mine").ok().json()["value"], 5);
    bench.offshoot(&["eval", forks[1].name(), "--", "mine"]).exits(1).refused("exception");
    let piped = Run::of(bench.command(&["eval", forks[1].name(), "-"]), b"x = 20\nx + 1\n").ok().json();
    assert_eq!(piped["value"], 21);
    bench.end();
}

#[test]
fn f4_a_deadline_holds_and_the_next_request_is_answered() {
    let bench = Bench::new();
    let fork = bench.fork_one(&bench.template(Kind::Python), &[]);
    let start = Instant::now();
    let late = bench.offshoot(&["eval", fork.name(), "--timeout", "1", "--", "while True: pass"]);
    late.exits(1).refused("eval_timeout");
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(bench.eval(&fork, "2 + 2"), 4);
    bench.end();
}

#[test]
fn f4_a_killed_runtime_is_reported_and_started_again() {
    let bench = Bench::new();
    let fork = bench.fork_one(&bench.template(Kind::Python), &["--env", "REGION=eu"]);
    let died = bench.offshoot(&["eval", fork.name(), "--", "os.kill(os.getpid(), 9)"]);
    died.exits(1).refused("runtime_died");
    // The new one is warm too, and it is still the same fork.
    wait_until("the runtime's restart", Duration::from_secs(60), || {
        bench.offshoot(&["eval", fork.name(), "--", "1"]).code == Some(0)
    });
    assert_eq!(
        bench.eval(&fork, "os.environ['REGION'], os.environ['OFFSHOOT_ID']"),
        serde_json::json!(["eu", fork.id()])
    );
    bench.end();
}

#[test]
fn f4_a_template_without_a_runtime_says_so() {
    let bench = Bench::new();
    let fork = bench.fork_one(&bench.template(Kind::Busybox), &[]);
    bench.offshoot(&["eval", fork.name(), "--", "1"]).exits(1).refused("no_runtime");
    bench.end();
}

#[test]
fn i9_generators_differ_among_forks_and_do_not_continue_the_templates() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "3", "--env", "REGION=eu"]);
    let draw = "[repr(random.random()), repr(float(np.random.random())), repr(float(rng.random())), str(uuid.uuid4()), \
        repr(random.Random().random()), next(tempfile._get_candidate_names())]";
    let drawn: Vec<Vec<String>> = forks
        .iter()
        .map(|fork| {
            bench.eval(fork, draw).as_array().unwrap().iter().map(|value| value.as_str().unwrap().to_owned()).collect()
        })
        .collect();
    for kind in 0..6 {
        let values: BTreeSet<&str> = drawn.iter().map(|values| values[kind].as_str()).collect();
        assert_eq!(values.len(), 3, "two forks draw the same: {values:?}");
    }
    // The template answered these probes once; generators that were not reseeded would answer alike in every fork, as
    // these two do once they are seeded alike.
    let seeded: BTreeSet<String> =
        forks.iter().map(|fork| bench.eval(fork, "(random.seed(1), random.random())[1]").to_string()).collect();
    assert_eq!(seeded.len(), 1, "the check can fail");
    let verdict = bench.offshoot(&["verify", &template.tag, "-n", "2"]).ok().json();
    let fields: Vec<&String> = verdict["rows"][0]["values"].as_object().unwrap().keys().collect();
    assert!(fields.iter().any(|field| field.contains("random.random")), "verify asks the runtime: {fields:?}");
    // The warm process has its fork's environment.
    for fork in &forks {
        let seen = bench.eval(fork, "os.environ['REGION'], os.environ['OFFSHOOT_ID'], os.uname().nodename");
        assert_eq!(seen, serde_json::json!(["eu", fork.id(), fork.text("hostname")]));
    }
    bench.end();
}
