//! The tests' recipes, with their C programs compiled.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
};

use crate::programs;

/// A recipe's folder, ready to be built, and a hash of everything in it.
#[derive(Debug)]
pub struct Prepared {
    /// The folder.
    pub dir: PathBuf,
    /// Changes with its files.
    pub hash: u64,
}

/// Copies `tests/recipes/NAME` for a template and compiles what is C in it. The caller holds the template's lock.
#[must_use]
pub fn prepare(name: &str, template: &str) -> Prepared {
    let built_in = name == "node";
    let from = programs::source().join(if built_in { "recipes" } else { "tests/recipes" }).join(name);
    let dir = programs::kept().join("recipes").join(template);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("the recipe's folder can be made");
    for path in files(&from) {
        add(&path, &dir);
    }
    match name {
        "mailboxes" => add(&programs::source().join("examples/mailbox/mailbox.c"), &dir),
        "hazards" => {
            // Debian's essential packages have no tools for networks.
            let busybox = programs::distribution("busybox", "busybox-static");
            fs::copy(busybox, dir.join("busybox")).expect("busybox can be copied");
        }
        "python-watched" => {
            let python = programs::source().join("recipes/python");
            add(&python.join("bridge.py"), &dir);
            add(&programs::source().join("examples/mailbox/mailbox.py"), &dir);
            // The built-in recipe as it is, and the watcher behind it.
            let read = |path: &Path| fs::read_to_string(path).expect("the recipe can be read");
            let recipe = read(&python.join("recipe.toml")) + &read(&dir.join("more.toml"));
            // An emulated machine in an emulated machine has the time it takes.
            let patient = recipe.replace("ready_timeout_s = 120", "ready_timeout_s = 600");
            assert_ne!(recipe, patient, "the built-in recipe has another deadline");
            let recipe = patient;
            fs::write(dir.join("recipe.toml"), recipe).expect("the recipe can be written");
        }
        "node" => {
            change(
                &dir.join("recipe.toml"),
                &[
                    // An emulated machine in an emulated machine has the time it takes.
                    ("ready_timeout_s = 120", "ready_timeout_s = 600"),
                    ("var warmed = true;", DRAWING),
                ],
            );
            if template == "node-stale" {
                change(
                    &dir.join("bridge.js"),
                    &[
                        ("  openssl.mark();\n", ""),
                        ("  useUp();\n", ""),
                        ("mathRandom.reseed()", "0"),
                        ("memory: openssl.inPlace()", "memory: []"),
                    ],
                );
                change(&dir.join("randomness.js"), &[("      this.mark();\n", ""), ("seeded < 2", "seeded < 0")]);
            }
        }
        _ => {}
    }
    let hash = hash(&dir);
    Prepared { dir, hash }
}

/// A timer of a Node that draws from everything, also in the thread pool, and notes who it is; it fires in a fork as soon as anything may.
const DRAWING: &str = "var draws = []; var context = vm.createContext({});
setInterval(() => {
  if (draws.length > 0 && draws.at(-1).name === process.env.OFFSHOOT_NAME) return;
  const draw = { name: process.env.OFFSHOOT_NAME, random: Math.random(), uuid: crypto.randomUUID(), int: crypto.randomInt(2 ** 47),
    bytes: crypto.randomBytes(8).toString('hex'), context: vm.runInContext('Math.random()', context) };
  draws.push(draw);
  crypto.randomBytes(8, (error, bytes) => { draw.pool = bytes.toString('hex'); });
}, 1);";

/// Replaces parts of a file, each of which must be there.
fn change(path: &Path, parts: &[(&str, &str)]) {
    let mut text = fs::read_to_string(path).expect("the recipe's file can be read");
    for (from, to) in parts {
        assert!(text.contains(from), "{} has no {from:?} any more", path.display());
        text = text.replace(from, to);
    }
    fs::write(path, text).expect("the recipe's file can be written");
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    files
}

fn add(path: &Path, dir: &Path) {
    let name = path.file_name().expect("a file has a name");
    if path.extension().is_some_and(|extension| extension == "c") {
        compile(path, &dir.join(path.file_stem().expect("a file has a name")));
    } else {
        fs::copy(path, dir.join(name)).expect("the recipe's file can be copied");
    }
}

/// Compiles one C file into a program that needs no library in the guest.
pub fn compile(source: &Path, program: &Path) {
    let output = Command::new(programs::distribution("gcc", "gcc libc6-dev"))
        .args(["-O2", "-Wall", "-Werror", "-static", "-pthread", "-o"])
        .args([program, source])
        .output()
        .expect("gcc can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn hash(dir: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    for path in files(dir) {
        path.file_name().hash(&mut hasher);
        fs::read(&path).expect("the recipe's file can be read").hash(&mut hasher);
    }
    hasher.finish()
}
