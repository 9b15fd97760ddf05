//! The command line through the daemon (`--host`): the same verbs, the same exit codes, the same forks.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
};

use offshoot_tests::{Bench, Daemon, Kind, Run, daemon::free_port};
use serde_json::{Value, json};

/// A command line that has nothing but the address: neither the daemon's directories nor its templates.
#[derive(Debug)]
struct Client<'a> {
    bench: &'a Bench,
    host: String,
    variables: Vec<(&'static str, String)>,
    elsewhere: tempfile::TempDir,
}

impl<'a> Client<'a> {
    fn new(bench: &'a Bench, host: impl Into<String>) -> Self {
        let elsewhere = tempfile::tempdir().unwrap();
        Self { bench, host: host.into(), variables: Vec::new(), elsewhere }
    }

    fn of_socket(bench: &'a Bench) -> Self {
        Self::new(bench, format!("unix://{}", bench.state().join("api/offshoot.sock").display()))
    }

    fn with(mut self, variable: &'static str, value: impl Into<String>) -> Self {
        self.variables.push((variable, value.into()));
        self
    }

    /// `offshoot --host HOST ARGS`, not yet started.
    fn plain(&self, args: &[&str]) -> Command {
        let mut command = self.bench.plain(&[&["--host", &self.host], args].concat());
        for variable in ["OFFSHOOT_DATA_DIR", "OFFSHOOT_STATE_DIR", "OFFSHOOT_CACHE_DIR"] {
            command.env(variable, self.elsewhere.path());
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::of(self.plain(args), &[])
    }

    fn json(&self, args: &[&str]) -> Run {
        self.run(&[&["--json"], args].concat())
    }

    /// What a shell script in a fork prints, without the newline at its end.
    #[track_caller]
    fn sh(&self, fork: &str, script: &str) -> String {
        self.run(&["exec", fork, "--", "/bin/sh", "-c", script]).ok().out().trim_end().to_owned()
    }
}

/// Forks that a document of `fork` tells of.
fn made(run: &Run) -> Vec<Value> {
    let document = run.json();
    let results = document["results"].as_array().unwrap_or_else(|| panic!("no results: {document}"));
    results
        .iter()
        .map(|result| result["fork"].clone())
        .inspect(|fork| assert!(fork.is_object(), "{document}"))
        .collect()
}

/// The first column of a table's rows.
fn names(table: &str) -> Vec<String> {
    table.lines().skip(1).map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

/// The titles of a table's columns.
fn columns(table: &str) -> Vec<&str> {
    table.lines().next().unwrap_or_default().split_whitespace().collect()
}

#[test]
fn forks_made_through_the_daemon_are_each_their_own_and_both_ways_see_the_same() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let client = Client::of_socket(&bench);
    let dir = tempfile::tempdir().unwrap();
    let [secret, file] = ["secret", "file"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    fs::write(&secret, "hunter2").unwrap();
    fs::write(&file, b"\xff\x00bytes").unwrap();
    let forks = made(
        &client
            .json(&[
                "fork",
                &template.tag,
                "-n",
                "2",
                "--name",
                "far",
                "-l",
                "from=far",
                "-e",
                "WHERE=far",
                "--secret",
                &format!("KEY=@{secret}"),
                "--file",
                &format!("/tmp/given=@{file}:0600"),
                "--pids",
                "50",
            ])
            .ok(),
    );
    let local = bench.fork_one(&template, &["--name", "near"]);
    // Each is its own, and none is the template.
    let identities = |field: &str| {
        let mut all: Vec<String> = forks.iter().map(|fork| fork[field].as_str().unwrap().to_owned()).collect();
        all.push(local.text(field).to_owned());
        all
    };
    for field in ["id", "machine_id", "boot_id", "hostname"] {
        let mut values = identities(field);
        // What the template showed of it, where it is a thing of the guest's that a template has too.
        values.extend(template.manifest["facts"][field].as_str().map(str::to_owned));
        assert_eq!(values.len(), if matches!(field, "boot_id" | "hostname") { 4 } else { 3 }, "{field}: {values:?}");
        let count = values.len();
        values.sort();
        values.dedup();
        assert_eq!(values.len(), count, "{field}: {values:?}");
    }
    for name in ["far-1", "far-2"] {
        assert_eq!(
            client.sh(name, "hostname; echo $WHERE; cat /run/offshoot/secrets/KEY"),
            format!("{name}\nfar\nhunter2")
        );
        assert_eq!(client.sh(name, "stat -c %a /tmp/given; od -An -tx1 /tmp/given"), "600\n ff 00 62 79 74 65 73");
        // Here and there it is the same fork.
        assert_eq!(bench.sh_of(name, "cat /etc/machine-id"), client.sh(name, "cat /etc/machine-id"));
    }
    assert_eq!(
        client.sh("near", "hostname; echo -$WHERE-"),
        "near\n--",
        "one made here is seen there, and has nothing of theirs"
    );
    let mut listed = names(&client.run(&["ls"]).ok().out());
    listed.sort();
    assert_eq!(listed, ["far-1", "far-2", "near"]);
    let table = client.run(&["ls"]).ok().out();
    assert_eq!(columns(&table), columns(&bench.plain_ok(&["ls"])), "the same table");
    assert!(table.contains("alive") && table.contains("from=far"), "{table}");
    let mut here: Vec<String> = bench.ls().into_iter().map(|(name, _)| name).collect();
    here.sort();
    assert_eq!(here, listed);
    let inspected = client.run(&["inspect", "far-1"]).ok();
    assert_eq!((&inspected.json()["id"], &inspected.json()["limits"]["pids"]), (&forks[0]["id"], &json!(50)));
    assert!(!inspected.out().contains("hunter2"));
    // The names of the variables do the same as the option.
    let mut command = bench.plain(&["ls", "-q"]);
    command.env("OFFSHOOT_HOST", &client.host).env("OFFSHOOT_STATE_DIR", dir.path());
    assert_eq!(Run::of(command, &[]).ok().out().lines().count(), 3);
    // A name that is taken there, and one that is taken here, are refused with the same code.
    client.json(&["fork", &template.tag, "--name", "near"]).exits(1).refused("name_conflict");
    bench.offshoot(&["fork", &template.tag, "--name", "far-1"]).exits(1).refused("name_conflict");
    client.json(&["fork", "no-such"]).exits(1).refused("template_not_found");
    client.json(&["fork", &template.tag, "-n", "0"]).exits(2).refused("invalid_request");
    client.json(&["fork", &template.tag, "--secret", "KEY=hunter2"]).exits(2).refused("secret_in_arguments");
    assert!(client.run(&["templates"]).ok().out().contains(&template.tag));
    let pinged = client.run(&["ping", "far-1"]).ok().out();
    assert!(pinged.starts_with("far-1  running"), "{pinged}");
    let killed = client.json(&["kill", "far-1", forks[0]["id"].as_str().unwrap(), "near"]).ok().json();
    assert_eq!(killed["killed"].as_array().unwrap().len(), 2, "{killed}");
    assert_eq!(bench.ls(), [("far-2".to_owned(), true)]);
    client.json(&["inspect", "far-1"]).exits(1).refused("fork_not_found");
    assert_eq!(client.run(&["kill", "--all"]).ok().out(), "far-2  killed\n");
    assert!(!daemon.said().concat().contains("hunter2"));
    drop(daemon);
    bench.end();
}

#[test]
fn exec_through_the_daemon_has_the_commands_streams_and_exit_code() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let client = Client::of_socket(&bench);
    let _ = client.run(&["fork", &template.tag, "-n", "2", "--name", "e"]).ok();
    for fork in ["e-1", "e-2"] {
        assert_eq!(client.sh(fork, "hostname"), fork);
        for code in [1, 42, 255] {
            let _ = client.run(&["exec", fork, "--", "/bin/sh", "-c", &format!("exit {code}")]).exits(code);
        }
    }
    let exec = |args: &[&str]| client.run(&[&["exec", "e-1"], args].concat());
    let both = exec(&["--", "/bin/sh", "-c", "echo out; echo err >&2"]).ok();
    assert_eq!((both.out().as_str(), both.err().as_str()), ("out\n", "err\n"));
    let _ = exec(&["--", "/bin/sh", "-c", "kill -TERM $$"]).exits(128 + 15);
    let _ = exec(&["--", "/no/such/program"]).exits(127);
    let _ = exec(&["--timeout", "0.3", "--", "/bin/sleep", "60"]).exits(124);
    assert_eq!(exec(&["-e", "A=b", "-w", "/tmp", "--", "/bin/sh", "-c", "echo $A; pwd"]).ok().out(), "b\n/tmp\n");
    client.json(&["exec", "no-such", "--", "/bin/true"]).exits(125).refused("fork_not_found");
    // Without -i there is no input; with it, more than all buffers hold goes in and comes back whole.
    assert_eq!(Run::of(client.plain(&["exec", "e-1", "--", "/bin/cat"]), b"not passed on").ok().out(), "");
    let input: Vec<u8> = (0..=250).cycle().take(3 << 20).collect();
    let back = Run::of(client.plain(&["exec", "e-1", "-i", "--", "/bin/cat"]), &input).ok();
    assert!(back.stdout == input, "{} bytes of {} came back", back.stdout.len(), input.len());
    let lines = client.json(&["exec", "e-1", "--", "/bin/sh", "-c", "echo x; exit 7"]).exits(7).out();
    assert_eq!(lines, "{\"stdout_base64\":\"eAo=\"}\n{\"exit\":{\"code\":7,\"timed_out\":false}}\n");
    // It comes as it is written, and a signal reaches the command.
    let script = "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut command = client.plain(&["exec", "e-2", "--", "/bin/sh", "-c", script]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    line.clear();
    output.read_line(&mut line).unwrap();
    assert_eq!((line.as_str(), child.wait().unwrap().code()), ("told\n", Some(9)));
    // With a terminal the command has one.
    assert_eq!(exec(&["-t", "--", "/bin/sh", "-c", "test -t 1 && echo tty"]).ok().out(), "tty\r\n");
    // The daemon goes away in the middle.
    let mut command = client.plain(&["--json", "exec", "e-2", "--", "/bin/sh", "-c", "echo ready; sleep 600"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    drop(daemon);
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("\"host_lost\""), "{ended:?}");
    bench.end();
}

#[test]
fn eval_goes_through_the_daemon() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let daemon = Daemon::start(&bench, &[]);
    let client = Client::of_socket(&bench);
    let _ = client.run(&["fork", &template.tag, "-n", "2", "--name", "p"]).ok();
    let random = |fork: &str| client.run(&["eval", fork, "--", "import random; random.random()"]).ok().out();
    assert_ne!(random("p-1"), random("p-2"));
    assert_eq!(client.run(&["eval", "p-1", "--", "print('said'); 6 * 7"]).ok().out(), "said\n42\n");
    assert_eq!(client.json(&["eval", "p-1", "--", "6 * 7"]).ok().json()["value"], 42);
    assert_eq!(Run::of(client.plain(&["eval", "p-2", "-"]), b"1 + 1").ok().out(), "2\n");
    let raised = client.json(&["eval", "p-1", "--", "1 / 0"]).exits(1);
    let error = raised.refused("exception");
    assert!(error["message"].as_str().unwrap().contains("division"), "{error}");
    client.json(&["eval", "p-1", "--timeout", "0.5", "--", "while True: pass"]).exits(1).refused("eval_timeout");
    drop(daemon);
    bench.end();
}

#[test]
fn cp_through_the_daemon_brings_files_both_ways_and_is_never_half() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let client = Client::of_socket(&bench);
    let _ = client.run(&["fork", &template.tag, "-n", "2", "--name", "c"]).ok();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("box")).unwrap();
    let content: Vec<u8> = (0..=240).cycle().take(5 << 20).collect();
    fs::write(path("box/big file"), &content).unwrap();
    std::os::unix::fs::symlink("big file", path("box/link")).unwrap();
    fs::write(path("a b?&%"), "one").unwrap();
    for fork in ["c-1", "c-2"] {
        let _ = client.run(&["cp", &path("box"), &format!("{fork}:/tmp")]).ok();
        let _ = client.run(&["cp", &path("a b?&%"), &format!("{fork}:/tmp/a b?&%")]).ok();
        assert_eq!(client.sh(fork, "cat '/tmp/a b?&%'; readlink /tmp/box/link"), "onebig file");
        let _ = client.run(&["cp", &format!("{fork}:/tmp/box"), &path(fork)]).ok();
        assert!(fs::read(path(fork) + "/big file").unwrap() == content, "the bytes are the same");
        assert_eq!(fs::read_link(path(fork) + "/link").unwrap(), Path::new("big file"));
        let _ = client.run(&["cp", &format!("{fork}:/tmp/a b?&%"), &path("back")]).ok();
        assert_eq!(fs::read_to_string(path("back")).unwrap(), "one");
    }
    let _ = client.sh("c-1", "echo changed > /tmp/box/mine");
    assert_eq!(client.sh("c-2", "ls /tmp/box"), "big file\nlink", "a copy into one fork is in no other");
    client.json(&["cp", "c-1:/no/such", &path("x")]).exits(1).refused("guest_refused");
    client.json(&["cp", &path("no such"), "c-1:/tmp"]).exits(1).refused("local_file_failed");
    // A refusal is heard, though it comes while there is more to send.
    for _ in 0..20 {
        client.json(&["cp", &path("box"), "no-such:/tmp"]).exits(1).refused("fork_not_found");
        client.json(&["cp", &path("box"), "c-1:/etc/passwd/x"]).exits(1).refused("guest_refused");
    }
    // A folder of which a part can not be read is an error here, though the daemon could not know.
    fs::create_dir(path("half")).unwrap();
    fs::write(path("half/a"), "whole").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("half/z")).unwrap();
    client.json(&["cp", &path("half"), "c-2:/tmp"]).exits(1).refused("local_file_failed");
    drop(daemon);
    bench.end();
}

#[test]
fn a_fork_goes_to_disk_and_has_children_through_the_daemon() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    if template.manifest["engine"]["name"] != "qemu" {
        return;
    }
    let daemon = Daemon::start(&bench, &[]);
    let client = Client::of_socket(&bench);
    let _ = client.run(&["fork", &template.tag, "-n", "2", "--name", "s"]).ok();
    let _ = client.sh("s-1", "echo kept > /tmp/state");
    let before = client.sh("s-1", "cat /etc/machine-id");
    let moved = client.run(&["standby", "s-1"]).ok().out();
    assert!(moved.starts_with("s-1  standby in") && moved.contains("on disk"), "{moved}");
    let listed = client.run(&["ls"]).ok().out();
    assert!(listed.lines().any(|line| line.starts_with("s-1") && line.contains("standby")), "{listed}");
    let _ = client.json(&["exec", "s-1", "--", "/bin/true"]).exits(125).error();
    client.json(&["rmi", &template.tag]).exits(1).refused("template_in_use");
    let children = made(&client.json(&["fork", "--from", "s-1", "-n", "2", "--name", "k"]).ok());
    assert_ne!(children[0]["machine_id"], children[1]["machine_id"]);
    let _ = client.run(&["resume", "s-1"]).ok();
    assert_eq!(client.sh("s-1", "cat /etc/machine-id /tmp/state"), format!("{before}\nkept"));
    for child in ["k-1", "k-2"] {
        assert_eq!(client.sh(child, "cat /tmp/state; hostname"), format!("kept\n{child}"));
        assert_ne!(client.sh(child, "cat /etc/machine-id"), before);
    }
    assert_eq!(client.sh("s-2", "cat /tmp/state 2>/dev/null || echo none"), "none");
    client.json(&["resume", "s-1"]).exits(1).refused("fork_runs");
    drop(daemon);
    bench.end();
}

#[test]
fn long_work_and_logs_come_as_events() {
    let bench = Bench::with_own_data();
    let template = bench.template(Kind::Busybox);
    let daemon = Daemon::start(&bench, &[]);
    let client = Client::of_socket(&bench);
    let verified = client.run(&["verify", &template.tag, "-n", "2"]).ok();
    assert!(verified.out().contains("PASS") && !verified.err().is_empty(), "{verified:#}");
    assert_eq!(client.json(&["verify", &template.tag, "-n", "2"]).ok().json()["passed"], true);
    client.json(&["verify", "no-such"]).exits(1).refused("template_not_found");
    client.json(&["build", "./recipe", "--tag", "x"]).exits(2).refused("recipe_by_name");
    client.json(&["build", "no-such", "--tag", "x"]).exits(1).refused("recipe_not_found");
    client.json(&["build", "busybox", "--tag", &template.tag]).exits(1).refused("template_exists");
    let _ = client.run(&["pool", &template.tag, "1", "--network", "none"]).ok();
    let pools = client.run(&["pool"]).ok().out();
    assert!(pools.contains(&template.tag), "{pools}");
    assert_eq!(columns(&pools), columns(&bench.plain_ok(&["pool"])), "the same table");
    let _ = client.run(&["pool", &template.tag, "0"]).ok();
    let _ = client.run(&["fork", &template.tag, "-n", "2", "--name", "l"]).ok();
    let _ = client.run(&["logs", "l-1"]).ok();
    assert_eq!(client.run(&["mailboxes", &template.tag]).ok().out(), bench.plain_ok(&["mailboxes", &template.tag]));
    let version = client.run(&["version"]).ok().out();
    assert!(version.contains("daemon") && version.contains("v1"), "{version}");
    for (verb, args) in [
        ("doctor", &["doctor"][..]),
        ("cleanup", &["cleanup", "--yes"]),
        ("bench", &["bench", "x"]),
        ("serve", &["serve"]),
        ("completions", &["completions", "bash"]),
    ] {
        let error = client.json(args).exits(2).refused("local_only");
        assert!(error["message"].as_str().unwrap().starts_with(verb), "{error}");
    }
    drop(daemon);
    bench.end();
}

#[test]
fn o1_over_tcp_the_command_line_needs_a_token_and_trusts_only_the_root_it_was_given() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let dir = tempfile::tempdir().unwrap();
    let [root, root_key, csr, cert, key, ext] = ["root.pem", "root.key", "c.csr", "c.pem", "c.key", "ext"]
        .map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let openssl = |args: &[&str]| {
        let made = Command::new("openssl").args(args).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    };
    let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    openssl(
        &[&["req", "-x509"], &curve[..], &["-days", "2", "-subj", "/CN=a root", "-keyout", &root_key, "-out", &root]]
            .concat(),
    );
    openssl(&[&["req"], &curve[..], &["-subj", "/CN=localhost", "-keyout", &key, "-out", &csr]].concat());
    fs::write(&ext, "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    openssl(&[
        "x509",
        "-req",
        "-in",
        &csr,
        "-CA",
        &root,
        "-CAkey",
        &root_key,
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        &ext,
        "-out",
        &cert,
    ]);
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let daemon = Daemon::start(&bench, &["--listen", &listen, "--tls-cert", &cert, "--tls-key", &key]);
    let local = Client::of_socket(&bench);
    let created = local.run(&["token", "create", "far", "--scope", "fork"]).ok().out();
    let token = created.trim_end();
    assert!(local.run(&["token", "ls"]).ok().out().contains("far"));
    let host = format!("https://localhost:{port}");
    let trusting = || Client::new(&bench, &host).with("OFFSHOOT_CA", &root);
    let client = trusting().with("OFFSHOOT_TOKEN", token);
    let forks = made(&client.json(&["fork", &template.tag, "-n", "2", "--name", "t"]).ok());
    assert_ne!(forks[0]["machine_id"], forks[1]["machine_id"]);
    assert_eq!(client.sh("t-2", "hostname"), "t-2");
    let echoed = Run::of(client.plain(&["exec", "t-1", "-i", "--", "/bin/cat"]), b"over TLS").ok();
    assert_eq!(echoed.out(), "over TLS");
    // No token, a wrong one, one with too small a scope.
    trusting().json(&["ls"]).exits(1).refused("unauthorized");
    let wrong = trusting().with("OFFSHOOT_TOKEN", format!("{}x", &token[..token.len() - 1]));
    wrong.json(&["ls"]).exits(1).refused("unauthorized");
    wrong.json(&["exec", "t-1", "--", "/bin/true"]).exits(125).refused("unauthorized");
    client.json(&["token", "ls"]).exits(1).refused("forbidden");
    // Without the root, with the root but another name, with plain HTTP.
    let stranger = Client::new(&bench, &host).with("OFFSHOOT_TOKEN", token);
    let error = stranger.json(&["ls"]).exits(1).refused("host_untrusted");
    assert!(error["next"].as_str().unwrap().contains("--ca"), "{error}");
    let other_name = Client::new(&bench, format!("https://127.0.0.1:{port}")).with("OFFSHOOT_CA", &root);
    other_name.json(&["ls"]).exits(1).refused("host_untrusted");
    let plain = Client::new(&bench, format!("http://{listen}")).with("OFFSHOOT_TOKEN", token);
    let _ = plain.json(&["ls"]).exits(1).error();
    let away = Client::new(&bench, "http://192.0.2.1:80").with("OFFSHOOT_TOKEN", token);
    away.json(&["ls"]).exits(2).refused("host_invalid");
    trusting().json(&["ls", "--ca", &key]).exits(1).refused("ca_unusable");
    // A token that was removed ends. (Other tests have tokens here as well.)
    let _ = local.run(&["token", "rm", token.split('_').nth(1).unwrap()]).ok();
    client.json(&["ls"]).exits(1).refused("unauthorized");
    assert!(!daemon.said().concat().contains(token));
    drop(daemon);
    bench.end();
}

#[test]
fn where_nobody_answers_the_error_is_typed_and_names_the_next_command() {
    let bench = Bench::new();
    let nowhere = Client::of_socket(&bench);
    for args in [&["ls"][..], &["fork", "x"], &["kill", "--all"], &["ping", "x"], &["version"]] {
        let error = nowhere.json(args).exits(1).refused("host_unreachable");
        assert!(error["next"].as_str().unwrap().starts_with("offshoot serve"), "{error}");
    }
    nowhere.json(&["exec", "x", "--", "/bin/true"]).exits(125).refused("host_unreachable");
    let closed = Client::new(&bench, format!("http://127.0.0.1:{}", free_port()));
    closed.json(&["ls"]).exits(1).refused("host_unreachable");
    for host in ["unix://relative", "ftp://x:1", "https://x", "https://user:hunter2@x:1"] {
        let error = Client::new(&bench, host).json(&["ls"]).exits(2).refused("host_invalid");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
    // Somebody else answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 1024];
        let _ = std::io::Read::read(&mut stream, &mut head);
        stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\n<html>").unwrap();
    });
    Client::new(&bench, format!("http://127.0.0.1:{port}")).json(&["ls"]).exits(1).refused("host_answer");
    answering.join().unwrap();
    bench.end();
}
