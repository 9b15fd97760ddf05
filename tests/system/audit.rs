//! I17: the capture of a template audits it: what all forks would share, or none has, is named with its process, the reason and the cure.

use std::{fs, path::Path, time::Duration};

use offshoot_tests::{Bench, Daemon, Run, Template, bench::wait_until, processes, programs, recipes};
use serde_json::{Value, json};

/// What the recipe `hazards` gives its processes, and nobody is told.
const SECRETS: [&str; 3] = ["in-the-environment-7d1f", "in-an-address-55aa", "in-the-arguments-93c2"];

/// Those of one service, or of none.
fn of<'a>(findings: &'a Value, service: &str) -> Vec<&'a Value> {
    let all = findings.as_array().unwrap_or_else(|| panic!("no list: {findings}"));
    all.iter().filter(|finding| finding["process"]["service"] == service).collect()
}

/// The one finding of a service; it names the process and says why and what to do.
#[track_caller]
fn only<'a>(findings: &'a Value, service: &str, kind: &str, name: &str, says: &[&str]) -> &'a Value {
    let [finding] = of(findings, service)[..] else { panic!("not one of {service}: {findings:#}") };
    check(finding, kind, name, says);
    finding
}

#[track_caller]
fn check(finding: &Value, kind: &str, name: &str, says: &[&str]) {
    assert_eq!((&finding["kind"], &finding["process"]["name"]), (&kind.into(), &name.into()), "{finding:#}");
    assert!(finding["process"]["pid"].as_u64().is_some_and(|pid| pid > 1), "{finding:#}");
    let reason = finding["reason"].as_str().unwrap();
    for text in says {
        assert!(reason.contains(text), "{text:?} is not in {reason:?}");
    }
    assert!(finding["cure"].as_str().is_some_and(|cure| cure.len() > 20), "{finding:#}");
}

#[track_caller]
fn tells_no_secret(what: &str, text: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{what} tells {secret:?}: {text}");
    }
}

/// Everything that a home has as files, but for a template's memory, devices and disk.
fn tells_no_secret_in_files(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            tells_no_secret_in_files(&path);
        } else if metadata.is_file() && path.extension().is_none_or(|extension| extension != "img") {
            tells_no_secret(&path.display().to_string(), &String::from_utf8_lossy(&fs::read(&path).unwrap()));
        }
    }
}

#[track_caller]
fn nothing_is_left(bench: &Bench, but: Option<u32>) {
    let left: Vec<_> = fs::read_dir(bench.data().join("templates")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let inside: Vec<u32> = processes::inside(&bench.data()).into_iter().filter(|&pid| Some(pid) != but).collect();
    assert_eq!(inside, Vec::<u32>::new());
}

#[test]
fn i17_each_hazard_is_named_with_process_reason_and_cure_and_no_secret_is_told() {
    let bench = Bench::with_own_data();
    let recipe = recipes::prepare("hazards", "hazards").dir;
    let built =
        Run::of(bench.plain(&["build", recipe.to_str().unwrap(), "--tag", "hazards", "--memory", "384M"]), &[]).ok();
    let template = Template::read(&bench.data(), "hazards");
    let findings = &template.manifest["findings"];

    let listed = |service| of(findings, service);
    only(
        findings,
        "environment",
        "secret_in_environment",
        "sh",
        &["variable API_TOKEN", "variable DB (looks like a password in an address)"],
    );
    only(findings, "arguments", "secret_in_arguments", "sh", &["argument 5 (the value of --db-password)"]);
    let file = only(findings, "file", "identity_file_open", "\\u{1b}[2Jodd", &["/etc/hosts", "open"]);
    only(findings, "generator", "unseeded_random", "python3", &["Python's random", "OpenSSL (libcrypto)"]);
    // What is restarted in forks brings nothing along.
    assert_eq!(listed("restarted"), Vec::<&Value>::new());

    // Both ends of the card's, the one whose other end is nowhere, and what runs Python among them; not those that go on by themselves.
    let connections = listed("connections");
    let with = |text: &str| -> Vec<&&Value> {
        connections.iter().filter(|finding| finding["reason"].as_str().unwrap().contains(text)).collect()
    };
    assert_eq!(with("192.0.2.77:7001").len(), 2, "{connections:#?}");
    for end in with("192.0.2.77:7001") {
        check(end, "tcp_connection", "busybox", &["which the capture ends", "ECONNABORTED"]);
    }
    let [nowhere] = with("198.51.100.7:443")[..] else { panic!("{connections:#?}") };
    check(nowhere, "tcp_connection", "python3", &["from 203.0.113.1:5000", "does not end it"]);
    for kept in ["127.0.0.1", ":7003"] {
        assert_eq!(with(kept).len(), 0, "{connections:#?}");
    }
    check(with("random")[0], "unseeded_random", "python3", &["Python's random"]);
    assert_eq!(connections.len(), 4, "{connections:#?}");
    assert_eq!(findings.as_array().unwrap().len(), 8, "{findings:#}");

    // A person is told the same, can not be fooled by a process' name, and nobody is told a secret.
    let shown = built.err();
    for finding in findings.as_array().unwrap() {
        let (kind, cure) = (finding["kind"].as_str().unwrap(), finding["cure"].as_str().unwrap());
        assert!(shown.contains(&format!("warning: {kind}: ")) && shown.contains(&format!("  cure: {cure}")), "{shown}");
        assert!(shown.contains(&format!("process {} of service", finding["process"]["pid"])), "{shown}");
    }
    assert!(!shown.contains("\u{1b}[2J"), "{shown:?}");
    tells_no_secret("the build", &(built.out() + &shown));
    let listed = bench.offshoot(&["templates"]).ok();
    assert_eq!(&listed.json()["templates"][0]["findings"], findings);
    tells_no_secret("the list of templates", &listed.out());
    tells_no_secret_in_files(&bench.data());
    // The check can fail: the template's memory has them.
    assert!(
        fs::read(template.memory_file()).unwrap().windows(SECRETS[0].len()).any(|part| part == SECRETS[0].as_bytes())
    );

    // It can be forked all the same. What was named is true of the forks, and of nothing else.
    let forks = bench.fork(&template, &["-n", "2", "--name", "copy", "--network", "none"]);
    let drawn: Vec<[String; 2]> = forks
        .iter()
        .map(|fork| {
            assert_eq!(bench.sh(fork, "hostname; cat /run/offshoot/id"), format!("{}\n{}", fork.name(), fork.id()));
            // The file that was open is the template's, and another is in its place.
            let held = bench.sh(fork, &format!("cat /proc/{}/fd/7", file["process"]["pid"]));
            assert!(held.contains("localhost") && !held.contains(fork.name()), "{held}");
            assert!(bench.sh(fork, "cat /etc/hosts").contains(fork.name()));
            ["kept", "restarted"].map(|name| {
                let _ = bench.sh(fork, &format!("echo > /tmp/{name}.ask"));
                let drawn = || bench.sh(fork, &format!("cat /tmp/{name}.drawn 2>/dev/null || true"));
                wait_until("a draw", Duration::from_secs(60), || !drawn().is_empty());
                drawn()
            })
        })
        .collect();
    let random = |drawn: &str| drawn.split(' ').next().unwrap().to_owned();
    assert_eq!(
        random(&drawn[0][0]),
        random(&drawn[1][0]),
        "a generator that nobody reseeds goes on the same: {drawn:?}"
    );
    assert_ne!(random(&drawn[0][1]), random(&drawn[1][1]), "{drawn:?}");
    for fork in &forks {
        tells_no_secret("inspect", &bench.offshoot(&["inspect", fork.name()]).ok().out());
        tells_no_secret("logs", &bench.plain_ok(&["logs", fork.name()]));
    }
    tells_no_secret_in_files(bench.state());
    bench.end();
}

/// A recipe that is clean but for what is added to its service.
fn busybox(dir: &Path, more: &str) {
    let text = format!(
        "name = \"audited\"\nmemory = \"128M\"\n[rootfs]\nkind = \"busybox\"\n[[services]]\nname = \"web\"\n\
         command = [\"/bin/sh\", \"-c\", \"echo ready; while :; do sleep 3600; done\"]\nready_line = \"ready\"\n{more}\n"
    );
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("recipe.toml"), text).unwrap();
}

#[test]
fn i17_with_strict_a_template_that_is_not_clean_is_refused_and_nothing_is_left() {
    let (bench, dir) = (Bench::with_own_data(), tempfile::tempdir().unwrap());
    let (dirty, clean) = (dir.path().join("dirty"), dir.path().join("clean"));
    busybox(&dirty, "env = { API_TOKEN = \"in-the-environment-7d1f\", PASSWORD = \"in-the-arguments-93c2\" }");
    busybox(&clean, "env = { API_TOKEN_FILE = \"/run/offshoot/secrets/API_TOKEN\" }");
    let build = |recipe: &Path, tag: &str, more: &[&str]| {
        bench.offshoot(&[&["build", recipe.to_str().unwrap(), "--tag", tag], more].concat())
    };
    let refused = build(&dirty, "one", &["--strict"]).exits(1);
    let error = refused.refused("template_not_clean");
    let cause = error["causes"][0].as_str().unwrap();
    for text in
        ["secret_in_environment: sh (process ", " of service web)", "API_TOKEN", "PASSWORD", "cure: ", "--secret"]
    {
        assert!(cause.contains(text), "{text:?} is not in {error:#}");
    }
    tells_no_secret("the refusal", &(refused.out() + &refused.err()));
    nothing_is_left(&bench, None);

    // Through the daemon, by name.
    let mut daemon = Daemon::start(&bench, &["--recipes", dir.path().to_str().unwrap()]);
    let build_there = |recipe: &str, tag: &str, strict: bool| {
        let begun =
            daemon.post("/v1/templates", &json!({ "recipe": recipe, "tag": tag, "strict": strict })).expect(202).json();
        let path = format!("/v1/jobs/{}", begun["id"].as_str().unwrap());
        wait_until("the end of the build", Duration::from_secs(300), || daemon.get(&path).json()["state"] != "running");
        daemon.get(&path).json()
    };
    let job = build_there("dirty", "two", true);
    assert_eq!((&job["state"], &job["error"]["code"]), (&"failed".into(), &"template_not_clean".into()), "{job:#}");
    assert!(job["error"]["causes"][0].as_str().unwrap().contains("API_TOKEN"), "{job:#}");
    tells_no_secret("the job", &job.to_string());
    nothing_is_left(&bench, Some(daemon.pid()));
    let job = build_there("clean", "three", true);
    assert_eq!((&job["state"], &job["result"]["findings"]), (&"done".into(), &json!([])), "{job:#}");
    let job = build_there("dirty", "four", false);
    let findings = &job["result"]["findings"];
    only(findings, "web", "secret_in_environment", "sh", &["variable API_TOKEN, variable PASSWORD"]);
    assert_eq!(findings.as_array().unwrap().len(), 1);
    assert_eq!(daemon.get("/v1/templates/four").expect(200).json()["findings"], *findings);
    tells_no_secret("the job", &job.to_string());
    assert!(daemon.end().success());
    drop(daemon);

    // What is built here says the same, as JSON too.
    let built = build(&dirty, "five", &[]).ok();
    only(&built.json()["findings"], "web", "secret_in_environment", "sh", &["variable API_TOKEN, variable PASSWORD"]);
    assert!(built.json()["warnings"][0].as_str().unwrap().starts_with("secret_in_environment: sh (process "));
    tells_no_secret("the build", &(built.out() + &built.err()));
    tells_no_secret_in_files(&bench.data());
    bench.end();
}

#[test]
fn i17_the_recipes_of_the_program_are_clean() {
    let bench = Bench::with_own_data();
    for recipe in ["busybox", "python"] {
        let built = bench.offshoot(&["build", recipe, "--tag", recipe, "--strict"]).ok().json();
        assert_eq!(
            (&built["findings"], &built["findings_left_out"], &built["warnings"]),
            (&json!([]), &json!(0), &json!([]))
        );
    }
    // An agent that does not look can not say that there is nothing.
    let mut command = bench.command(&["build", "busybox", "--tag", "unknown", "--strict"]);
    command.env("OFFSHOOT_AGENT", programs::beside("offshoot-agent-without-freeze"));
    Run::of(command, &[]).exits(1).refused("template_not_audited");
    let left = fs::read_dir(bench.data().join("templates")).unwrap().count();
    assert_eq!(left, 2);
    bench.end();
}
