//! What a caller asks of a fork, checked before anything begins.

use std::{collections::BTreeMap, time::Duration};

use identity::{
    EnvName, ForkName, MailboxName, Secret, SecretName,
    document::{self, MAX_ENTRIES},
    mailbox::MAX_CALLER_MAILBOXES,
};
use memory::Mailbox;
use store::Manifest;
use thiserror::Error;

use crate::network::{MAX_NETWORK_TIMEOUT, NetworkRequest};

/// How long a mailbox's ack is awaited when the caller does not say.
pub const DEFAULT_ACK_TIMEOUT: Duration = Duration::from_millis(5000);
/// Longest time a caller may ask for.
pub const MAX_ACK_TIMEOUT: Duration = Duration::from_millis(30_000);
/// Most forks of one request.
pub const MAX_FORKS: usize = 1000;

/// A request for one or more forks.
#[derive(Debug, Clone, Default)]
pub struct ForkRequest {
    /// How many; each has an identity of its own.
    pub count: usize,
    /// The name; with a count above 1, `-1`, `-2`… are appended. Without one, names are made from the template's.
    pub name: Option<ForkName>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Environment.
    pub env: BTreeMap<EnvName, String>,
    /// Secrets.
    pub secrets: BTreeMap<SecretName, Secret>,
    /// Files: guest path to content and permission bits.
    pub files: BTreeMap<String, (Secret, u32)>,
    /// Payloads for mailboxes.
    pub mailboxes: Vec<MailboxRequest>,
    /// Limits.
    pub limits: LimitRequest,
    /// Network.
    pub network: NetworkRequest,
    /// What asked for it, where that must be found out again: it is noted in the fork's record.
    pub origin: Option<String>,
}

/// A payload for one mailbox.
#[derive(Debug, Clone)]
pub struct MailboxRequest {
    /// The mailbox.
    pub name: MailboxName,
    /// Its token, if it was planted with one.
    pub token: Option<Secret>,
    /// The payload: a JSON object.
    pub payload: Secret,
    /// Whether the fork counts as made only once this mailbox has acknowledged.
    pub wait_ack: bool,
    /// How long; zero is the default.
    pub ack_timeout: Duration,
}

/// Limits a caller asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitRequest {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// Why a request was refused before any work. Never repeats a payload or a secret.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// A number is out of its range.
    #[error("{what} must be from {min} to {max}, not {given}")]
    Range {
        /// What.
        what: &'static str,
        /// The field of the request, as the API names it.
        field: &'static str,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
        /// Given.
        given: u64,
    },
    /// The names of several forks do not fit into 63 characters.
    #[error("the name {0} is too long to get a number appended; use at most 58 characters with -n")]
    NameTooLong(ForkName),
    /// More than 16 mailboxes.
    #[error("{0} mailboxes were given; a fork takes at most {MAX_CALLER_MAILBOXES}")]
    TooManyMailboxes(usize),
    /// The same mailbox twice.
    #[error("mailbox {0} was given twice")]
    MailboxTwice(MailboxName),
    /// A name that belongs to offshoot.
    #[error("mailbox {0} belongs to offshoot; names that begin with offshoot: can not be addressed")]
    MailboxReserved(MailboxName),
    /// The template has no such mailbox.
    #[error("template has no mailbox {name}; it has {known} (see `offshoot mailboxes {tag}`)")]
    MailboxUnknown {
        /// The mailbox.
        name: MailboxName,
        /// Those it has.
        known: String,
        /// The template.
        tag: String,
    },
    /// The template has this mailbox more than once.
    #[error(
        "mailbox {name} is ambiguous in this template: {reason}; build the template again with one program that plants it"
    )]
    MailboxAmbiguous {
        /// The mailbox.
        name: MailboxName,
        /// Why.
        reason: String,
    },
    /// The token is absent or not the one it was planted with.
    #[error("the token for mailbox {0} does not match the one it was planted with (give it with --mailbox-token)")]
    MailboxToken(MailboxName),
    /// Not a JSON object.
    #[error("the payload for mailbox {0} is not a JSON object")]
    NotAnObject(MailboxName),
    /// Longer than the mailbox.
    #[error("the payload for mailbox {name} has {len} bytes; the mailbox takes {capacity}")]
    PayloadTooLong {
        /// The mailbox.
        name: MailboxName,
        /// Bytes given.
        len: usize,
        /// Bytes possible.
        capacity: usize,
    },
    /// The whole identity does not fit.
    #[error(
        "env, labels, secrets and files have {len} bytes together as JSON; a fork takes {capacity} (copy larger files with `offshoot cp`)"
    )]
    IdentityTooLong {
        /// Bytes.
        len: usize,
        /// Bytes possible.
        capacity: usize,
    },
    /// The recipe does not allow the variable.
    #[error(
        "the variable {0} decides which code programs run, and the template's recipe does not let a fork's caller set it; add allow = \
         [\"{0}\"] to its [identity] and build it again, or give the value another name"
    )]
    VariableNotAllowed(EnvName),
    /// A label, a variable's value or a path breaks its rule.
    #[error("{what} is not valid: {rule}")]
    Field {
        /// What, without its value.
        what: String,
        /// The field of the request, as the API names it.
        field: &'static str,
        /// The rule.
        rule: &'static str,
    },
}

impl RequestError {
    /// The field of the request that is to blame, as the API names it.
    #[must_use]
    pub fn field(&self) -> &'static str {
        match self {
            Self::Range { field, .. } | Self::Field { field, .. } => field,
            Self::NameTooLong(_) => "name",
            Self::VariableNotAllowed(_) => "env",
            // Nearly always what is long are files.
            Self::IdentityTooLong { .. } => "files",
            Self::TooManyMailboxes(_)
            | Self::MailboxTwice(_)
            | Self::MailboxReserved(_)
            | Self::MailboxUnknown { .. }
            | Self::MailboxAmbiguous { .. }
            | Self::MailboxToken(_)
            | Self::NotAnObject(_)
            | Self::PayloadTooLong { .. } => "mailboxes",
        }
    }
}

/// A mailbox request together with where it goes.
#[derive(Debug, Clone)]
pub struct Addressed<'a> {
    /// Where.
    pub mailbox: &'a Mailbox,
    /// What.
    pub request: &'a MailboxRequest,
}

impl ForkRequest {
    /// Checks everything that can be checked before any work, and finds the mailboxes.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn check<'a>(&'a self, manifest: &'a Manifest) -> Result<Vec<Addressed<'a>>, RequestError> {
        self.check_without_mailboxes(manifest)?;
        self.address(manifest)
    }

    /// Checks everything that does not depend on which mailboxes there are, for who does not know that yet.
    ///
    /// # Errors
    /// [`RequestError`].
    pub(crate) fn check_early(&self, manifest: &Manifest) -> Result<(), RequestError> {
        self.check_without_mailboxes(manifest)?;
        self.check_number_of_mailboxes()?;
        self.mailboxes.iter().enumerate().try_for_each(|(number, request)| {
            self.check_mailbox(number)?;
            request.check_payload()
        })
    }

    fn check_without_mailboxes(&self, manifest: &Manifest) -> Result<(), RequestError> {
        self.check_form()?;
        let steering = self.env.keys().find(|name| name.steers_programs() && !manifest.allow_env.contains(*name));
        steering.map_or(Ok(()), |name| Err(RequestError::VariableNotAllowed(name.clone())))
    }

    /// Checks all that does not depend on what is forked.
    fn check_form(&self) -> Result<(), RequestError> {
        range("the number of forks", "count", self.count as u64, 1, MAX_FORKS as u64)?;
        if self.count > 1
            && let Some(name) = &self.name
            && name.as_str().len() > 58
        {
            return Err(RequestError::NameTooLong(name.clone()));
        }
        self.check_fields()?;
        self.limits.check()?;
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (given, most) = (millis(self.network.timeout), millis(MAX_NETWORK_TIMEOUT));
        range("the network's timeout in ms", "network.timeout_ms", given, 0, most)
    }

    fn check_fields(&self) -> Result<(), RequestError> {
        let wrong = |field, what: String, rule| Err(RequestError::Field { what, field, rule });
        let counts = [
            ("labels", self.labels.len()),
            ("env", self.env.len()),
            ("secrets", self.secrets.len()),
            ("files", self.files.len()),
        ];
        if let Some((field, _)) = counts.into_iter().find(|(_, count)| *count > MAX_ENTRIES) {
            return wrong(field, "the number of labels, variables, secrets or files".into(), "at most 256 of each");
        }
        for (key, value) in &self.labels {
            if !document::is_label(key) {
                return wrong(
                    "labels",
                    format!("the label {key:?}"),
                    "a key is 1 to 256 bytes without '=' and control characters",
                );
            }
            if value.len() > document::MAX_LABEL || value.chars().any(char::is_control) {
                let what = format!("the value of label {key:?}");
                return wrong("labels", what, "at most 256 bytes without control characters");
            }
        }
        for (name, value) in &self.env {
            if value.contains('\0') {
                return wrong("env", format!("the value of variable {name}"), "no NUL bytes");
            }
        }
        for (path, (_, mode)) in &self.files {
            if !document::is_guest_path(path) || mode & !0o7777 != 0 {
                let rule = "an absolute path without '..', not ending in '/'";
                return wrong("files", format!("the file {path:?}"), rule);
            }
        }
        Ok(())
    }

    fn address<'a>(&'a self, manifest: &'a Manifest) -> Result<Vec<Addressed<'a>>, RequestError> {
        self.check_number_of_mailboxes()?;
        let mut addressed: Vec<Addressed<'a>> = Vec::new();
        for (number, request) in self.mailboxes.iter().enumerate() {
            self.check_mailbox(number)?;
            let name = &request.name;
            if let Some(ambiguous) = manifest.ambiguous.iter().find(|ambiguous| ambiguous.name == *name) {
                return Err(RequestError::MailboxAmbiguous { name: name.clone(), reason: ambiguous.reason.clone() });
            }
            let found = manifest.mailboxes.iter().find(|mailbox| mailbox.name == *name);
            let mailbox = found.ok_or_else(|| unknown(name, manifest))?;
            if !mailbox.accepts_token(request.token.as_ref().map_or(&[][..], Secret::expose)) {
                return Err(RequestError::MailboxToken(name.clone()));
            }
            let payload = request.payload.expose();
            if payload.len() > mailbox.capacity {
                let (len, capacity) = (payload.len(), mailbox.capacity);
                return Err(RequestError::PayloadTooLong { name: name.clone(), len, capacity });
            }
            request.check_payload()?;
            addressed.push(Addressed { mailbox, request });
        }
        Ok(addressed)
    }

    fn check_number_of_mailboxes(&self) -> Result<(), RequestError> {
        let number = self.mailboxes.len();
        if number > MAX_CALLER_MAILBOXES { Err(RequestError::TooManyMailboxes(number)) } else { Ok(()) }
    }

    /// What can be said of a mailbox' address without knowing which there are.
    fn check_mailbox(&self, number: usize) -> Result<(), RequestError> {
        let MailboxRequest { name, ack_timeout, .. } = &self.mailboxes[number];
        if name.is_reserved() {
            return Err(RequestError::MailboxReserved(name.clone()));
        }
        if self.mailboxes[..number].iter().any(|other| other.name == *name) {
            return Err(RequestError::MailboxTwice(name.clone()));
        }
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        range("the ack timeout in ms", "mailboxes", millis(*ack_timeout), 0, millis(MAX_ACK_TIMEOUT))
    }

    /// The name of fork `index` (from 0), or `None` when one has to be made up.
    #[must_use]
    pub fn name_of(&self, index: usize) -> Option<ForkName> {
        let name = self.name.as_ref()?;
        if self.count == 1 { Some(name.clone()) } else { ForkName::parse(&format!("{name}-{}", index + 1)).ok() }
    }
}

impl MailboxRequest {
    /// How long its ack is awaited.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        if self.ack_timeout.is_zero() { DEFAULT_ACK_TIMEOUT } else { self.ack_timeout }
    }

    fn check_payload(&self) -> Result<(), RequestError> {
        if is_json_object(self.payload.expose()) { Ok(()) } else { Err(RequestError::NotAnObject(self.name.clone())) }
    }
}

impl LimitRequest {
    fn check(&self) -> Result<(), RequestError> {
        if let Some(memory) = self.memory {
            range("--memory-limit in bytes", "limits.memory_bytes", memory, 16 << 20, 1 << 50)?;
        }
        if let Some(cpus) = self.cpu_millis {
            range("--cpus in thousandths", "limits.cpu_millis", cpus, 10, 1_024_000)?;
        }
        if let Some(pids) = self.pids {
            range("--pids", "limits.pids", pids, 1, 4_194_304)?;
        }
        Ok(())
    }
}

fn range(what: &'static str, field: &'static str, given: u64, min: u64, max: u64) -> Result<(), RequestError> {
    if (min..=max).contains(&given) { Ok(()) } else { Err(RequestError::Range { what, field, min, max, given }) }
}

fn unknown(name: &MailboxName, manifest: &Manifest) -> RequestError {
    let mut known: Vec<&str> = manifest
        .mailboxes
        .iter()
        .filter(|mailbox| !mailbox.name.is_reserved())
        .map(|mailbox| mailbox.name.as_str())
        .collect();
    known.sort_unstable();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    RequestError::MailboxUnknown { name: name.clone(), known, tag: manifest.tag.to_string() }
}

fn is_json_object(payload: &[u8]) -> bool {
    // Only the form counts: the values are skipped, not kept.
    serde_json::from_slice::<BTreeMap<String, serde::de::IgnoredAny>>(payload).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn o5_an_error_names_the_field_that_is_to_blame() {
        let good = || ForkRequest { count: 1, ..ForkRequest::default() };
        let limits = |limits| ForkRequest { limits, ..good() };
        let none = LimitRequest::default();
        let many = |prefix: &str| (0..=MAX_ENTRIES).map(|number| format!("{prefix}{number}")).collect::<Vec<_>>();
        let name = |text: &str| EnvName::parse(text).unwrap();
        let file = || (Secret::new(Vec::new()), 0o644);
        let network = NetworkRequest { timeout: Duration::from_secs(31), ..NetworkRequest::default() };
        let wrong = [
            ("count", ForkRequest { count: 0, ..good() }),
            ("count", ForkRequest { count: 1001, ..good() }),
            ("name", ForkRequest { count: 2, name: Some(ForkName::parse(&"a".repeat(59)).unwrap()), ..good() }),
            ("labels", ForkRequest { labels: [(String::new(), String::new())].into(), ..good() }),
            ("labels", ForkRequest { labels: [("a".to_owned(), "\n".to_owned())].into(), ..good() }),
            ("env", ForkRequest { env: [(name("A"), "\0".to_owned())].into(), ..good() }),
            ("env", ForkRequest { env: many("A").iter().map(|key| (name(key), String::new())).collect(), ..good() }),
            ("files", ForkRequest { files: [("relative".to_owned(), file())].into(), ..good() }),
            ("files", ForkRequest { files: many("/a").into_iter().map(|path| (path, file())).collect(), ..good() }),
            ("limits.memory_bytes", limits(LimitRequest { memory: Some(1), ..none })),
            ("limits.cpu_millis", limits(LimitRequest { cpu_millis: Some(1), ..none })),
            ("limits.pids", limits(LimitRequest { pids: Some(0), ..none })),
            ("network.timeout_ms", ForkRequest { network, ..good() }),
        ];
        good().check_form().unwrap();
        for (field, request) in wrong {
            let error = request.check_form().unwrap_err();
            assert_eq!(error.field(), field, "{error}");
        }
    }
}
