//! Templates that many tests share: built once for these programs and recipes, and kept for the next run.

use std::{
    env,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::{Once, OnceLock},
};

use serde_json::Value;

use crate::{Run, programs, recipes};

/// Which template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The built-in `busybox`.
    Busybox,
    /// Busybox with a workload that writes down what it sees, all the time.
    Watched,
    /// The same, by an agent that does not freeze its workload.
    WatchedWithoutFreeze,
    /// Programs with mailboxes, honest and not.
    Mailboxes,
    /// The built-in `python`, with a watcher and a mailbox.
    Python,
    /// Busybox with a web server, connections made before the capture, and a program that says what it is told to.
    Networked,
    /// Busybox with services that wait for who they are, and a payload that is posted.
    Services,
    /// The built-in `node`, with a timer that draws from everything.
    Node,
    /// The same with a bridge that leaves out what makes a copy's randomness fresh.
    NodeStale,
    /// Chromium with a page open; for the engine `qemu` alone.
    Browser,
}

/// A template that is there.
#[derive(Debug, Clone)]
pub struct Template {
    /// Its tag.
    pub tag: String,
    /// The data directory it lies in.
    pub data: PathBuf,
    /// Its manifest.
    pub manifest: Value,
}

impl Template {
    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.data.join("templates").join(&self.tag)
    }

    /// Its memory.
    #[must_use]
    pub fn memory_file(&self) -> PathBuf {
        self.dir().join("memory.img")
    }

    /// The manifest's entry of a mailbox.
    #[must_use]
    pub fn mailbox(&self, name: &str) -> &Value {
        let all = self.manifest["mailboxes"].as_array().expect("a list");
        all.iter().find(|mailbox| mailbox["name"] == name).unwrap_or_else(|| panic!("no mailbox {name}"))
    }

    /// A number of the manifest.
    #[must_use]
    pub fn number(&self, field: &str) -> u64 {
        self.manifest[field].as_u64().unwrap_or_else(|| panic!("{field} is no number"))
    }

    /// One that a test has built itself.
    #[must_use]
    pub fn read(data: &Path, tag: &str) -> Self {
        let path = data.join("templates").join(tag).join("manifest.json");
        let text = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let manifest: Value = serde_json::from_slice(&text).expect("the manifest is JSON");
        // Whoever runs the tests for one engine must not be told of another.
        if let Ok(wanted) = env::var("OFFSHOOT_ENGINE") {
            assert_eq!(manifest["engine"]["name"], wanted, "{tag} was made by another engine");
        }
        Self { tag: tag.to_owned(), data: data.to_owned(), manifest }
    }
}

/// The data directory of the shared templates.
#[must_use]
pub fn data() -> PathBuf {
    programs::kept().join("data")
}

/// The template, built if it is not there. Tests that run at once wait for each other.
#[must_use]
pub fn ensure(kind: Kind) -> Template {
    static FOUND: [OnceLock<Template>; 10] = [const { OnceLock::new() }; 10];
    FOUND[kind as usize].get_or_init(|| find_or_build(kind)).clone()
}

fn find_or_build(kind: Kind) -> Template {
    let name = match kind {
        Kind::Busybox => "busybox",
        Kind::Watched => "watched",
        Kind::WatchedWithoutFreeze => "watched-without-freeze",
        Kind::Mailboxes => "mailboxes",
        Kind::Python => "python-watched",
        Kind::Networked => "networked",
        Kind::Services => "services",
        Kind::Node => "node-drawing",
        Kind::NodeStale => "node-stale",
        Kind::Browser => "browser",
    };
    let agent = if kind == Kind::WatchedWithoutFreeze { "offshoot-agent-without-freeze" } else { "offshoot-agent" };
    let agent = programs::beside(agent);
    let lock = File::create(programs::kept().join(format!("{name}.lock"))).expect("the lock can be made");
    lock.lock().expect("the lock can be taken");

    // What a run that was killed has left half made would be counted as this run's.
    static TIDY: Once = Once::new();
    TIDY.call_once(|| drop(Run::of(offshoot(&data(), &["cleanup", "--yes"]), &[])));

    let mut hasher = DefaultHasher::new();
    env::var_os("OFFSHOOT_ENGINE").hash(&mut hasher);
    for program in [&agent, &programs::offshoot()] {
        let metadata = fs::metadata(program).expect("the program is there");
        (metadata.len(), metadata.modified().expect("it has a time")).hash(&mut hasher);
    }
    let recipe = if matches!(kind, Kind::Busybox | Kind::Browser) {
        PathBuf::from(name)
    } else {
        let folder = match kind {
            Kind::WatchedWithoutFreeze => "watched",
            Kind::Node | Kind::NodeStale => "node",
            _ => name,
        };
        let prepared = recipes::prepare(folder, name);
        prepared.hash.hash(&mut hasher);
        prepared.dir
    };
    let tag = format!("{name}_{:016x}", hasher.finish());
    let data = data();
    if !data.join("templates").join(&tag).join("manifest.json").exists() {
        // What other programs or recipes made is of no use any more.
        for old in fs::read_dir(data.join("templates")).into_iter().flatten().flatten() {
            let old = old.file_name().to_string_lossy().into_owned();
            if old.rsplit_once('_').is_some_and(|(stem, _)| stem == name) {
                let _ = Run::of(offshoot(&data, &["rmi", &old]), &[]);
            }
        }
        let mut build = offshoot(&data, &["build", &recipe.to_string_lossy(), "--tag", &tag]);
        build.env("OFFSHOOT_AGENT", &agent);
        let _ = Run::of(build, &[]).ok();
    }
    Template::read(&data, &tag)
}

/// `offshoot --json` on this data directory; the state directory is one that holds no forks.
fn offshoot(data: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(programs::offshoot());
    command.arg("--json").args(args);
    command.env("OFFSHOOT_DATA_DIR", data).env("OFFSHOOT_STATE_DIR", programs::kept().join("state"));
    command.env_remove("OFFSHOOT_FAULT");
    command
}
