//! Secrets in environments and command lines. They are in the template's memory on disk, and the same in every fork. No value leaves this file:
//! what is told is the name of a variable or an option, a position, and what it looks like.

use std::borrow::Cow;

use super::{
    findings::{Findings, Kind},
    processes::Process,
    secrets::{is_secret, looks_like},
};

/// Most that are named of one process; the others are counted.
const MAX_NAMED: usize = 8;
/// A name that is longer, or of other characters, is none that a person has written: it could be a value.
const MAX_NAME: usize = 64;

const CURE: &str = "take it out of the recipe: give it to each fork (`offshoot fork --secret NAME=@FILE`) and read /run/offshoot/secrets/NAME there, \
    in a service with on_fork = \"wait\" or \"restart\"";

/// Looks at one process.
pub(super) fn look(process: &Process, findings: &mut Findings) {
    let variables = environment(&process.text("environ"));
    if !variables.is_empty() {
        let reason = format!("has what looks like a secret in its environment: {}", listed(&variables));
        findings.of(process, Kind::SecretInEnvironment, reason, CURE);
    }
    let arguments = arguments(&process.text("cmdline"));
    if !arguments.is_empty() {
        let reason = format!("has what looks like a secret in its arguments: {}", listed(&arguments));
        findings.of(process, Kind::SecretInArguments, reason, CURE);
    }
}

fn listed(found: &[String]) -> String {
    let (named, more) = found.split_at(found.len().min(MAX_NAMED));
    let named = named.join(", ");
    if more.is_empty() { named } else { format!("{named} and {} more", more.len()) }
}

/// What is in the text of `/proc/PID/environ`.
fn environment(text: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for (number, entry) in text.split(|&byte| byte == 0).enumerate() {
        let entry = text_of(entry);
        // A program may write over its environment, for its title: that has no names.
        let (name, value) = entry.split_once('=').unwrap_or(("", &entry));
        let who = match name_of(name) {
            Some(name) => format!("variable {name}"),
            None => format!("entry {}", number + 1),
        };
        if let Some(what) = looks_like(value).or_else(|| looks_like(name)) {
            found.push(format!("{who} (looks like {what})"));
        } else if is_secret(name, value) {
            found.push(who);
        }
    }
    // A child may have them in another order, and is to be told of with its parent.
    found.sort();
    found
}

/// What is in the text of `/proc/PID/cmdline`.
fn arguments(text: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut option: Option<String> = None;
    for (number, argument) in text.split(|&byte| byte == 0).enumerate() {
        let argument = text_of(argument);
        let before = option.take();
        let followed = before.filter(|name| !argument.starts_with('-') && is_secret(name, &argument));
        if let Some(what) = looks_like(&argument) {
            found.push(format!("argument {number} (looks like {what})"));
        } else if let Some(name) = followed {
            found.push(match name_of(&name) {
                Some(name) => format!("argument {number} (the value of {name})"),
                None => format!("argument {number}"),
            });
        } else if let Some(name) = assigned(&argument) {
            found.push(match name_of(name) {
                Some(name) => format!("argument {number} (the value of {name})"),
                None => format!("argument {number}"),
            });
        } else if argument.starts_with("--") && !argument.contains(['=', ' ']) {
            option = Some(argument.into_owned());
        }
    }
    found
}

/// The name in `--name=value`, `name=value`, or one of these in a script, if its value is a secret.
fn assigned(argument: &str) -> Option<&str> {
    let words = argument.split(|character: char| {
        character.is_whitespace() || matches!(character, ';' | '|' | '&' | '(' | ')' | '\'' | '"' | '`')
    });
    // The whole of it first: a value may have blanks in it.
    std::iter::once(argument).chain(words).find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name_of(name).is_some() && is_secret(name, value)).then_some(name)
    })
}

/// A name that may be told.
fn name_of(name: &str) -> Option<&str> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let fits = !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(plain) && looks_like(name).is_none();
    fits.then_some(name)
}

fn text_of(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "ghp_a1B2c3D4e5F6g7H8i9J0a1B2c3D4e5F6g7H8";

    #[test]
    fn i17_variables_are_named_and_their_values_are_not() {
        let text = format!(
            "PATH=/bin\0API_TOKEN=hunter2\0HARMLESS={TOKEN}\0TOKEN_FILE=/run/x\0{TOKEN}=1\0{TOKEN}\0\0DB=postgres://u:hunter2@h/d\0"
        );
        let found = environment(text.as_bytes());
        assert_eq!(
            found,
            [
                "entry 5 (looks like a GitHub token)",
                "entry 6 (looks like a GitHub token)",
                "variable API_TOKEN",
                "variable DB (looks like a password in an address)",
                "variable HARMLESS (looks like a GitHub token)",
            ]
        );
        assert!(environment(b"PATH=/bin\0HOME=/root\0LANG=C\0TERM=linux\0PWD=/\0SHLVL=1\0_=/bin/sh\0").is_empty());
    }

    #[test]
    fn i17_arguments_are_told_by_their_position() {
        let found = |line: &[&str]| arguments(line.join("\0").as_bytes());
        assert_eq!(found(&["server", "--token", "hunter2"]), ["argument 2 (the value of --token)"]);
        assert_eq!(found(&["server", "--db-password=hunter2", "-v"]), ["argument 1 (the value of --db-password)"]);
        assert_eq!(found(&["server", "x", TOKEN]), ["argument 2 (looks like a GitHub token)"]);
        assert_eq!(found(&["env", "API_KEY=hunter2", "server"]), ["argument 1 (the value of API_KEY)"]);
        assert_eq!(found(&["sh", "-c", "export API_KEY=hunter2; exec server"]), ["argument 2 (the value of API_KEY)"]);
        for line in [
            ["server", "--token", "--verbose"],
            ["server", "--token-file", "/run/secrets/token"],
            ["server", "--password-stdin", "hunter2"],
            ["server", "--no-token", "hunter2"],
            ["sh", "-c", "PASSWORD=$(cat /run/password) exec server"],
            ["sh", "-c", "trap 'echo identity changed' HUP; while :; do sleep 3600 & wait; done"],
            ["python3", "-c", "token = next(lexer)"],
            ["", "", ""],
        ] {
            assert!(found(&line).is_empty(), "{line:?}");
        }
    }

    #[test]
    fn i17_hostile_command_lines_are_no_matter() {
        assert!(arguments(&[0; 1000]).is_empty());
        assert!(arguments(&[0xff; 1000]).is_empty());
        let long = "--password\0".repeat(2000);
        assert!(arguments(long.as_bytes()).is_empty());
        let odd = format!("a\0--pass\u{1b}[2Jword-{}=hunter2\0", "x".repeat(100));
        assert!(!arguments(odd.as_bytes()).join("").contains(['\u{1b}', 'x']));
        assert_eq!(listed(&vec!["variable A".to_owned(); 10]).matches("variable A").count(), MAX_NAMED);
        assert!(listed(&vec!["variable A".to_owned(); 10]).ends_with("and 2 more"));
    }
}
