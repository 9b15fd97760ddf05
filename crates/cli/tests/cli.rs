//! The program as it is built, with directories of its own; nothing here needs a guest.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
        // The network's too: what another home left on this machine is nothing to these tests.
        for (variable, dir) in [("DATA", "data"), ("STATE", "state"), ("CACHE", "cache"), ("NETWORK", "network")] {
            command.env(format!("OFFSHOOT_{variable}_DIR"), self.0.path().join(dir));
        }
        command.args(line);
        command
    }

    fn run(&self, line: &[&str]) -> Output {
        self.command(line).output().unwrap()
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.0.path().join(path)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The error object on standard error, and the exit code.
fn json_error(output: &Output) -> (Value, i32) {
    let value: Value = serde_json::from_slice(&output.stderr).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
    assert!(value["error"]["message"].is_string() && value["error"]["causes"].is_array(), "{value}");
    (value["error"].clone(), output.status.code().unwrap())
}

fn document(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn o5_a_template_that_is_not_there_is_a_typed_error_with_the_next_command() {
    let place = Place::new();
    for verb in ["fork", "rmi", "mailboxes", "verify", "bench"] {
        let output = place.run(&[verb, "nope"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        let stderr = text(&output.stderr);
        assert!(stderr.starts_with("error: there is no template nope"), "{stderr}");
        assert!(stderr.contains("offshoot build"), "{stderr}");
        let (error, exit) = json_error(&place.run(&[verb, "nope", "--json"]));
        assert_eq!((error["code"].as_str(), exit), (Some("template_not_found"), 1));
    }
}

#[test]
fn a_fork_that_is_not_there_is_a_typed_error() {
    let place = Place::new();
    let verbs: [&[&str]; 6] = [
        &["inspect", "nope"],
        &["ping", "nope"],
        &["logs", "nope"],
        &["kill", "nope"],
        &["eval", "nope", "--", "1"],
        &["cp", "nope:/a", "b"],
    ];
    for verb in verbs {
        let (error, exit) = json_error(&place.run(&[&["--json"], verb].concat()));
        assert_eq!((error["code"].as_str(), exit), (Some("fork_not_found"), 1), "{verb:?}");
        assert!(text(&place.run(verb).stderr).contains("offshoot ls"), "{verb:?}");
    }
}

#[test]
fn a_failure_of_offshoots_own_in_exec_is_125() {
    let place = Place::new();
    assert_eq!(place.run(&["exec", "nope", "--", "true"]).status.code(), Some(125));
    let (error, exit) = json_error(&place.run(&["--json", "exec", "nope", "--", "true"]));
    assert_eq!((error["code"].as_str(), exit), (Some("fork_not_found"), 125));
}

#[test]
fn wrong_usage_is_2_and_an_error_object_with_json() {
    let place = Place::new();
    let long = "a".repeat(65);
    for (line, code) in [
        (vec!["fork", "../x"], "invalid_value"),
        (vec!["fork", "/etc/passwd"], "invalid_value"),
        (vec!["fork", ""], "invalid_value"),
        (vec!["fork", &long], "invalid_value"),
        (vec!["fork", "py", "--name", "Not-DNS"], "invalid_value"),
        (vec!["fork", "py", "--ack-timeout-ms", "-1"], "negative_ack_timeout"),
        (vec!["fork", "py", "--secret", "K=hunter2"], "secret_in_arguments"),
        (vec!["fork", "py", "--env", "1A=hunter2"], "invalid_name"),
        (vec!["exec", "f", "--timeout", "-1", "--", "ls"], "invalid_value"),
        (vec!["exec", "f", "-t", "--", "ls"], "usage"),
        (vec!["exec", "f"], "missing_argument"),
        (vec!["cp", "a", "b"], "usage"),
        (vec!["cp", "a:/x", "b:/y"], "usage"),
        (vec!["kill"], "missing_argument"),
        (vec!["eval", "f"], "usage"),
        (vec!["frok"], "unknown_command"),
        (vec!["ls", "--nope"], "unknown_argument"),
        (vec![], "unknown_command"),
    ] {
        let output = place.run(&[&["--json"], line.as_slice()].concat());
        let (error, exit) = json_error(&output);
        assert_eq!((error["code"].as_str(), exit), (Some(code), 2), "{line:?}: {error}");
        assert!(!text(&output.stderr).contains("hunter2"), "{line:?}");
    }
    // Nothing was made for any of them that is wrong in itself.
    assert!(!place.path("data/templates").exists());
}

#[test]
fn a_secret_in_the_arguments_is_refused_with_the_reason_and_without_the_value() {
    let output = Place::new().run(&["fork", "py", "--secret", "API_KEY=hunter2"]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains("API_KEY=@FILE") && stderr.contains("read it"), "{stderr}");
    assert!(!stderr.contains("hunter2"), "{stderr}");
}

#[test]
fn empty_lists() {
    let place = Place::new();
    assert_eq!(document(&place.run(&["ls", "--json"]))["forks"], Value::Array(Vec::new()));
    let templates = document(&place.run(&["templates", "--json"]));
    assert_eq!(templates["templates"], Value::Array(Vec::new()));
    let cleanup = document(&place.run(&["cleanup", "--json"]));
    assert_eq!((&cleanup["dry_run"], &cleanup["leftovers"]), (&Value::Bool(true), &Value::Array(Vec::new())));
    assert_eq!(document(&place.run(&["kill", "--all", "--json"]))["killed"], Value::Array(Vec::new()));
    for line in [&["ls"][..], &["templates"], &["cleanup"], &["cleanup", "--yes"], &["kill", "--all"]] {
        let output = place.run(line);
        assert!(output.status.success() && output.stdout.is_empty(), "{line:?}");
        assert!(!output.stderr.is_empty(), "{line:?} says what it found");
        assert!(place.run(&[line, &["-q"]].concat()).stderr.is_empty(), "{line:?}");
    }
}

#[test]
fn o3_cleanup_is_a_dry_run_and_touches_only_what_is_offshoots() {
    let place = Place::new();
    assert!(place.run(&["ls"]).status.success());
    let left = place.path("state/forks/.new-0123456789abcdef0123");
    let foreign = place.path("state/forks/mine");
    for dir in [&left, &foreign] {
        fs::create_dir(dir).unwrap();
    }
    let name = place.path("state/names/ghost");
    symlink("ffffffffffffffffffff", &name).unwrap();
    let is_link = |path: &Path| path.symlink_metadata().is_ok();

    let dry = document(&place.run(&["cleanup", "--json"]));
    assert_eq!(dry["leftovers"].as_array().unwrap().len(), 2, "{dry}");
    assert!(dry["leftovers"].as_array().unwrap().iter().all(|leftover| leftover["removed"] == false));
    assert_eq!(dry["foreign"].as_array().unwrap().len(), 1);
    assert!(left.exists() && is_link(&name));

    let done = document(&place.run(&["cleanup", "--yes", "--json"]));
    assert!(done["leftovers"].as_array().unwrap().iter().all(|leftover| leftover["removed"] == true), "{done}");
    assert!(!left.exists() && !is_link(&name) && foreign.exists());
}

#[test]
fn completions_for_every_shell() {
    let place = Place::new();
    for (shell, mark) in [("bash", "_offshoot()"), ("zsh", "#compdef offshoot"), ("fish", "complete -c offshoot")] {
        let output = place.run(&["completions", shell]);
        assert!(output.status.success());
        let script = text(&output.stdout);
        assert!(script.contains(mark) && script.contains("mailboxes"), "{shell}");
    }
    assert_eq!(place.run(&["completions", "tcsh"]).status.code(), Some(2));
}

#[test]
fn version_and_help() {
    let place = Place::new();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(text(&place.run(&["version"]).stdout), format!("offshoot {version}\n"));
    assert_eq!(document(&place.run(&["version", "--json"]))["version"], version);
    assert_eq!(text(&place.run(&["--version"]).stdout), format!("offshoot {version}\n"));
    let help = place.run(&["fork", "--help"]);
    assert!(help.status.success() && text(&help.stdout).contains("Examples:"));
    // Neither needs a home.
    assert!(!place.path("data").exists());
}

#[test]
fn doctor_says_what_it_found() {
    let place = Place::new();
    let output = place.run(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ready = report["ready"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!ready)));
    assert!(report["findings"].as_array().unwrap().iter().any(|finding| finding["name"] == "qemu"));
    let people = place.command(&["doctor"]).env("NO_COLOR", "1").output().unwrap();
    assert!(!text(&people.stdout).contains('\x1b'));
}

#[test]
fn colour_is_only_where_it_is_wanted() {
    let place = Place::new();
    let stderr = |variables: &[(&str, &str)]| {
        let mut command = place.command(&["rmi", "nope"]);
        command.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE").envs(variables.iter().copied());
        text(&command.output().unwrap().stderr)
    };
    assert!(!stderr(&[]).contains('\x1b'));
    assert!(stderr(&[("CLICOLOR_FORCE", "1")]).contains('\x1b'));
    assert!(!stderr(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]).contains('\x1b'));
}

#[test]
fn a_home_that_can_not_be_made_is_a_typed_error() {
    let place = Place::new();
    let output = place.command(&["ls", "--json"]).env("OFFSHOOT_STATE_DIR", "/proc/nope").output().unwrap();
    let (error, exit) = json_error(&output);
    assert_eq!((error["code"].as_str(), exit), (Some("directory_unusable"), 1));
    assert!(error["message"].as_str().unwrap().contains("OFFSHOOT_STATE_DIR"));
}
