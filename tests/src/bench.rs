//! A home for the forks of one test. When the test is over, nothing of them may be left.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Kind, Run, Template, processes, programs, templates,
    world::{Place, World},
};

/// A state directory of the test's own, with the shared templates or templates of its own.
#[derive(Debug)]
pub struct Bench {
    world: Option<World>,
    state: TempDir,
    own_data: Option<TempDir>,
}

/// A fork as its record describes it.
#[derive(Debug, Clone)]
pub struct Fork {
    /// The record.
    pub record: Value,
}

impl Fork {
    /// A field that is text.
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        self.record[field].as_str().unwrap_or_else(|| panic!("{field} is no text in {}", self.record))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.text("name")
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        self.text("id")
    }

    /// A field of its network that is text.
    #[must_use]
    pub fn network(&self, field: &str) -> &str {
        self.record["network"][field].as_str().unwrap_or_else(|| panic!("no network's {field} in {}", self.record))
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.network("ipv4").parse().expect("an address")
    }

    /// The pid of its machine.
    #[must_use]
    pub fn pid(&self) -> u32 {
        let pid = self.record["process"]["pid"].as_u64().expect("a record has a pid");
        u32::try_from(pid).expect("a pid is small")
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

impl Bench {
    /// Shared templates, own forks.
    #[must_use]
    pub fn new() -> Self {
        Self::with(None, None)
    }

    /// Shared templates, own forks, on a host of its own.
    #[must_use]
    pub fn in_a_world() -> Self {
        Self::with(Some(World::new()), None)
    }

    /// Own templates, own forks.
    #[must_use]
    pub fn with_own_data() -> Self {
        Self::with(None, Some(temporary()))
    }

    /// Own templates, own forks, on a host of its own.
    #[must_use]
    pub fn in_a_world_with_own_data() -> Self {
        Self::with(Some(World::new()), Some(temporary()))
    }

    fn with(world: Option<World>, own_data: Option<TempDir>) -> Self {
        Self { world, state: temporary(), own_data }
    }

    /// The host of its own.
    #[must_use]
    pub fn world(&self) -> &World {
        self.world.as_ref().expect("the test has a host of its own")
    }

    /// Where the networks of its forks are noted, on a host of its own.
    #[must_use]
    pub fn network_dir(&self) -> PathBuf {
        self.state().join("network")
    }

    /// The network namespace of a fork, or of a spare.
    #[must_use]
    pub fn place_of(&self, id: &str) -> Place {
        self.world().mounted(&self.network_dir().join("ns").join(id))
    }

    /// The state directory.
    #[must_use]
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.own_data.as_ref().map_or_else(templates::data, |data| data.path().to_owned())
    }

    /// A template; in an own data directory its files are links to the shared one's.
    #[must_use]
    pub fn template(&self, kind: Kind) -> Template {
        let shared = templates::ensure(kind);
        if self.own_data.is_none() {
            return shared;
        }
        let to = self.data().join("templates").join(&shared.tag);
        if !to.exists() {
            let _ = self.offshoot(&["templates"]).ok();
            let made = Command::new("cp").arg("-a").arg(shared.dir()).arg(&to).status().expect("cp can be started");
            assert!(made.success(), "the template can be copied");
        }
        Template { data: self.data(), ..shared }
    }

    /// `offshoot --json ARGS` in this home, not yet started.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.plain(&["--json"]);
        command.args(args);
        command
    }

    /// `offshoot ARGS` in this home, without `--json`.
    #[must_use]
    pub fn plain(&self, args: &[&str]) -> Command {
        let mut command = match &self.world {
            Some(world) => world.host.command(programs::offshoot()),
            None => Command::new(programs::offshoot()),
        };
        if self.world.is_some() {
            command.env("OFFSHOOT_NETWORK_DIR", self.network_dir());
        }
        command.args(args).env("OFFSHOOT_DATA_DIR", self.data()).env("OFFSHOOT_STATE_DIR", self.state());
        command.env_remove("OFFSHOOT_FAULT").env_remove("OFFSHOOT_AGENT");
        command.env_remove("OFFSHOOT_NETWORK").env_remove("OFFSHOOT_NETWORK_POOL");
        command.env_remove("OFFSHOOT_HOST").env_remove("OFFSHOOT_TOKEN").env_remove("OFFSHOOT_CA");
        command
    }

    /// Runs `offshoot --json ARGS`.
    #[must_use]
    pub fn offshoot(&self, args: &[&str]) -> Run {
        Run::of(self.command(args), &[])
    }

    /// Runs `offshoot ARGS` without `--json`; expects success, gives its output.
    #[must_use]
    #[track_caller]
    pub fn plain_ok(&self, args: &[&str]) -> String {
        Run::of(self.plain(args), &[]).ok().out()
    }

    /// Runs it with a fault.
    #[must_use]
    pub fn offshoot_with_fault(&self, fault: &str, args: &[&str]) -> Run {
        let mut command = self.command(args);
        command.env("OFFSHOOT_FAULT", fault);
        Run::of(command, &[])
    }

    /// Makes forks; all must succeed.
    #[must_use]
    #[track_caller]
    pub fn fork(&self, template: &Template, args: &[&str]) -> Vec<Fork> {
        let made = self.offshoot(&[&["fork", &template.tag], args].concat()).ok().json();
        assert_eq!(made["failed"], serde_json::json!([]));
        let forks: Vec<Fork> =
            made["forks"].as_array().expect("a list").iter().map(|record| Fork { record: record.clone() }).collect();
        assert!(!forks.is_empty());
        forks
    }

    /// Makes one fork.
    #[must_use]
    #[track_caller]
    pub fn fork_one(&self, template: &Template, args: &[&str]) -> Fork {
        self.fork(template, args).remove(0)
    }

    /// Runs a command in a fork.
    #[must_use]
    pub fn exec(&self, fork: &Fork, argv: &[&str]) -> Run {
        Run::of(self.plain(&[&["exec", fork.name(), "--"], argv].concat()), &[])
    }

    /// What a shell script in a fork prints, without the newline at its end.
    #[must_use]
    #[track_caller]
    pub fn sh(&self, fork: &Fork, script: &str) -> String {
        self.exec(fork, &["/bin/sh", "-c", script]).ok().out().trim_end().to_owned()
    }

    /// The same in a fork that is known by name.
    #[must_use]
    #[track_caller]
    pub fn sh_of(&self, name: &str, script: &str) -> String {
        Run::of(self.plain(&["exec", name, "--", "/bin/sh", "-c", script]), &[]).ok().out().trim_end().to_owned()
    }

    /// Evaluates in a fork's runtime.
    #[must_use]
    #[track_caller]
    pub fn eval(&self, fork: &Fork, code: &str) -> Value {
        self.offshoot(&["eval", fork.name(), "--", code]).ok().json()["value"].clone()
    }

    /// What `ls` shows, by name.
    #[must_use]
    #[track_caller]
    pub fn ls(&self) -> Vec<(String, bool)> {
        let listed = self.offshoot(&["ls"]).ok().json();
        let forks = listed["forks"].as_array().expect("a list").clone();
        let entry = |fork: &Value| (fork["name"].as_str().unwrap().to_owned(), fork["alive"].as_bool().unwrap());
        forks.iter().map(entry).collect()
    }

    /// What `cleanup` would remove.
    #[must_use]
    #[track_caller]
    pub fn leftovers(&self) -> Vec<Value> {
        let plan = self.offshoot(&["cleanup"]).ok().json();
        assert_eq!(plan["dry_run"], true);
        plan["leftovers"].as_array().expect("a list").clone()
    }

    /// What lies in a folder of the state directory.
    #[must_use]
    pub fn entries(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.state().join(folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// What there is of networks on a host of its own: files about links, namespaces, nets and ports; held addresses; wires.
    #[must_use]
    pub fn network_parts(&self) -> Vec<String> {
        let dir = self.network_dir();
        let files = |folder: &str| {
            let entries = fs::read_dir(dir.join(folder)).into_iter().flatten().flatten();
            entries.map(|entry| format!("{}", entry.path().display())).collect::<Vec<_>>()
        };
        let mut parts: Vec<String> = ["links", "ns", "nets", "ports"].into_iter().flat_map(files).collect();
        let is_held = |file: &String| fs::read_to_string(file).is_ok_and(|text| text.contains("\"owner\""));
        parts.extend(files("leases").into_iter().filter(is_held));
        let wires = self.world().host.sh("ip -o link show");
        parts.extend(
            wires
                .lines()
                .filter(|line| line.contains(": ofs") && !line.contains("group default"))
                .map(ToOwned::to_owned),
        );
        let mounts = self.world().host.sh("cat /proc/self/mounts");
        let own = dir.to_string_lossy().into_owned();
        parts.extend(mounts.lines().filter(|line| line.contains(&own)).map(ToOwned::to_owned));
        parts
    }

    /// Expects that no fork, no name, no machine and nothing half-made is here.
    #[track_caller]
    pub fn assert_empty(&self) {
        assert_eq!(self.entries("forks"), Vec::<String>::new(), "forks are left");
        assert_eq!(self.entries("names"), Vec::<String>::new(), "names are left");
        assert_eq!(processes::inside(self.state()), Vec::<u32>::new(), "processes are left");
        if self.world.is_some() {
            assert_eq!(self.network_parts(), Vec::<String>::new(), "parts of networks are left");
        }
        if let Some(data) = &self.own_data {
            assert_eq!(processes::inside(data.path()), Vec::<u32>::new(), "builders are left");
            let templates = fs::read_dir(data.path().join("templates")).into_iter().flatten().flatten();
            for template in templates {
                let name = template.file_name().to_string_lossy().into_owned();
                assert!(!name.starts_with('.'), "{name} is left");
            }
        }
    }

    /// Removes all forks and expects that nothing is left. At the end of every test, for what a panic in a drop would hide.
    #[track_caller]
    pub fn end(&self) {
        let _ = self.offshoot(&["kill", "--all"]).ok();
        self.assert_empty();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Whatever went wrong, no machine outlives its test.
        let _ = self.offshoot(&["kill", "--all"]);
        let homes = [Some(self.state.path()), self.own_data.as_ref().map(TempDir::path)];
        let inside = || homes.into_iter().flatten().flat_map(processes::inside).collect::<Vec<u32>>();
        // A command that fills a pool may only now find out that there is nothing to fill. A machine does not end by itself.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !inside().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        let left = inside();
        left.iter().copied().for_each(processes::kill);
        assert!(left.is_empty() || thread::panicking(), "processes {left:?} outlived their forks");
    }
}

fn temporary() -> TempDir {
    // In /tmp and not below the checkout: other users' processes (forks) have to pass, and paths stay short.
    tempfile::Builder::new().prefix("offshoot-test-").tempdir_in("/tmp").expect("/tmp can be written")
}

/// Waits for something that has no event to wait for, such as another process' file.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "{what} did not happen within {limit:?}");
        thread::sleep(Duration::from_millis(20));
    }
}
