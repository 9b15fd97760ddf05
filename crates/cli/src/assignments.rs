//! `NAME=…` arguments: variables, labels, secrets, files, mailbox payloads and tokens.
//!
//! They are not parsed by clap, whose errors repeat the whole argument: an error here never repeats a value, and for
//! secrets not even a name that is not valid (it may be the value of a hasty command).

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStringExt,
};

use identity::{EnvName, MailboxName, NameError, Secret, SecretName};
use thiserror::Error;

use crate::error::Coded;

/// Most bytes of one file: all of a fork's documents together take less.
const MAX_FILE: u64 = 1 << 20;
/// Permission bits of a file without any given.
const DEFAULT_MODE: u32 = 0o644;

/// Why an argument was refused.
#[derive(Debug, Error)]
pub enum AssignmentError {
    /// No `=`.
    #[error("an argument of {option} has no '='; give {form}")]
    NoEquals {
        /// The option.
        option: &'static str,
        /// Its form.
        form: &'static str,
    },
    /// What is to wait for a fork's network can not be found.
    #[error("the program that would wait for the fork's network can not be found: {0}")]
    OwnProgram(io::Error),
    /// What may pass a fork's network can not be so.
    #[error(transparent)]
    Policy(#[from] net::PolicyError),
    /// The name is not valid.
    #[error("{option}: {source}")]
    Name {
        /// The option.
        option: &'static str,
        /// Why.
        source: NameError,
    },
    /// The name of a secret is not valid: it is not repeated.
    #[error("{option}: the name before '=' is not valid: {rule}")]
    SecretName {
        /// The option.
        option: &'static str,
        /// The rule.
        rule: &'static str,
    },
    /// A secret's value stands in the arguments.
    #[error(
        "{option} takes no value on the command line, where every user of this machine can read it (ps, /proc) and the \
         shell keeps it in its history; put it into a file and give {name}=@FILE, or into a variable and give {name}=env:VAR"
    )]
    SecretInArguments {
        /// The option.
        option: &'static str,
        /// The secret.
        name: String,
    },
    /// Given twice.
    #[error("{option} gives {name} twice")]
    Twice {
        /// The option.
        option: &'static str,
        /// The name.
        name: String,
    },
    /// The variable is not set.
    #[error("{option}: the variable {variable} is not set; export it first")]
    NoVariable {
        /// The option.
        option: &'static str,
        /// The variable.
        variable: String,
    },
    /// The file can not be read.
    #[error("{option}: the file {file:?} can not be read")]
    Read {
        /// The option.
        option: &'static str,
        /// The file.
        file: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is too long.
    #[error("{option}: the file {file:?} is longer than 1 MiB; copy it with `offshoot cp` once the fork runs")]
    TooLong {
        /// The option.
        option: &'static str,
        /// The file.
        file: String,
    },
    /// Not `@FILE`.
    #[error("--file takes the content from a file: {path}=@FILE or {path}=@FILE:MODE")]
    NotAFile {
        /// The path in the guest.
        path: String,
    },
    /// A token or `--wait-ack` without the mailbox.
    #[error("{option} names the mailbox {name}, but no --mailbox gives it a payload; add --mailbox {name}=…")]
    NoPayload {
        /// The option.
        option: &'static str,
        /// The mailbox.
        name: MailboxName,
    },
    /// A negative time.
    #[error("--ack-timeout-ms is {0}; it is from 0 (the default of 5000) to 30000")]
    NegativeAckTimeout(i64),
}

impl Coded for AssignmentError {
    fn code(&self) -> &'static str {
        match self {
            Self::NoEquals { .. } => "no_equals_sign",
            Self::Name { .. } | Self::SecretName { .. } => "invalid_name",
            Self::SecretInArguments { .. } => "secret_in_arguments",
            Self::Twice { .. } => "given_twice",
            Self::NoVariable { .. } => "variable_not_set",
            Self::Read { .. } => "file_unreadable",
            Self::TooLong { .. } => "file_too_long",
            Self::NotAFile { .. } => "not_a_file_argument",
            Self::NoPayload { .. } => "mailbox_without_payload",
            Self::NegativeAckTimeout(_) => "negative_ack_timeout",
            Self::Policy(_) => "network_policy_invalid",
            Self::OwnProgram(_) => "internal",
        }
    }

    fn is_usage(&self) -> bool {
        true
    }
}

/// `--env K=V`.
///
/// # Errors
/// [`AssignmentError`].
pub fn variables(arguments: &[String]) -> Result<BTreeMap<EnvName, String>, AssignmentError> {
    let option = "--env";
    let mut variables = BTreeMap::new();
    for argument in arguments {
        let (name, value) = split(option, "K=V", argument)?;
        let name = EnvName::parse(name).map_err(|source| AssignmentError::Name { option, source })?;
        put(option, &mut variables, name, value.to_owned())?;
    }
    Ok(variables)
}

/// `--label K=V`. Their rules are the request's.
///
/// # Errors
/// [`AssignmentError`].
pub fn labels(arguments: &[String]) -> Result<BTreeMap<String, String>, AssignmentError> {
    let option = "--label";
    let mut labels = BTreeMap::new();
    for argument in arguments {
        let (key, value) = split(option, "K=V", argument)?;
        put(option, &mut labels, key.to_owned(), value.to_owned())?;
    }
    Ok(labels)
}

/// `--secret K=@FILE|K=env:VAR`.
///
/// # Errors
/// [`AssignmentError`]; it never holds a value.
pub fn secrets(arguments: &[String]) -> Result<BTreeMap<SecretName, Secret>, AssignmentError> {
    let option = "--secret";
    let mut secrets = BTreeMap::new();
    for argument in arguments {
        let (name, source) = split(option, "K=@FILE or K=env:VAR", argument)?;
        let name =
            SecretName::parse(name).map_err(|_| AssignmentError::SecretName { option, rule: SecretName::RULE })?;
        let secret = secret(option, name.as_str(), source)?;
        put(option, &mut secrets, name, secret)?;
    }
    Ok(secrets)
}

/// `--file PATH=@FILE[:MODE]`. The path's rule is the request's.
///
/// # Errors
/// [`AssignmentError`].
pub fn files(arguments: &[String]) -> Result<BTreeMap<String, (Secret, u32)>, AssignmentError> {
    let option = "--file";
    let mut files = BTreeMap::new();
    for argument in arguments {
        let (path, source) = split(option, "PATH=@FILE or PATH=@FILE:MODE", argument)?;
        let source = source
            .strip_prefix('@')
            .ok_or_else(|| AssignmentError::NotAFile { path: path.chars().take(200).collect() })?;
        let (file, mode) = file_and_mode(source);
        put(option, &mut files, path.to_owned(), (read(option, file)?, mode))?;
    }
    Ok(files)
}

/// `--mailbox NAME=JSON|NAME=@FILE`. That it is an object is the request's rule.
///
/// # Errors
/// [`AssignmentError`].
pub fn payloads(arguments: &[String]) -> Result<BTreeMap<MailboxName, Secret>, AssignmentError> {
    let option = "--mailbox";
    let mut payloads = BTreeMap::new();
    for argument in arguments {
        let (name, payload) = split(option, "NAME=JSON or NAME=@FILE", argument)?;
        let name = MailboxName::parse(name).map_err(|source| AssignmentError::Name { option, source })?;
        let payload = match payload.strip_prefix('@') {
            Some(file) => read(option, file)?,
            None => Secret::new(payload.as_bytes().to_vec()),
        };
        put(option, &mut payloads, name, payload)?;
    }
    Ok(payloads)
}

/// `--mailbox-token NAME=@FILE|NAME=env:VAR`.
///
/// # Errors
/// [`AssignmentError`]; it never holds a value.
pub fn tokens(arguments: &[String]) -> Result<BTreeMap<MailboxName, Secret>, AssignmentError> {
    let option = "--mailbox-token";
    let mut tokens = BTreeMap::new();
    for argument in arguments {
        let (name, source) = split(option, "NAME=@FILE or NAME=env:VAR", argument)?;
        let name =
            MailboxName::parse(name).map_err(|_| AssignmentError::SecretName { option, rule: MailboxName::RULE })?;
        let token = secret(option, name.as_str(), source)?;
        put(option, &mut tokens, name, token)?;
    }
    Ok(tokens)
}

fn split<'a>(
    option: &'static str,
    form: &'static str,
    argument: &'a str,
) -> Result<(&'a str, &'a str), AssignmentError> {
    argument.split_once('=').ok_or(AssignmentError::NoEquals { option, form })
}

fn put<K: Ord + ToString, V>(
    option: &'static str,
    into: &mut BTreeMap<K, V>,
    name: K,
    value: V,
) -> Result<(), AssignmentError> {
    if into.contains_key(&name) {
        return Err(AssignmentError::Twice { option, name: name.to_string() });
    }
    into.insert(name, value);
    Ok(())
}

fn secret(option: &'static str, name: &str, source: &str) -> Result<Secret, AssignmentError> {
    if let Some(file) = source.strip_prefix('@') {
        return read(option, file);
    }
    let Some(variable) = source.strip_prefix("env:") else {
        return Err(AssignmentError::SecretInArguments { option, name: name.to_owned() });
    };
    // `var_os` panics on a name with '=' or NUL; such a name can not be set either.
    let valid = EnvName::parse(variable).is_ok();
    let value = valid.then(|| env::var_os(variable)).flatten();
    let variable = || if valid { variable.to_owned() } else { "named after env:".to_owned() };
    let value = value.ok_or_else(|| AssignmentError::NoVariable { option, variable: variable() })?;
    Ok(Secret::new(value.into_vec()))
}

/// Splits `FILE:MODE`; what follows the colon is a mode only if it is three or four octal digits.
fn file_and_mode(source: &str) -> (&str, u32) {
    let mode = |text: &str| {
        let octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        octal.then(|| u32::from_str_radix(text, 8).ok()).flatten()
    };
    match source.rsplit_once(':') {
        Some((file, text)) => mode(text).map_or((source, DEFAULT_MODE), |mode| (file, mode)),
        None => (source, DEFAULT_MODE),
    }
}

/// Reads a file, byte for byte, into one piece of memory: growing would leave copies behind.
fn read(option: &'static str, file: &str) -> Result<Secret, AssignmentError> {
    let failed = |source| AssignmentError::Read { option, file: file.to_owned(), source };
    let opened = File::open(file).map_err(failed)?;
    let length = opened.metadata().map_err(failed)?.len();
    let room = if length == 0 { MAX_FILE + 1 } else { length.min(MAX_FILE) + 1 };
    let mut bytes = Vec::with_capacity(usize::try_from(room).unwrap_or_default());
    let read = opened.take(MAX_FILE + 1).read_to_end(&mut bytes);
    // From here on the bytes are wiped whatever happens.
    let secret = Secret::new(bytes);
    read.map_err(failed)?;
    if secret.expose().len() as u64 > MAX_FILE {
        return Err(AssignmentError::TooLong { option, file: file.to_owned() });
    }
    Ok(secret)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    fn refused<T: std::fmt::Debug>(result: Result<T, AssignmentError>) -> (&'static str, String) {
        let error = result.unwrap_err();
        assert!(error.is_usage());
        (error.code(), format!("{error} {error:?}"))
    }

    fn file(content: &[u8]) -> (tempfile::NamedTempFile, String) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        (file, path)
    }

    #[test]
    fn a_secret_in_the_arguments_is_refused_and_not_repeated() {
        for argument in ["KEY=hunter2", "KEY=", "KEY=envy:hunter2", "hunter2", "hunter2 ../=x", "KEY=env:hunter2=x"] {
            let (_, text) = refused(secrets(&[argument.into()]));
            assert!(!text.contains("hunter2"), "{text}");
        }
        assert_eq!(refused(secrets(&["KEY=hunter2".into()])).0, "secret_in_arguments");
        assert_eq!(refused(tokens(&["app=hunter2".into()])).0, "secret_in_arguments");
        assert!(refused(secrets(&["KEY=x".into()])).1.contains("KEY=@FILE"));
    }

    #[test]
    fn a_secret_comes_from_a_file_byte_for_byte_or_from_a_variable() {
        let (_file, path) = file(b"line\n\xff");
        let secrets = secrets(&[format!("A=@{path}"), "B=env:PATH".into()]).unwrap();
        assert_eq!(secrets[&SecretName::parse("A").unwrap()].expose(), b"line\n\xff");
        assert_eq!(secrets[&SecretName::parse("B").unwrap()].expose(), env::var("PATH").unwrap().as_bytes());
        assert_eq!(refused(super::secrets(&["A=env:OFFSHOOT_NOT_SET".into()])).0, "variable_not_set");
        assert_eq!(refused(super::secrets(&["A=@/nonexistent".into()])).0, "file_unreadable");
    }

    #[test]
    fn an_endless_file_is_refused() {
        assert_eq!(refused(files(&["/etc/x=@/dev/zero".into()])).0, "file_too_long");
    }

    #[test]
    fn a_file_has_a_mode() {
        let (_file, path) = file(b"x");
        let mode = |suffix: &str| files(&[format!("/etc/x=@{path}{suffix}")]).map(|files| files["/etc/x"].1);
        assert_eq!(mode("").unwrap(), 0o644);
        assert_eq!(mode(":0600").unwrap(), 0o600);
        assert_eq!(mode(":755").unwrap(), 0o755);
        // No mode: part of a file name that does not exist.
        assert_eq!(refused(mode(":999")).0, "file_unreadable");
        assert_eq!(refused(files(&["/etc/x=content".into()])).0, "not_a_file_argument");
    }

    #[test]
    fn names_are_checked_and_may_stand_once() {
        assert_eq!(refused(variables(&["1A=x".into()])).0, "invalid_name");
        assert_eq!(refused(variables(&["A".into()])).0, "no_equals_sign");
        assert_eq!(refused(variables(&["A=1".into(), "A=2".into()])).0, "given_twice");
        assert_eq!(refused(payloads(&["a b={}".into()])).0, "invalid_name");
        assert_eq!(variables(&["A=b=c".into()]).unwrap()[&EnvName::parse("A").unwrap()], "b=c");
    }
}
