//! Every fork is itself, and nothing of another's identity or of its secrets is anywhere.

use std::{
    collections::BTreeSet,
    fs,
    hash::{DefaultHasher, Hasher},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use identity::mailbox::{PAGE_SIZE, offset};
use offshoot_tests::{Bench, Fork, Kind, Template, processes};

/// What a workload sees of itself, a line each.
const WHO: &str = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; \
    head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; \
    for f in id name hostname machine-id boot-id; do cat /run/offshoot/$f; echo; done; echo $OFFSHOOT_ID";

fn who(bench: &Bench, fork: &Fork) -> Vec<String> {
    let lines: Vec<String> = bench.sh(fork, WHO).lines().map(ToOwned::to_owned).collect();
    assert_eq!(lines.len(), 10, "{lines:?}");
    lines
}

fn file(content: &[u8]) -> (tempfile::NamedTempFile, String) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    (file, path)
}

fn contains(path: &Path, needle: &[u8]) -> bool {
    memchr::memmem::find(&fs::read(path).unwrap(), needle).is_some()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            files.extend(files_below(&path));
        } else if metadata.is_file() {
            files.push(path);
        }
    }
    files
}

#[test]
fn i10_host_name_ids_and_randomness_differ_among_forks_and_from_the_template() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let forks = bench.fork(&template, &["-n", "3"]);
    let seen: Vec<Vec<String>> = forks.iter().map(|fork| who(&bench, fork)).collect();
    for (fork, lines) in forks.iter().zip(&seen) {
        // What the fork sees is what its record says.
        let told = ["hostname", "machine_id", "boot_id"].map(|field| fork.text(field).to_owned());
        assert_eq!(lines[..3], told);
        let directory = ["id", "name", "hostname", "machine_id", "boot_id"].map(|field| fork.text(field).to_owned());
        assert_eq!(lines[4..9], directory);
        assert_eq!(lines[9], fork.id());
    }
    let facts = &template.manifest["facts"];
    for field in 0..10 {
        let mut values: BTreeSet<&str> = seen.iter().map(|lines| lines[field].as_str()).collect();
        assert_eq!(values.len(), 3, "two forks share field {field}: {values:?}");
        // The template has no id, no name, and no machine id of its own; what it has is nobody else's.
        let before = [(0, "hostname"), (2, "boot_id")].into_iter().find(|(at, _)| *at == field);
        if let Some((_, fact)) = before {
            assert!(values.insert(facts[fact].as_str().unwrap()), "a fork has the template's {fact}");
        }
    }
    bench.end();
}

#[test]
fn i8_i10_the_report_says_what_was_refreshed_and_the_clock_is_right() {
    let bench = Bench::new();
    let forks = bench.fork(&bench.template(Kind::Busybox), &["-n", "2"]);
    for fork in &forks {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let before = now();
        let pong = bench.offshoot(&["ping", fork.name()]).ok().json();
        let after = now();
        let clock: u128 = pong["wall_clock_ns"].as_str().unwrap().parse().unwrap();
        assert!(clock + 500_000_000 > before && clock < after + 500_000_000, "{clock} is not in {before}..{after}");
        assert_eq!(pong["id"], fork.id());
        let steps = fork.record["guest_steps"].as_array().unwrap();
        let outcome = |name: &str| steps.iter().find(|step| step["step"] == name).map(|step| step["outcome"].clone());
        for step in ["clock", "entropy", "hostname", "machine-id", "boot-id", "identity-dir", "thaw"] {
            assert!(outcome(step).is_some_and(|outcome| outcome != "failed"), "{step} is missing in {steps:?}");
        }
        assert!(outcome("entropy").unwrap().as_str().unwrap().contains("reseed"), "{steps:?}");
    }
    bench.end();
}

#[test]
fn i16_verify_finds_forks_pairwise_distinct_and_leaves_nothing() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let verdict = bench.offshoot(&["verify", &template.tag, "-n", "3"]).ok().json();
    assert_eq!(verdict["passed"], true);
    assert_eq!(verdict["rows"].as_array().unwrap().len(), 4, "the template and three forks");
    bench.assert_empty();
    bench.offshoot(&["verify", &template.tag, "-n", "1"]).exits(2).refused("too_few_forks");
    bench.end();
}

#[test]
fn i2_forks_do_not_change_the_template() {
    fn hash(template: &Template) -> Vec<u64> {
        let hash = |name: &&str| {
            let mut hasher = DefaultHasher::new();
            hasher.write(&fs::read(template.dir().join(name)).unwrap());
            hasher.finish()
        };
        ["memory.img", "state.bin", "root.img", "manifest.json"].iter().map(hash).collect()
    }
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let before = hash(&template);
    let forks = bench.fork(&template, &["-n", "3", "--env", "A=1"]);
    for fork in &forks {
        let _ = bench.sh(fork, "head -c 4000000 /dev/urandom > /dev/shm/x; cp /dev/shm/x /root/x; sync");
    }
    bench.end();
    assert_eq!(hash(&template), before);
}

#[test]
fn i12_i13_fields_are_delivered_and_absent_ones_keep_nothing() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let (_content, path) = file(b"line\n\xff\0");
    let given = bench.fork_one(
        &template,
        &[
            "--name",
            "given",
            "--env",
            "REGION=eu west",
            "--label",
            "team=blue",
            "--secret",
            &format!("KEY=@{path}"),
            "--file",
            &format!("/etc/app/config.toml=@{path}:0640"),
        ],
    );
    let bare = bench.fork_one(&template, &["--name", "bare"]);

    assert_eq!(bench.sh(&given, "echo $REGION"), "eu west");
    assert_eq!(
        bench.sh(&given, "cat /run/offshoot/env/REGION | od -An -c | tr -d ' '"),
        "euwest",
        "no newline at the end"
    );
    assert_eq!(bench.sh(&given, "cat /run/offshoot/labels.json"), "{\"team\":\"blue\"}");
    for (path, mode) in [("/run/offshoot/secrets/KEY", "400"), ("/etc/app/config.toml", "640")] {
        assert_eq!(bench.sh(&given, &format!("stat -c %a {path}")), mode);
        let content = bench.exec(&given, &["/bin/cat", path]).ok().stdout;
        assert_eq!(content, b"line\n\xff\0");
    }
    let inspected = bench.offshoot(&["inspect", "given"]).ok().json();
    assert_eq!(inspected["env"], serde_json::json!(["REGION"]));
    assert_eq!(inspected["secrets"], serde_json::json!(["KEY"]));
    assert_eq!(inspected["labels"]["team"], "blue");

    assert_eq!(
        bench.sh(&bare, "echo $REGION; ls /run/offshoot/env /run/offshoot/secrets | grep -v : | tr -d '\\n'"),
        ""
    );
    assert_eq!(bench.sh(&bare, "cat /run/offshoot/labels.json"), "{}");
    assert_eq!(bench.sh(&bare, "ls /etc/app 2>/dev/null | wc -l"), "0");
    assert_eq!(bench.sh(&bare, "grep -c team /run/offshoot/identity.json || true"), "0");
    bench.end();
}

#[test]
fn i12_a_workload_can_not_write_the_identity_directory() {
    let bench = Bench::new();
    let fork = bench.fork_one(&bench.template(Kind::Busybox), &[]);
    let refused = bench.exec(&fork, &["/bin/sh", "-c", "echo x > /run/offshoot/id"]);
    assert_ne!(refused.code, Some(0), "{refused}");
    assert_eq!(bench.sh(&fork, "cat /run/offshoot/id"), fork.id());
    bench.end();
}

#[test]
fn i13_a_warm_service_hears_of_its_identity() {
    let bench = Bench::new();
    let forks = bench.fork(&bench.template(Kind::Busybox), &["-n", "2"]);
    for fork in &forks {
        let wanted = format!("identity changed to {}", fork.text("hostname"));
        let mut seen = String::new();
        offshoot_tests::bench::wait_until("the service's answer", std::time::Duration::from_secs(20), || {
            seen = bench.plain_ok(&["logs", fork.name()]);
            seen.contains(&wanted)
        });
        assert_eq!(seen.matches("identity changed").count(), 1, "{seen}");
    }
    bench.end();
}

#[test]
fn i15_secrets_are_nowhere_but_in_their_file() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let secret = format!("s3cr3t-{:?}-{}", SystemTime::now().duration_since(UNIX_EPOCH).unwrap(), std::process::id());
    let coded = STANDARD.encode(&secret);
    let needles = [secret.as_bytes(), &coded.as_bytes()[..coded.len() - 4]];
    let (_file, path) = file(secret.as_bytes());
    let option = format!("KEY=@{path}");
    let forks = bench.fork(&template, &["-n", "2", "--name", "keeper", "--secret", &option]);
    // The positive control: it was delivered.
    for fork in &forks {
        assert_eq!(bench.sh(fork, "cat /run/offshoot/secrets/KEY"), secret);
        assert_eq!(bench.sh(fork, "cat /proc/*/environ 2>/dev/null | grep -c s3cr3t || true"), "0");
    }

    // Not in the pages that were the mailbox: everything that the host wrote there is zero again.
    for mailbox in template.manifest["mailboxes"].as_array().unwrap() {
        for page in mailbox["pages"].as_array().unwrap() {
            let at = page.as_u64().unwrap();
            for fork in &forks {
                let page = processes::guest_memory(fork.pid(), &template.memory_file(), at, PAGE_SIZE);
                assert!(identity::mailbox::has_magic(&page), "this is the mailbox's page");
                assert!(page[offset::PAYLOAD_LEN..].iter().all(|&byte| byte == 0), "the mailbox is not wiped");
            }
        }
    }
    // Not in the template, not in the state directory.
    for needle in needles {
        for path in files_below(&template.dir()).into_iter().chain(files_below(bench.state())) {
            assert!(!contains(&path, needle), "{} holds the secret", path.display());
        }
    }
    assert!(
        files_below(bench.state()).iter().any(|path| contains(path, b"keeper-1")),
        "the search finds what is there"
    );
    // Not in any process' arguments or environment.
    for pid in processes::all() {
        for name in ["cmdline", "environ"] {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            for needle in needles {
                assert!(memchr::memmem::find(&bytes, needle).is_none(), "/proc/{pid}/{name} holds the secret");
            }
        }
    }
    // Not in what is printed, errors included.
    let hasty = format!("KEY={secret}");
    let twice = [option.as_str(), "--secret", &option];
    for args in [
        vec!["inspect", "keeper-1"],
        vec!["ls"],
        vec!["fork", &template.tag, "--name", "keeper-1", "--secret", &option],
        vec!["fork", &template.tag, "--name", "other", "--secret", &hasty],
        [&["fork", template.tag.as_str(), "--secret"][..], &twice].concat(),
        vec!["logs", "keeper-1"],
    ] {
        let run = bench.offshoot(&args);
        for needle in needles {
            let found = [&run.stdout, &run.stderr].iter().any(|text| memchr::memmem::find(text, needle).is_some());
            assert!(!found, "`{}` prints the secret", args[0]);
        }
    }
    assert_eq!(bench.ls().len(), 2, "none of the wrong requests made a fork");
    bench.end();
}

#[test]
fn t3_bad_tags_and_names_are_refused_before_any_work() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let long = "a".repeat(65);
    for tag in ["../x", "/etc", "", ".", &long, "a b", "a/b"] {
        for args in
            [vec!["fork", tag], vec!["build", "busybox", "--tag", tag], vec!["rmi", tag], vec!["mailboxes", tag]]
        {
            let run = bench.offshoot(&args).exits(2);
            let _ = run.error();
        }
    }
    let long = "a".repeat(64);
    for name in ["", "-a", "a-", "A", "a.b", "a_b", "../x", &long] {
        let _ = bench.offshoot(&["fork", &template.tag, &format!("--name={name}")]).exits(2).error();
    }
    bench.offshoot(&["fork", "no-such-tag"]).exits(1).refused("template_not_found");
    bench.offshoot(&["fork", &template.tag, "-n", "0"]).exits(2).refused("out_of_range");
    bench.end();
}
