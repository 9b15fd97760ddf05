//! O2–O5: whatever ends in the middle, nothing is left behind, nothing alive is touched, and the error says what to do.
//!
//! The points at which something can be made to fail are read from the source, so that a new one is tested as well.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::Duration,
};

use offshoot_tests::{Bench, Fork, Kind, Run, bench::wait_until, processes, programs};

/// Every point `fault::point("OPERATION.…", …)` of the source; true where a machine's process is there to be killed.
pub(crate) fn points(operation: &str) -> BTreeMap<String, bool> {
    let mut points = BTreeMap::new();
    for file in fs::read_dir(programs::source().join("crates/host/src")).unwrap() {
        let path = file.unwrap().path();
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for call in text.split("fault::point(").skip(1) {
            let mut quoted = call.split('"');
            let name = quoted.nth(1).unwrap();
            if name.split('.').next() == Some(operation) {
                points.insert(name.to_owned(), !quoted.next().unwrap().starts_with(", None"));
            }
        }
    }
    points
}

/// A fork that must live through whatever happens beside it.
struct Neighbour<'a>(&'a Bench, Fork);

impl<'a> Neighbour<'a> {
    fn new(bench: &'a Bench) -> Self {
        Self(bench, bench.fork_one(&bench.template(Kind::Busybox), &["--name", "neighbour"]))
    }

    /// It is well, and nothing but it is there.
    #[track_caller]
    fn is_alone(&self) {
        let Self(bench, fork) = self;
        assert_eq!(bench.offshoot(&["ping", fork.name()]).ok().json()["id"], fork.id());
        assert_eq!(bench.entries("forks"), [fork.id()]);
        assert_eq!(bench.entries("names"), [fork.name()]);
        assert_eq!(processes::inside(bench.state()), [fork.pid()]);
        assert_eq!(own_leftovers(bench), Vec::<String>::new());
    }

    /// Processes that work in the data directory; the neighbour only has its template open there.
    fn builders(&self) -> Vec<u32> {
        processes::inside(&self.0.data()).into_iter().filter(|&pid| pid != self.1.pid()).collect()
    }
}

/// What `cleanup` would remove here. Control groups and networks are the host's, so those of other tests' forks are seen as well (not by a test on a
/// host of its own, whose networks are noted elsewhere).
#[track_caller]
pub(crate) fn own_leftovers(bench: &Bench) -> Vec<String> {
    let path = |leftover: &serde_json::Value| leftover["path"].as_str().unwrap().to_owned();
    let of_the_host = |path: &String| path.starts_with("/sys/fs/cgroup") || path.starts_with("/run/offshoot/network-");
    bench.leftovers().iter().map(path).filter(|path| !of_the_host(path)).collect()
}

/// The error names a next command, by itself or in its text.
#[track_caller]
pub(crate) fn says_what_to_do(run: &Run) {
    let error = run.error();
    let text = format!("{} {}", error["message"], error["next"]);
    assert!(text.contains("offshoot ") || text.contains("destroyed"), "{run:#}");
}

#[test]
fn the_points_are_found() {
    let (fork, build) = (points("fork"), points("build"));
    assert!(fork.len() >= 7 && build.len() >= 6, "{fork:?} {build:?}");
    assert_eq!((fork["fork.directory"], fork["fork.resumed"], build["build.paused"]), (false, true, true));
}

#[test]
fn o2_a_fork_that_fails_at_any_step_leaves_nothing() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let neighbour = Neighbour::new(&bench);
    for (point, _) in points("fork") {
        let run = bench.offshoot_with_fault(&format!("{point}:error"), &["fork", &template.tag, "--name", "failing"]);
        run.refused("state_failed");
        says_what_to_do(&run);
        assert!(run.err().contains("fault injected"), "{point}: {run}");
        neighbour.is_alone();
    }
    // The name is free again, and the check can fail: without a fault there is one more.
    let _ = bench.fork_one(&template, &["--name", "failing"]);
    assert_eq!(bench.entries("names"), ["failing", "neighbour"]);
    bench.end();
}

#[test]
fn o3_cleanup_removes_what_a_killed_fork_left_and_nothing_else() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let neighbour = Neighbour::new(&bench);
    for (point, _) in points("fork") {
        let run = bench.offshoot_with_fault(&format!("{point}:kill"), &["fork", &template.tag, "--name", "killed"]);
        assert_eq!(run.code, None, "{point}: {run}");
        // It shows what is there and touches nothing.
        let (before, found) = (bench.entries("forks"), own_leftovers(&bench));
        assert_eq!(before.len(), 2, "{point}");
        assert_eq!(found.len(), 1, "{point}: {found:?}");
        assert!(found[0].contains("/forks/.new-"), "{point}: {found:?}");
        assert_eq!(bench.entries("forks"), before, "{point}");
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        neighbour.is_alone();
    }
    bench.end();
}

#[test]
fn o2_a_fork_whose_machine_is_killed_at_any_step_is_no_fork() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let neighbour = Neighbour::new(&bench);
    let points: Vec<String> =
        points("fork").into_iter().filter(|(_, machine)| *machine).map(|(point, _)| point).collect();
    assert!(points.len() >= 4);
    for point in points {
        let fault = format!("{point}:kill-engine");
        let run = bench.offshoot_with_fault(&fault, &["fork", &template.tag, "--name", "beheaded"]);
        if run.code == Some(0) {
            // It died after its last ack: a fork that has ended, as any may.
            assert_eq!(point, "fork.acked");
            assert_eq!(bench.ls(), [("neighbour".into(), true), ("beheaded".into(), false)]);
            bench.offshoot(&["exec", "beheaded", "--", "/bin/true"]).exits(125).refused("fork_dead");
            assert_eq!(own_leftovers(&bench).len(), 1);
            let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        } else {
            let code = run.error()["code"].clone();
            assert!(["engine_failed", "delivery_failed", "fork_ended"].contains(&code.as_str().unwrap()), "{run}");
            says_what_to_do(&run);
        }
        neighbour.is_alone();
    }
    bench.end();
}

#[test]
fn o2_one_fork_of_many_that_fails_does_not_undo_the_others() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let _ = bench.fork_one(&template, &["--name", "many-2"]);
    let run = bench.offshoot(&["fork", &template.tag, "-n", "3", "--name", "many"]);
    run.refused("name_conflict");
    let made = run.json();
    assert_eq!(made["forks"].as_array().unwrap().len(), 2, "{run}");
    assert_eq!(made["failed"][0]["fork"], "fork 2");
    assert_eq!(made["failed"][0]["error"]["code"], "name_conflict");
    assert_eq!(bench.ls().iter().filter(|(_, alive)| *alive).count(), 3);
    bench.end();
}

#[test]
fn o2_a_machine_that_dies_later_is_a_dead_fork_and_the_others_live() {
    let bench = Bench::new();
    let forks = bench.fork(&bench.template(Kind::Busybox), &["-n", "2", "--name", "life"]);
    processes::kill(forks[0].pid());
    wait_until("the machine's end", Duration::from_secs(10), || !processes::is_alive(forks[0].pid()));
    assert_eq!(bench.ls().into_iter().filter(|(_, alive)| *alive).collect::<Vec<_>>(), [("life-2".into(), true)]);
    for args in [vec!["ping", "life-1"], vec!["eval", "life-1", "--", "1"], vec!["logs", "life-1"]] {
        bench.offshoot(&args).exits(1).refused("fork_dead");
    }
    assert_eq!(bench.sh(&forks[1], "echo alive"), "alive");
    // A pid that is another process' by now is not ended: the record is changed as if it were.
    let record = bench.state().join("forks").join(forks[0].id()).join("fork.json");
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    let text = fs::read_to_string(&record).unwrap();
    let stolen = text.replace(&format!("\"pid\": {}", forks[0].pid()), &format!("\"pid\": {}", sleeper.id()));
    assert_ne!(stolen, text);
    fs::write(&record, stolen).unwrap();
    let _ = bench.offshoot(&["kill", "life-1"]).ok();
    assert!(sleeper.try_wait().unwrap().is_none(), "a foreign process was ended");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert_eq!(bench.ls(), [("life-2".into(), true)]);
    bench.end();
}

#[test]
fn o3_cleanup_leaves_alone_what_is_not_offshoots() {
    let bench = Bench::new();
    let neighbour = Neighbour::new(&bench);
    let foreign = bench.state().join("forks/notes");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("keep"), "x").unwrap();
    fs::write(bench.state().join("names/also-mine"), "x").unwrap();
    let stale = bench.state().join("forks/.new-0123456789abcdef0123");
    fs::create_dir(&stale).unwrap();
    let done = bench.offshoot(&["cleanup", "--yes"]).ok().json();
    assert!(!stale.exists() && foreign.join("keep").exists(), "{done}");
    assert_eq!(done["foreign"].as_array().unwrap().len(), 2, "{done}");
    fs::remove_dir_all(foreign).unwrap();
    fs::remove_file(bench.state().join("names/also-mine")).unwrap();
    neighbour.is_alone();
    bench.end();
}

/// Templates of the test's own, with a fork of a copied one beside them.
fn with_builder() -> Bench {
    Bench::with_own_data()
}

fn build(bench: &Bench, tag: &str) -> Command {
    bench.command(&["build", "busybox", "--tag", tag])
}

/// No template but the neighbour's, finished or not.
#[track_caller]
fn no_template(neighbour: &Neighbour<'_>, point: &str) {
    let bench = neighbour.0;
    let names: Vec<String> = fs::read_dir(bench.data().join("templates"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("busybox_"))
        .collect();
    assert_eq!(names, Vec::<String>::new(), "{point}");
    assert_eq!(neighbour.builders(), Vec::<u32>::new(), "{point}");
}

#[test]
fn o2_a_build_that_fails_at_any_step_leaves_nothing() {
    let bench = with_builder();
    let neighbour = Neighbour::new(&bench);
    for (point, machine) in points("build") {
        for action in ["error", "kill-engine"] {
            if action == "kill-engine" && !machine {
                continue;
            }
            let run =
                bench.offshoot_with_fault(&format!("{point}:{action}"), &["build", "busybox", "--tag", "failing"]);
            let code = run.error()["code"].clone();
            if action == "error" {
                assert_eq!(code, "build_file_failed", "{point}: {run}");
                says_what_to_do(&run);
            } else {
                assert_ne!(code, "internal", "{point}: {run}");
            }
            if point == "build.committed" {
                // It was published before: whole, or not at all.
                let _ = bench.offshoot(&["rmi", "failing"]).ok();
            }
            no_template(&neighbour, &point);
        }
    }
    neighbour.is_alone();
    bench.end();
}

#[test]
fn o3_cleanup_removes_what_a_killed_build_left_and_nothing_else() {
    let bench = with_builder();
    let neighbour = Neighbour::new(&bench);
    for (point, _) in points("build") {
        let run = bench.offshoot_with_fault(&format!("{point}:kill"), &["build", "busybox", "--tag", "killed"]);
        assert_eq!(run.code, None, "{point}: {run}");
        let found = own_leftovers(&bench);
        if point == "build.committed" {
            assert_eq!(found, Vec::<String>::new());
            let _ = bench.offshoot(&["rmi", "killed"]).ok();
        } else {
            assert_eq!(found.len(), 1, "{point}: {found:?}");
            assert!(found[0].contains("/templates/.building-"), "{point}: {found:?}");
        }
        let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
        no_template(&neighbour, &point);
        neighbour.is_alone();
    }
    bench.end();
}

#[test]
fn o4_two_builds_of_one_tag_do_not_collide_and_the_second_is_told_who_holds_it() {
    let bench = with_builder();
    let template = bench.template(Kind::Busybox);
    // Both at the same moment: one of them, whichever it is.
    let both = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let run = Run::of(build(&bench, "one"), &[]);
                both.lock().unwrap().push(run);
            });
        }
    });
    let mut both = both.into_inner().unwrap();
    both.sort_by_key(|run| run.code);
    both.remove(1).refused("template_busy");
    let _ = both.remove(0).ok();
    // The one that is there is not replaced.
    bench.offshoot(&["build", "busybox", "--tag", "one"]).exits(1).refused("template_exists");
    // While one is under way, everybody is told who it is.
    let mut first = build(&bench, "two").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let lock = bench.data().join("locks/two");
    wait_until("the first builder's lock", Duration::from_secs(20), || {
        fs::metadata(&lock).is_ok_and(|lock| lock.len() > 0)
    });
    for args in [vec!["build", "busybox", "--tag", "two"], vec!["fork", "two"], vec!["rmi", "two"]] {
        let error = bench.offshoot(&args).exits(1).refused("template_busy");
        assert!(error["message"].as_str().unwrap().contains(&format!("process {}", first.id())), "{error}");
    }
    assert!(first.wait().unwrap().success());
    // And what was built is whole.
    let made = bench.offshoot(&["fork", "one", "--name", "child"]).ok().json();
    assert_eq!(made["forks"][0]["template"], "one");
    // A template in use: its forks live on when it goes.
    let _ = bench.offshoot(&["rmi", "one"]).ok();
    assert_eq!(bench.plain_ok(&["exec", "child", "--", "/bin/hostname"]), "child\n");
    bench.offshoot(&["fork", "one"]).exits(1).refused("template_not_found");
    let _ = bench.fork_one(&template, &[]);
    bench.end();
}

#[test]
fn o2_a_templates_machine_ends_with_its_builder() {
    let bench = with_builder();
    let neighbour = Neighbour::new(&bench);
    let mut child = build(&bench, "killed").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let builders = || neighbour.builders().into_iter().filter(|&pid| pid != child.id()).collect::<Vec<_>>();
    wait_until("the template's machine", Duration::from_secs(60), || !builders().is_empty());
    let machines = builders();
    child.kill().unwrap();
    child.wait().unwrap();
    // Before anybody cleans up.
    wait_until("the machine's end", Duration::from_secs(10), || !machines.iter().any(|&pid| processes::is_alive(pid)));
    assert_eq!(own_leftovers(&bench).len(), 1);
    let _ = bench.offshoot(&["cleanup", "--yes"]).ok();
    no_template(&neighbour, "SIGKILL");
    neighbour.is_alone();
    bench.end();
}

/// Runs a script in a mount namespace of its own with a small file system at `at`. Needs root.
pub(crate) fn on_a_small_disk(bench: &Bench, at: &Path, options: &str, script: &str) -> Run {
    let mut command = Command::new(programs::distribution("unshare", "util-linux"));
    let mount = format!("mount -t tmpfs -o {options},mode=0711 small '{}' && {{ {script}\n}}", at.display());
    command.args(["--mount", "--propagation", "private", "/bin/sh", "-c", &mount]);
    command.env("OFFSHOOT", programs::offshoot());
    for (name, value) in bench.command(&[]).get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    Run::of(command, &[])
}

#[test]
fn a_full_disk_is_a_typed_error_of_a_fork_and_nothing_stays() {
    let bench = Bench::new();
    let template = bench.template(Kind::Busybox);
    let _ = bench.offshoot(&["ls"]).ok();
    // Room for the directories; from none to a few entries more.
    let mut failed = 0;
    for entries in [3, 4, 5, 6, 7, 8, 10, 12, 30] {
        let script = format!(
            "\"$OFFSHOOT\" --json ls >/dev/null || exit 77; \"$OFFSHOOT\" --json fork {} --name small >/dev/null; code=$?
            \"$OFFSHOOT\" --json kill --all >/dev/null; find forks names -mindepth 1; exit $code",
            template.tag
        );
        let script = format!("cd '{}'; {script}", bench.state().display());
        let run = on_a_small_disk(&bench, bench.state(), &format!("size=4m,nr_inodes={entries}"), &script);
        assert_eq!(run.out(), "", "{entries} entries: something is left: {run}");
        match run.code {
            Some(0 | 77) => {}
            _ => {
                let code = run.error()["code"].clone();
                failed += 1;
                assert!(
                    ["state_failed", "engine_failed", "directory_unusable"].contains(&code.as_str().unwrap()),
                    "{entries} entries: {run}"
                );
                says_what_to_do(&run);
            }
        }
        assert!(entries < 30 || run.code == Some(0), "the check can succeed: {run}");
    }
    assert!(failed >= 3, "only {failed} of them failed");
    assert_eq!(processes::inside(bench.state()), Vec::<u32>::new());
    bench.end();
}

#[test]
fn a_full_disk_is_a_typed_error_of_a_build_and_nothing_stays() {
    let bench = with_builder();
    let _ = bench.template(Kind::Busybox);
    let script = format!(
        "\"$OFFSHOOT\" --json build busybox --tag small >/dev/null; code=$?; ls -A '{}/templates'; exit $code",
        bench.data().display()
    );
    for size in ["64k", "8m", "40m"] {
        let run = on_a_small_disk(&bench, &bench.data(), &format!("size={size}"), &script);
        let _ = run.error();
        assert_ne!(run.code, None, "{size}: {run}");
        assert_eq!(run.out(), "", "{size}: something is left: {run}");
        assert_eq!(processes::inside(&bench.data()), Vec::<u32>::new(), "{size}");
    }
    let run = on_a_small_disk(&bench, &bench.data(), "size=300m", &script);
    assert_eq!((run.code, run.out().as_str()), (Some(0), "small\n"), "the check can succeed: {run}");
    bench.end();
}
