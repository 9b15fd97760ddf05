//! Playwright, as its users have it: `playwright-core` of the version in `tests/playwright`, installed by npm and kept for the next run. No browser of
//! its own comes with it.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{Run, programs};

/// Runs `tests/playwright/drive.mjs`; what it printed, line by line.
#[must_use]
#[track_caller]
pub fn drive(args: &[String]) -> Vec<Value> {
    let mut command = Command::new(programs::distribution("node", "nodejs"));
    command.arg(installed().join("drive.mjs")).args(args);
    let lines = Run::of(command, &[]).ok().out();
    lines.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// Where it is installed. Node looks for packages beside the program that wants them, so that is copied there.
fn installed() -> PathBuf {
    let from = programs::source().join("tests/playwright");
    let to = programs::kept().join("playwright");
    fs::create_dir_all(&to).expect("the tests' directory can be written");
    let lock = fs::File::create(to.join("lock")).expect("the lock can be made");
    lock.lock().expect("the lock can be taken");
    let read = |name: &str| fs::read(from.join(name)).expect("tests/playwright is there");
    fs::write(to.join("drive.mjs"), read("drive.mjs")).expect("the program can be copied");
    // The last thing that is written: what it says is what is installed.
    let (complete, wanted) = (to.join("complete"), read("package-lock.json"));
    if fs::read(&complete).is_ok_and(|is| is == wanted) {
        return to;
    }
    for name in ["package.json", "package-lock.json"] {
        fs::write(to.join(name), read(name)).expect("the list of packages can be copied");
    }
    let mut npm = Command::new(programs::distribution("npm", "npm"));
    npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--cache"]).arg(to.join("cache")).current_dir(&to);
    let _ = Run::of(npm, &[]).ok();
    fs::write(complete, wanted).expect("the tests' directory can be written");
    to
}
