//! The identity document: what a fork is told before any of its workloads runs. The mailbox carries it as bytes
//! ([`Document::to_bytes`] and [`Document::from_bytes`]); the form in JSON is for people and tools.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    key::AckKey,
    name::{EnvName, ForkId, ForkName, SecretName, Tag},
    network::{Network, NetworkError},
    secret::Secret,
};

/// The format of a document without a network section.
pub const FORMAT: u32 = 1;

/// The format of a document with a network section: one of format 1, and the section. A guest refuses formats that it does not know.
pub const FORMAT_NETWORK: u32 = 2;

/// Entropy a fork is given, in bytes. The kernel's generator takes 32; twice that leaves no doubt.
pub const ENTROPY_LEN: usize = 64;

/// Most labels, variables, secrets or files (each) that one document carries.
pub const MAX_ENTRIES: usize = 256;

/// Longest label key or value, in bytes.
pub const MAX_LABEL: usize = 256;

/// Nanoseconds since the Unix epoch; a string in JSON, because many readers round large numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClockNanos(pub u64);

impl Serialize for ClockNanos {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ClockNanos {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// What the guest has to do with the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Take on the identity in the document: this is a new fork.
    Become,
    /// Keep the identity it has (clock and randomness are refreshed): the source of a branch, or a standby resumed.
    Continue,
    /// Do all that is done to take on the identity in the document, but let nothing of the workload run; then put everything back, and
    /// wait for an identity again: a spare machine, whose first real identity does not find cold what it needs. Guests that say nothing of
    /// it when they are captured do not know it.
    Rehearse,
}

/// Who the fork is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkIdentity {
    /// The fork's id.
    pub id: ForkId,
    /// The fork's name.
    pub name: ForkName,
    /// The host name inside the guest.
    pub hostname: ForkName,
    /// The template it was forked from.
    pub template: Tag,
    /// `/etc/machine-id`: 32 lower-case hexadecimal digits.
    pub machine_id: String,
    /// `/proc/sys/kernel/random/boot_id`: a version 4 UUID.
    pub boot_id: String,
}

/// A file to write before the thaw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute path inside the guest's root file system.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// The content.
    pub content: Secret,
}

/// Limits that the guest applies to its workload before the thaw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most processes and threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// Most memory, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Most CPU, in thousandths of one CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_millis: Option<u64>,
}

/// The identity document.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// What [`format_for`] says of the network section.
    pub format: u32,
    /// What to do.
    pub action: Action,
    /// Who the fork is.
    pub fork: ForkIdentity,
    /// Labels the caller gave.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Environment the caller gave. A variable that is absent is absent in the fork too.
    #[serde(default)]
    pub env: BTreeMap<EnvName, String>,
    /// Secrets, written to files of mode 0400. In a document that says to go on: see [`Document::unseal`].
    #[serde(default)]
    pub secrets: BTreeMap<SecretName, Secret>,
    /// Files to write.
    #[serde(default)]
    pub files: Vec<File>,
    /// The host's wall clock at the moment the document was written.
    pub wall_clock: ClockNanos,
    /// Fresh random bytes for the kernel's generator, [`ENTROPY_LEN`] of them.
    pub entropy: Secret,
    /// The key that authenticates this fork's acks.
    pub ack_key: AckKey,
    /// Limits for the workload.
    #[serde(default)]
    pub limits: Limits,
    /// Who the fork is on the wire; absent for a fork without a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
}

/// The format of a document with this network section, or with none.
#[must_use]
pub fn format_for(network: Option<&Network>) -> u32 {
    if network.is_some() { FORMAT_NETWORK } else { FORMAT }
}

/// Why a document was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DocumentError {
    /// Not JSON of the document's form. The position is kept; the content, which may hold secrets, is not.
    #[error("the identity document is malformed at line {line}, column {column}")]
    Malformed {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// Not bytes of the document's form.
    #[error("the identity document is malformed at byte {at}")]
    MalformedBytes {
        /// Where, from 0.
        at: usize,
    },
    /// Another format.
    #[error("the identity document has format {0}; this build knows {FORMAT} and {FORMAT_NETWORK}")]
    Format(u32),
    /// A field does not follow its rule.
    #[error("the identity document's {field} is not valid: {rule}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its rule.
        rule: &'static str,
    },
    /// A field of the network section does not follow its rule.
    #[error("the identity document's network: {0}")]
    Network(#[from] NetworkError),
}

impl Document {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// [`DocumentError`]; its text never repeats the document's content.
    pub fn from_json(bytes: &[u8]) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_slice(bytes)
            .map_err(|error| DocumentError::Malformed { line: error.line(), column: error.column() })?;
        document.check()?;
        Ok(document)
    }

    /// The document as JSON, in memory that is wiped on drop.
    #[must_use]
    #[allow(clippy::missing_panics_doc, clippy::expect_used)]
    pub fn to_json(&self) -> Secret {
        Secret::new(serde_json::to_vec(self).expect("every field has a JSON form"))
    }

    /// Checks the rules that the types alone do not hold.
    ///
    /// # Errors
    /// The first field that breaks its rule.
    pub fn check(&self) -> Result<(), DocumentError> {
        let field = |field, rule| Err(DocumentError::Field { field, rule });
        if !matches!(self.format, FORMAT | FORMAT_NETWORK) {
            return Err(DocumentError::Format(self.format));
        }
        if self.format != format_for(self.network.as_ref()) {
            return field("network", "there in a document of format 2, absent in one of format 1");
        }
        if let Some(network) = &self.network {
            network.check()?;
        }
        if !is_hex(&self.fork.machine_id, 32) {
            return field("machine_id", "32 lower-case hexadecimal digits");
        }
        if !is_uuid(&self.fork.boot_id) {
            return field("boot_id", "a lower-case UUID");
        }
        if self.entropy.expose().len() != ENTROPY_LEN {
            return field("entropy", "exactly 64 bytes");
        }
        if [self.labels.len(), self.env.len(), self.secrets.len(), self.files.len()].iter().any(|&n| n > MAX_ENTRIES) {
            return field("labels, env, secrets or files", "at most 256 entries each");
        }
        if self.labels.iter().any(|(key, value)| !is_label(key) || value.len() > MAX_LABEL || has_control(value)) {
            return field(
                "labels",
                "keys of 1 to 256 printable bytes without '=', values up to 256 without control characters",
            );
        }
        if self.env.values().any(|value| value.contains('\0')) {
            return field("env", "values without NUL");
        }
        if self.action == Action::Rehearse && !self.is_bare() {
            return field("action", "a rehearsal has no labels, variables, secrets, files and limits");
        }
        if self.files.iter().any(|file| !is_guest_path(&file.path) || file.mode & !0o7777 != 0) {
            return field("files", "absolute paths without '..' and NUL, modes within 07777");
        }
        Ok(())
    }

    /// What opens the secrets that were sealed before the capture: in a document that says to go on.
    #[must_use]
    pub fn unseal(&self) -> Option<&Secret> {
        let found = self.secrets.iter().find(|(name, _)| name.as_str() == crate::seal::UNSEAL);
        found.filter(|_| self.action == Action::Continue).map(|(_, key)| key)
    }

    /// Whether nobody gave anything for it.
    fn is_bare(&self) -> bool {
        let entries = [self.labels.len(), self.env.len(), self.secrets.len(), self.files.len()];
        entries == [0; 4] && self.limits == Limits::default()
    }
}

/// Whether `key` may be a label's key.
#[must_use]
pub fn is_label(key: &str) -> bool {
    (1..=MAX_LABEL).contains(&key.len()) && !key.contains('=') && !has_control(key)
}

/// Whether `path` may name a file in the guest: absolute, no `..` component, no NUL, at most 4096 bytes, not a directory's form.
#[must_use]
pub fn is_guest_path(path: &str) -> bool {
    path.starts_with('/')
        && path.len() <= 4096
        && !path.contains('\0')
        && !path.ends_with('/')
        && path.split('/').all(|component| component != "..")
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

/// Bytes as standard base64 text.
pub(crate) mod base64_bytes {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};
    use zeroize::Zeroizing;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(STANDARD.encode(bytes)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        STANDARD.decode(text.as_bytes()).map_err(|_| D::Error::custom("not base64"))
    }
}
