//! A request for forks, and how it becomes the library's.

use std::{collections::BTreeMap, fmt, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use host::{
    ForkRequest, LimitRequest, MailboxRequest, NetworkRequest,
    network::{Later, Mode, OnFailure},
    request::MAX_FORKS,
};
use identity::{EnvName, ForkName, MailboxName, Secret, SecretName, Tag};
use net::{Policy, Rate};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::problem::Problem;

/// A text that does not print and is wiped when dropped.
#[derive(Clone, ToSchema)]
#[schema(value_type = String, format = Password)]
pub(crate) struct SecretText(Secret);

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Secret::new(text.into_bytes())))
    }
}

/// Forks to make: of a template, or of a fork.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateForks {
    /// The template's tag. Either this or `from`.
    #[schema(example = "py", max_length = 64, nullable = false)]
    pub(crate) template: Option<String>,
    /// A fork by name or id, running or in standby: the new ones go on from where it is, each as itself. Either this or `template`.
    #[schema(nullable = false)]
    pub(crate) from: Option<String>,
    /// How many; without it as many as there are `children`, or one.
    #[schema(minimum = 1, maximum = 1000, nullable = false)]
    pub(crate) count: Option<usize>,
    /// The name, also the host name: one DNS label. With several forks `-1`, `-2`… are appended. Without one, names are made of the template's.
    #[schema(example = "worker", nullable = false)]
    pub(crate) name: Option<String>,
    /// Labels: shown by lists, and told to the fork. At most 256.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Variables of everything that runs in it. At most 256.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Secrets: in the fork each is a file of mode 0400 below `/run/offshoot/secrets`; never in its environment. At most 256.
    #[serde(default)]
    secrets: BTreeMap<String, SecretText>,
    /// Files that are written before the workload runs. At most 256, and with everything else not above the mailbox's 64 KiB.
    #[serde(default)]
    files: Vec<FileSpec>,
    /// Payloads for programs of the guest that planted a mailbox (`GET /v1/templates/{tag}/mailboxes` lists them). Only for forks that start from
    /// captured memory, with an engine that can write it: else `not_supported`, before any work.
    #[serde(default)]
    #[schema(max_items = 16)]
    mailboxes: Vec<MailboxSpec>,
    /// Limits of each.
    #[serde(default)]
    pub(crate) limits: Limits,
    /// Network of each.
    #[serde(default)]
    pub(crate) network: NetworkSpec,
    /// What single forks are given besides: as many as `count`.
    #[serde(default)]
    #[schema(max_items = 1000)]
    pub(crate) children: Vec<Child>,
    /// If one of them fails the others are undone. By default they stay.
    #[serde(default)]
    pub(crate) all_or_nothing: bool,
}

/// What a fork is given: the fields that a request and its children have in common.
struct Given<'a> {
    labels: &'a BTreeMap<String, String>,
    env: &'a BTreeMap<String, String>,
    secrets: &'a BTreeMap<String, SecretText>,
    files: &'a [FileSpec],
    mailboxes: &'a [MailboxSpec],
}

/// One fork's own part of a request.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Child {
    /// Its name; without one the request's rule holds.
    #[schema(nullable = false)]
    name: Option<String>,
    /// Labels on top; the same key replaces.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Variables on top; the same name replaces.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Secrets on top; the same name replaces.
    #[serde(default)]
    secrets: BTreeMap<String, SecretText>,
    /// Files on top; the same path replaces.
    #[serde(default)]
    files: Vec<FileSpec>,
    /// Payloads on top; the same mailbox replaces.
    #[serde(default)]
    #[schema(max_items = 16)]
    mailboxes: Vec<MailboxSpec>,
}

/// A file for the fork.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileSpec {
    /// Absolute, in the guest.
    #[schema(example = "/etc/app.toml")]
    path: String,
    /// Its content as text. Either this or `content_base64`.
    #[schema(nullable = false)]
    content: Option<SecretText>,
    /// Its content.
    #[schema(nullable = false)]
    content_base64: Option<SecretText>,
    /// Permission bits in octal digits.
    #[serde(default = "default_mode")]
    #[schema(example = "0644", default = "0644")]
    mode: String,
}

fn default_mode() -> String {
    "0644".into()
}

/// A payload for one mailbox of the template.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MailboxSpec {
    /// The mailbox's name, `[A-Za-z0-9._:-]{1,64}`; each at most once in a request.
    #[schema(example = "app:config")]
    name: String,
    /// The token that it was planted with, if it was (1 to 128 bytes). It must match exactly.
    #[schema(nullable = false)]
    token: Option<SecretText>,
    /// A JSON object of at most the mailbox's capacity, as text.
    #[schema(value_type = Object)]
    payload: Box<RawValue>,
    /// Whether the fork counts as made only once this mailbox's owner has acknowledged. A fork whose acknowledgement is missing is destroyed
    /// (`ack_timeout`). All are awaited together.
    #[serde(default)]
    wait_for_ack: bool,
    /// How long, in milliseconds; 0 is the default of 5000.
    #[serde(default)]
    #[schema(maximum = 30000)]
    ack_timeout_ms: u64,
}

/// Limits; what is absent is not limited. One that can not be applied is an error.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    /// Most memory of the workload, in bytes.
    #[schema(minimum = 16777216, nullable = false)]
    memory_bytes: Option<u64>,
    /// Most CPU time, in thousandths of a CPU.
    #[schema(minimum = 10, maximum = 1024000, nullable = false)]
    cpu_millis: Option<u64>,
    /// Most processes and threads of the workload.
    #[schema(minimum = 1, maximum = 4194304, nullable = false)]
    pids: Option<u64>,
}

/// The network; docs/network.md has the whole of it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NetworkSpec {
    /// What the card leads to: `none`, `user` or `tap`. Without it, tap if the daemon may, else none.
    #[schema(example = "tap", nullable = false)]
    mode: Option<String>,
    /// Where connections of the fork may go: `allow` (anywhere but the host, other forks and link-local addresses), `deny`, or ranges with commas.
    #[schema(default = "allow")]
    egress: String,
    /// Net that forks share: those of the same name reach each other.
    #[schema(nullable = false)]
    net: Option<String>,
    /// Ports of the host that lead to the fork: `HOST:GUEST` or `HOST:GUEST/udp`.
    publish: Vec<String>,
    /// Most bytes per second in each direction.
    #[schema(minimum = 2048, nullable = false)]
    rate_bytes: Option<u64>,
    /// DNS servers; without them the host's.
    dns: Vec<String>,
    /// How long its acknowledgement is awaited, in milliseconds; 0 is the default of 10000.
    #[schema(maximum = 30000)]
    timeout_ms: u64,
    /// Whether it is awaited at all; else the fork's `network.state` tells.
    #[schema(default = true)]
    wait: bool,
    /// What becomes of a fork whose network is not acknowledged, where nobody waits: `kill` or `keep`.
    #[schema(default = "kill")]
    on_failure: OnFailureSpec,
}

/// What becomes of a fork whose network is not acknowledged.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnFailureSpec {
    /// It is destroyed.
    #[default]
    Kill,
    /// It lives on, and its network stays closed.
    Keep,
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            mode: None,
            egress: "allow".into(),
            net: None,
            publish: Vec::new(),
            rate_bytes: None,
            dns: Vec::new(),
            timeout_ms: 0,
            wait: true,
            on_failure: OnFailureSpec::Kill,
        }
    }
}

/// What forks are made of.
#[derive(Debug)]
pub(crate) enum Source {
    Template(Tag),
    Fork(String),
}

impl CreateForks {
    /// What they are made of.
    pub(crate) fn source(&self) -> Result<Source, Problem> {
        match (&self.template, &self.from) {
            (Some(tag), None) => Ok(Source::Template(parsed("template", Tag::parse(tag))?)),
            (None, Some(fork)) => Ok(Source::Fork(fork.clone())),
            _ => Err(Problem::invalid("template", "give either template or from")),
        }
    }

    fn given(&self) -> Given<'_> {
        Given {
            labels: &self.labels,
            env: &self.env,
            secrets: &self.secrets,
            files: &self.files,
            mailboxes: &self.mailboxes,
        }
    }

    /// One request for each fork. `program` waits for networks that nobody else waits for; `origin` is noted in each fork.
    pub(crate) fn requests(&self, program: &Path, origin: Option<&str>) -> Result<Vec<ForkRequest>, Problem> {
        let count = match (self.count, self.children.len()) {
            (None, 0) => 1,
            (None, children) => children,
            (Some(count), 0) => count,
            (Some(count), children) if count == children => count,
            (Some(count), children) => {
                let detail = format!("{children} children were given, and count is {count}; leave one of them out");
                return Err(Problem::invalid("count", detail));
            }
        };
        if !(1..=MAX_FORKS).contains(&count) {
            return Err(Problem::invalid("count", format!("a request is for 1 to {MAX_FORKS} forks, not {count}")));
        }
        let name = self.name.as_deref().map(|name| parsed("name", ForkName::parse(name))).transpose()?;
        let network = self.network.to_request(program, count)?;
        let mut common = ForkRequest {
            count,
            name,
            limits: LimitRequest {
                memory: self.limits.memory_bytes,
                cpu_millis: self.limits.cpu_millis,
                pids: self.limits.pids,
            },
            network,
            origin: origin.map(str::to_owned),
            ..ForkRequest::default()
        };
        self.given().add_to(&mut common, "")?;
        if self.children.is_empty() {
            return Ok(vec![common]);
        }
        let child = |(index, child): (usize, &Child)| {
            let at = format!("children[{index}].");
            let own = child.name.as_deref().map(|name| parsed(&format!("{at}name"), ForkName::parse(name)));
            let name = own.transpose()?.or_else(|| common.name_of(index));
            let mut request = ForkRequest { count: 1, name, ..common.clone() };
            child.given().add_to(&mut request, &at)?;
            Ok(request)
        };
        self.children.iter().enumerate().map(child).collect()
    }
}

impl Child {
    /// Whether a field is one that each child may have of its own.
    pub(crate) fn has(field: &str) -> bool {
        ["name", "labels", "env", "secrets", "files", "mailboxes"].contains(&field)
    }

    fn given(&self) -> Given<'_> {
        Given {
            labels: &self.labels,
            env: &self.env,
            secrets: &self.secrets,
            files: &self.files,
            mailboxes: &self.mailboxes,
        }
    }
}

impl Given<'_> {
    fn add_to(&self, request: &mut ForkRequest, at: &str) -> Result<(), Problem> {
        request.labels.extend(self.labels.clone());
        for (name, value) in self.env {
            let name = parsed(&format!("{at}env"), EnvName::parse(name))?;
            request.env.insert(name, value.clone());
        }
        for (name, value) in self.secrets {
            let name = parsed(&format!("{at}secrets"), SecretName::parse(name))?;
            request.secrets.insert(name, value.0.clone());
        }
        for (index, file) in self.files.iter().enumerate() {
            let (content, mode) = file.read(&format!("{at}files[{index}]"))?;
            request.files.insert(file.path.clone(), (content, mode));
        }
        for (index, mailbox) in self.mailboxes.iter().enumerate() {
            let name = parsed(&format!("{at}mailboxes[{index}].name"), MailboxName::parse(&mailbox.name))?;
            // A child's own replaces the one of all; twice in one list is an error that the library finds.
            let own = !at.is_empty();
            let new = MailboxRequest {
                name: name.clone(),
                token: mailbox.token.clone().map(|token| token.0),
                payload: Secret::new(mailbox.payload.get().as_bytes().to_vec()),
                wait_ack: mailbox.wait_for_ack,
                ack_timeout: Duration::from_millis(mailbox.ack_timeout_ms),
            };
            let twice = self.mailboxes[..index].iter().any(|other| other.name == mailbox.name);
            match request.mailboxes.iter_mut().find(|other| own && !twice && other.name == name) {
                Some(other) => *other = new,
                None => request.mailboxes.push(new),
            }
        }
        Ok(())
    }
}

impl FileSpec {
    fn read(&self, at: &str) -> Result<(Secret, u32), Problem> {
        let content = match (&self.content, &self.content_base64) {
            (Some(text), None) => text.0.clone(),
            (None, Some(text)) => {
                let bytes = STANDARD.decode(text.0.expose());
                Secret::new(bytes.map_err(|_| Problem::invalid(format!("{at}.content_base64"), "it is no base64"))?)
            }
            _ => return Err(Problem::invalid(at, "give either content or content_base64")),
        };
        let octal = self.mode.len() <= 5 && self.mode.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        let mode = u32::from_str_radix(&self.mode, 8).ok().filter(|mode| octal && *mode <= 0o7777);
        let mode = mode.ok_or_else(|| Problem::invalid(format!("{at}.mode"), "a mode is octal digits up to 7777"))?;
        Ok((content, mode))
    }
}

impl NetworkSpec {
    fn to_request(&self, program: &Path, count: usize) -> Result<NetworkRequest, Problem> {
        let at = |field: &str| format!("network.{field}");
        let mode = self.mode.as_deref().map(|mode| parsed(&at("mode"), mode.parse::<Mode>())).transpose()?;
        let policy = Policy {
            egress: parsed(&at("egress"), self.egress.parse())?,
            net: self.net.as_deref().map(|net| parsed(&at("net"), net.parse())).transpose()?,
            forwards: self.publish.iter().map(|port| parsed(&at("publish"), port.parse())).collect::<Result<_, _>>()?,
            rate: self.rate_bytes.map(|rate| parsed(&at("rate_bytes"), Rate::new(rate))).transpose()?,
        };
        parsed("network", policy.check())?;
        if count > 1 && !policy.forwards.is_empty() {
            return Err(Problem::invalid(at("publish"), "one port of the host can not lead to several forks"));
        }
        let dns = self.dns.iter().map(|dns| parsed(&at("dns"), dns.parse())).collect::<Result<Vec<_>, _>>()?;
        let on_failure = match self.on_failure {
            OnFailureSpec::Kill => OnFailure::Kill,
            OnFailureSpec::Keep => OnFailure::Keep,
        };
        Ok(NetworkRequest {
            mode,
            policy,
            dns: (!dns.is_empty()).then_some(dns),
            timeout: Duration::from_millis(self.timeout_ms),
            later: (!self.wait).then(|| Later { on_failure, program: program.to_owned() }),
        })
    }
}

fn parsed<T, E: fmt::Display>(field: &str, result: Result<T, E>) -> Result<T, Problem> {
    result.map_err(|error| Problem::invalid(field, error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn requests(body: &str) -> Result<Vec<ForkRequest>, Problem> {
        crate::extract::parse::<CreateForks>(body.as_bytes())?.requests(Path::new("/p"), None)
    }

    #[test]
    fn children_have_what_all_have_and_their_own() {
        let made = requests(
            r#"{"template": "py", "name": "w", "env": {"A": "1", "B": "1"}, "children": [
                {"env": {"B": "2"}, "secrets": {"S": "x"}}, {"name": "other"}],
                "mailboxes": [{"name": "m", "payload": {"x":  1}}]}"#,
        )
        .unwrap();
        let [one, two] = made.as_slice() else { panic!("not two") };
        assert_eq!((one.name.as_ref().unwrap().as_str(), two.name.as_ref().unwrap().as_str()), ("w-1", "other"));
        assert_eq!(one.env.values().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!((one.secrets.len(), two.secrets.len(), two.count), (1, 0, 1));
        assert_eq!(two.mailboxes[0].payload.expose(), b"{\"x\":  1}");
    }

    #[test]
    fn o5_what_is_wrong_is_named_by_its_field() {
        for (body, field) in [
            (r#"{"template": "../x"}"#, ""),
            (r#"{"template": "py", "name": "No"}"#, "name"),
            (r#"{"template": "py", "children": [{}, {"env": {"a b": ""}}]}"#, "children[1].env"),
            (r#"{"template": "py", "files": [{"path": "/a"}]}"#, "files[0]"),
            (r#"{"template": "py", "files": [{"path": "/a", "content": "", "mode": "9"}]}"#, "files[0].mode"),
            (r#"{"template": "py", "network": {"egress": "maybe"}}"#, "network.egress"),
            (r#"{"template": "py", "count": 3, "children": [{}]}"#, "count"),
            (r#"{"template": "py", "count": 1001}"#, "count"),
        ] {
            let create = crate::extract::parse::<CreateForks>(body.as_bytes()).unwrap();
            let problem = create.source().and_then(|_| create.requests(Path::new("/p"), None)).unwrap_err();
            let text = serde_json::to_string(&problem).unwrap();
            let wanted = if field.is_empty() { "template" } else { field };
            assert!(text.contains(&format!(r#""field":"{wanted}""#)), "{text}");
        }
    }
}
