//! F3: commands, their streams and exit codes; copies; logs; ping.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::Stdio,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use offshoot_tests::{Bench, Fork, Kind, Run, bench::wait_until};

fn one() -> (Bench, Fork) {
    let bench = Bench::new();
    let fork = bench.fork_one(&bench.template(Kind::Busybox), &[]);
    (bench, fork)
}

#[test]
fn f3_exit_codes_are_the_commands() {
    let (bench, fork) = one();
    for code in [0, 1, 42, 255] {
        let _ = bench.exec(&fork, &["/bin/sh", "-c", &format!("exit {code}")]).exits(code);
    }
    let _ = bench.exec(&fork, &["/bin/sh", "-c", "kill -TERM $$"]).exits(128 + 15);
    let _ = bench.exec(&fork, &["/no/such/program"]).exits(127);
    let _ = bench.exec(&fork, &["/etc/passwd"]).exits(126);
    bench.offshoot(&["exec", "no-such-fork", "--", "/bin/true"]).exits(125).refused("fork_not_found");
    let json = bench.offshoot(&["exec", fork.name(), "--", "/bin/sh", "-c", "exit 7"]).exits(7);
    let last: serde_json::Value = serde_json::from_str(json.out().lines().last().unwrap()).unwrap();
    assert_eq!(last["exit"], serde_json::json!({ "code": 7, "timed_out": false }));
    bench.end();
}

#[test]
fn f3_sixty_commands_in_a_row_all_answer() {
    let (bench, fork) = one();
    for number in 0..60 {
        assert_eq!(bench.exec(&fork, &["/bin/echo", &number.to_string()]).ok().out(), format!("{number}\n"));
    }
    for _ in 0..20 {
        let run = bench.plain(&["exec", fork.name(), "--timeout", "0.2", "--", "/bin/sleep", "5"]);
        let _ = Run::of(run, &[]).exits(124);
    }
    assert_eq!(bench.sh(&fork, "echo alive"), "alive");
    bench.end();
}

#[test]
fn f3_output_streams_as_it_comes_and_both_streams_stay_apart() {
    let (bench, fork) = one();
    let both = bench.exec(&fork, &["/bin/sh", "-c", "echo out; echo err >&2"]).ok();
    assert_eq!((both.out().as_str(), both.err().as_str()), ("out\n", "err\n"));
    // A line comes while the command still runs: it goes on only when it is told to, which happens after the line was read.
    let mut command =
        bench.plain(&["exec", fork.name(), "-i", "--", "/bin/sh", "-c", "echo first; read x; echo got $x"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "first\n");
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"answer\n").unwrap();
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "got answer\n");
    assert!(child.wait().unwrap().success());
    bench.end();
}

#[test]
fn f3_input_of_any_size_comes_through_unchanged_and_ends() {
    let (bench, fork) = one();
    let input: Vec<u8> = (0..3_000_000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let echoed = Run::of(bench.plain(&["exec", fork.name(), "-i", "--", "/bin/cat"]), &input).ok();
    assert!(echoed.stdout == input, "{} of {} bytes came back, or others", echoed.stdout.len(), input.len());
    // Without -i there is nothing to read.
    let none = Run::of(bench.plain(&["exec", fork.name(), "--", "/bin/cat"]), b"unread").ok();
    assert!(none.stdout.is_empty());
    bench.end();
}

#[test]
fn f3_environment_and_working_directory_are_the_ones_asked_for() {
    let (bench, fork) = one();
    let run = bench.plain(&["exec", fork.name(), "-e", "A=b c", "-w", "/etc", "--", "/bin/sh", "-c", "echo $A; pwd"]);
    assert_eq!(Run::of(run, &[]).ok().out(), "b c\n/etc\n");
    assert_eq!(bench.sh(&fork, "echo $A"), "", "the next command has nothing of it");
    let nowhere = Run::of(bench.plain(&["exec", fork.name(), "-w", "/nowhere", "--", "/bin/pwd"]), &[]);
    assert!(nowhere.code != Some(0), "{nowhere}");
    bench.end();
}

#[test]
fn f3_a_timeout_ends_the_whole_tree() {
    let (bench, fork) = one();
    let tree = "sh -c 'sleep 4321 & sleep 4321' & setsid sleep 4321 & wait";
    let start = Instant::now();
    let run = bench.plain(&["exec", fork.name(), "--timeout", "1", "--", "/bin/sh", "-c", tree]);
    let _ = Run::of(run, &[]).exits(124);
    assert!(start.elapsed() < Duration::from_secs(20));
    wait_until("the end of the tree", Duration::from_secs(10), || {
        bench.sh(&fork, "ps | grep -c '[s]leep 4321' || true") == "0"
    });
    bench.end();
}

#[test]
fn f3_a_terminal_is_one() {
    let (bench, fork) = one();
    let tty = |args: &[&str]| {
        Run::of(
            bench.plain(
                &[&["exec", fork.name()], args, &["--", "/bin/sh", "-c", "test -t 1 && echo terminal || echo pipe"]]
                    .concat(),
            ),
            &[],
        )
        .ok()
        .out()
    };
    assert_eq!(tty(&["-t"]).trim_end(), "terminal");
    assert_eq!(tty(&[]), "pipe\n");
    bench.offshoot(&["exec", fork.name(), "-t", "--", "/bin/true"]).refused("usage");
    bench.end();
}

#[test]
fn f3_a_command_runs_as_the_user_who_is_asked_for() {
    let (bench, fork) = one();
    let _ = bench.sh(&fork, "echo 'web:x:33:34::/var/www:/bin/sh' >> /etc/passwd; echo 'logs:x:40:web' >> /etc/group");
    let as_user = |user: &str| {
        let script = "echo $(id -u) $(id -g) $HOME; id -G; touch /root/mine 2>/dev/null && echo root";
        Run::of(bench.plain(&["exec", fork.name(), "--user", user, "--", "/bin/sh", "-c", script]), &[])
    };
    for (user, expected) in [
        ("web", "33 34 /var/www\n34 40\n"),
        ("33", "33 34 /var/www\n34 40\n"),
        ("1000:1001", "1000 1001 /\n1001\n"),
        ("root", "0 0 /root\n0\nroot\n"),
    ] {
        assert_eq!(as_user(user).out(), expected, "{user}");
    }
    let unknown = as_user("nobody-here").exits(126);
    assert!(unknown.err().contains("nobody-here"), "{unknown}");
    bench.end();
}

#[test]
fn f3_a_terminals_size_follows_the_callers_and_signals_reach_the_command() {
    let (bench, fork) = one();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let screen = openpt(flags).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let size = |ws_row, ws_col| tcsetwinsize(&screen, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    size(33, 99);
    let script = "trap 'stty size' WINCH; trap 'echo caught; exit 5' TERM; stty size; while :; do sleep 0.1; done";
    let mut command = bench.plain(&["exec", fork.name(), "-t", "--", "/bin/sh", "-c", script]);
    let mut child = command.stdout(ioctl_tiocgptpeer(&screen, flags).unwrap()).spawn().unwrap();
    drop(command);
    let pid = Pid::from_child(&child);
    let mut lines = BufReader::new(fs::File::from(screen.try_clone().unwrap())).lines();
    let mut wait_for = |line: &str| assert!(lines.by_ref().any(|seen| seen.unwrap().trim_end() == line), "{line}");
    wait_for("33 99");
    // Who sizes a terminal's window tells its foreground; this one has none.
    size(40, 120);
    kill_process(pid, Signal::WINCH).unwrap();
    wait_for("40 120");
    kill_process(pid, Signal::TERM).unwrap();
    wait_for("caught");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    bench.end();
}

#[test]
fn f3_eight_commands_at_once_have_eight_answers() {
    let (bench, fork) = one();
    let children: Vec<_> = (0..8)
        .map(|number| {
            let script = format!("sleep 0.5; echo {number}");
            let mut command = bench.plain(&["exec", fork.name(), "--", "/bin/sh", "-c", &script]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (number, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{number}\n"));
    }
    // All channels are free again, also after one whose user was killed.
    let mut killed = bench.plain(&["exec", fork.name(), "--", "/bin/sleep", "9876"]).spawn().unwrap();
    wait_until("the command's start", Duration::from_secs(10), || {
        bench.sh(&fork, "ps | grep -c '[s]leep 9876' || true") != "0"
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    for number in 0..9 {
        assert_eq!(bench.sh(&fork, &format!("echo {number}")), number.to_string());
    }
    wait_until("the end of its command", Duration::from_secs(10), || {
        bench.sh(&fork, "ps | grep -c '[s]leep 9876' || true") == "0"
    });
    bench.end();
}

#[test]
fn f3_copies_keep_content_modes_and_links_both_ways() {
    let (bench, fork) = one();
    let local = tempfile::tempdir().unwrap();
    let tree = local.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/data"), vec![7; 300_000]).unwrap();
    fs::write(tree.join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("run"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("a/b/data", tree.join("link")).unwrap();
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let there = format!("{}:/tmp/copied", fork.name());
    let _ = bench.offshoot(&["cp", &path(&tree), &there]).ok();
    assert_eq!(
        bench.sh(&fork, "cd /tmp/copied; stat -c %a run; readlink link; wc -c < a/b/data"),
        "755\na/b/data\n300000"
    );
    let back = local.path().join("back");
    let _ = bench.offshoot(&["cp", &there, &path(&back)]).ok();
    assert_eq!(fs::read(back.join("a/b/data")).unwrap(), vec![7; 300_000]);
    assert_eq!(fs::read_link(back.join("link")).unwrap().to_str(), Some("a/b/data"));
    // Into an existing folder: under its own name. One file: as that.
    let _ = bench.offshoot(&["cp", &path(&tree.join("run")), &format!("{}:/tmp/", fork.name())]).ok();
    assert_eq!(bench.sh(&fork, "cat /tmp/run"), "#!/bin/sh");
    let _ = bench.offshoot(&["cp", &path(&local.path().join("absent")), &there]).error();
    let _ = bench.offshoot(&["cp", &format!("{}:/absent", fork.name()), &path(&back)]).error();
    let _ = bench.offshoot(&["cp", &format!("{}:/etc", fork.name()), &format!("{}:/tmp", fork.name())]).error();
    bench.end();
}

#[test]
fn f3_copies_of_single_files_and_of_any_name() {
    let (bench, fork) = one();
    let local = tempfile::tempdir().unwrap();
    let path = |name: &str| local.path().join(name).to_str().unwrap().to_owned();
    let guest = |path: &str| format!("{}:{path}", fork.name());
    fs::write(path("one"), "1").unwrap();
    // A file to a new name, and into a folder, both ways; over one that is there.
    for to in ["/tmp/renamed", "/tmp/", "/tmp/renamed"] {
        let _ = bench.offshoot(&["cp", &path("one"), &guest(to)]).ok();
    }
    assert_eq!(bench.sh(&fork, "cat /tmp/renamed /tmp/one"), "11");
    fs::create_dir(path("folder")).unwrap();
    for to in [path("back"), path("folder"), path("back")] {
        let _ = bench.offshoot(&["cp", &guest("/tmp/renamed"), &to]).ok();
    }
    assert_eq!(fs::read(path("back")).unwrap(), b"1");
    assert_eq!(fs::read(path("folder/renamed")).unwrap(), b"1");

    let names = ["-rf", "a b", "line\nbreak", "\x1b[31mred", "ü", "$(id)", "a:b", "*", &"n".repeat(255)];
    fs::create_dir(path("names")).unwrap();
    for name in names {
        fs::write(local.path().join("names").join(name), name).unwrap();
    }
    let _ = bench.offshoot(&["cp", &path("names"), &guest("/tmp/names")]).ok();
    assert_eq!(bench.sh(&fork, "ls /tmp/names | wc -l").trim(), names.len().to_string());
    let _ = bench.offshoot(&["cp", &guest("/tmp/names"), &path("names-back")]).ok();
    for name in names {
        assert_eq!(fs::read(local.path().join("names-back").join(name)).unwrap(), name.as_bytes());
        let _ = bench.offshoot(&["cp", &guest(&format!("/tmp/names/{name}")), &path("single")]).ok();
        assert_eq!(fs::read(path("single")).unwrap(), name.as_bytes());
    }
    // What is at the destination and is a link: a link in the guest leads where it leads there, and never here.
    let victim = path("victim");
    fs::write(&victim, "untouched").unwrap();
    let _ = bench.sh(&fork, &format!("mkdir -p $(dirname {victim}); ln -s {victim} /tmp/link"));
    let _ = bench.offshoot(&["cp", &path("one"), &guest("/tmp/link")]);
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    // A copy out of the guest replaces a link, and does not write through it.
    std::os::unix::fs::symlink(&victim, path("trap")).unwrap();
    let _ = bench.offshoot(&["cp", &guest("/tmp/one"), &path("trap")]);
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    // Nowhere to put it.
    for (from, to) in [
        (path("one"), guest("/no/such/folder/file")),
        (guest("/tmp/one"), path("no/such/folder")),
        (path("one"), guest("/proc/version")),
        (path("absent"), guest("/tmp/")),
    ] {
        let error = bench.offshoot(&["cp", &from, &to]).error();
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    }
    bench.end();
}

#[test]
fn f3_a_guests_archive_writes_nothing_outside_of_the_destination() {
    let (bench, fork) = one();
    let local = tempfile::tempdir().unwrap();
    let outside = local.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let to = local.path().join("to");
    fs::create_dir(&to).unwrap();
    // A link out of the folder, and then a file through it: the guest's own tree cannot hold both, two copies can.
    let _ = bench.sh(
        &fork,
        &format!("mkdir -p /tmp/one /tmp/two/d; ln -s {} /tmp/one/d; echo x > /tmp/two/d/owned", outside.display()),
    );
    let _ = bench.offshoot(&["cp", &format!("{}:/tmp/one", fork.name()), to.to_str().unwrap()]).ok();
    let _ = bench.sh(&fork, "rm -r /tmp/one; mv /tmp/two /tmp/one");
    let _ = bench.offshoot(&["cp", &format!("{}:/tmp/one", fork.name()), to.to_str().unwrap()]);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "a file was written through the guest's link");
    // A device node is no file to copy.
    let _ = bench.sh(&fork, "mkdir /tmp/dev; mknod /tmp/dev/null c 1 3 || mkfifo /tmp/dev/null");
    let _ = bench.offshoot(&["cp", &format!("{}:/tmp/dev", fork.name()), to.to_str().unwrap()]).error();
    bench.end();
}

#[test]
fn f3_logs_follow_what_a_service_writes() {
    let (bench, fork) = one();
    let mut command = bench.plain(&["logs", fork.name(), "-f"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let wanted = format!("identity changed to {}", fork.text("hostname"));
    assert!(lines.by_ref().any(|line| line.unwrap() == wanted));
    // What is written from now on comes too.
    let _ = bench.sh(&fork, "hostname renamed; kill -HUP $(ps | grep '[t]rap' | awk '{print $1}')");
    assert!(lines.by_ref().any(|line| line.unwrap() == "identity changed to renamed"));
    child.kill().unwrap();
    child.wait().unwrap();
    bench.end();
}

#[test]
fn f3_forks_are_found_by_name_id_and_beginning_of_id() {
    let (bench, fork) = one();
    for wanted in [fork.name(), fork.id(), &fork.id()[..8]] {
        assert_eq!(bench.offshoot(&["ping", wanted]).ok().json()["id"], fork.id());
    }
    for wanted in ["none", &fork.id()[..3], "../forks", ""] {
        let _ = bench.offshoot(&["ping", wanted]).error();
    }
    bench.end();
}
