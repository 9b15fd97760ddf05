//! What is told of templates and forks.

use std::{collections::BTreeMap, num::NonZeroU16, path::Path};

use engine::EngineInfo;
use host::{ForkRecord, branch, forks, network, record::StepTime};
use serde::Serialize;
use store::Manifest;
use utoipa::ToSchema;

/// What runs a machine.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Engine {
    /// `qemu` or `kvm`.
    name: String,
    /// Its version.
    version: String,
    /// What executes the guest: `kvm` or `tcg`.
    accel: String,
}

impl From<&EngineInfo> for Engine {
    fn from(info: &EngineInfo) -> Self {
        Self { name: info.name.to_string(), version: info.version.clone(), accel: info.accel.to_string() }
    }
}

/// A process of a template.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FoundProcess {
    /// Its id in the guest.
    pid: u32,
    /// Its command's name, as it chose it.
    #[schema(example = "nginx")]
    name: String,
    /// The recipe's service that it belongs to, or `runtime`; null for what neither is.
    service: Option<String>,
}

/// Something in a template that all its forks would share, or that none of them has. It never holds the value of a secret.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Finding {
    /// What it is; stable.
    #[schema(example = "tcp_connection")]
    kind: String,
    /// Whose it is; null where it is about no process.
    process: Option<FoundProcess>,
    /// What the process does, to be read behind its name.
    reason: String,
    /// What to do about it.
    cure: String,
}

impl From<&store::Finding> for Finding {
    fn from(finding: &store::Finding) -> Self {
        let process = finding.process.as_ref().map(|process| FoundProcess {
            pid: process.pid,
            name: process.name.clone(),
            service: process.service.clone(),
        });
        Self { kind: finding.kind.clone(), process, reason: finding.reason.clone(), cure: finding.cure.clone() }
    }
}

/// A template.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Template {
    /// Its tag.
    tag: String,
    /// Its id: a tag can be built anew, an id can not.
    id: String,
    /// The recipe it was built from.
    recipe: String,
    /// What runs it.
    engine: Engine,
    /// Guest memory in bytes.
    memory_bytes: u64,
    /// Virtual CPUs.
    vcpus: u32,
    /// Whether it has a network card.
    network: bool,
    /// Version of the guest's kernel.
    kernel: String,
    /// Bytes on disk.
    disk_bytes: u64,
    /// When it was built, in milliseconds since the epoch.
    created_ms: u64,
    /// What the build took.
    build_ms: u64,
    /// What was noticed at the capture, a line of text each; the findings are among it.
    warnings: Vec<String>,
    /// What the audit at the capture found, at most 64…
    findings: Vec<Finding>,
    /// …and how many more there were.
    findings_left_out: u32,
}

impl Template {
    pub(crate) fn new(manifest: &Manifest, disk_bytes: u64) -> Self {
        Self {
            tag: manifest.tag.to_string(),
            id: manifest.id.clone(),
            recipe: manifest.recipe.clone(),
            engine: (&manifest.engine).into(),
            memory_bytes: manifest.machine.memory_bytes,
            vcpus: manifest.machine.vcpus,
            network: manifest.machine.network,
            kernel: manifest.kernel.clone(),
            disk_bytes,
            created_ms: manifest.created_ms,
            build_ms: manifest.build_millis,
            warnings: manifest.warnings.clone(),
            findings: manifest.findings.iter().map(Finding::from).collect(),
            findings_left_out: manifest.findings_left_out,
        }
    }
}

/// All templates.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Templates {
    /// Those that can be forked.
    pub(crate) templates: Vec<Template>,
    /// Those that can not be used, and why.
    pub(crate) broken: Vec<crate::problem::Problem>,
}

/// A mailbox that a fork request can address.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Mailbox {
    /// Its name.
    name: String,
    /// Most bytes of a payload.
    capacity: usize,
    /// Who planted it: `socket` (the agent, for a program of the guest) or `self` (a program by itself).
    planted_by: String,
    /// Whether a request must have its token.
    needs_token: bool,
}

/// A mailbox that can not be addressed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AmbiguousMailbox {
    /// Its name.
    name: String,
    /// Why.
    reason: String,
}

/// The mailboxes of a template.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Mailboxes {
    /// Those that can be addressed.
    mailboxes: Vec<Mailbox>,
    /// Those that can not.
    ambiguous: Vec<AmbiguousMailbox>,
}

impl Mailboxes {
    pub(crate) fn new(manifest: &Manifest) -> Self {
        let planted_by = |by| match by {
            memory::PlantedBy::Agent => "agent",
            memory::PlantedBy::Socket => "socket",
            memory::PlantedBy::SelfPlanted => "self",
        };
        let mailboxes = manifest.mailboxes.iter().filter(|mailbox| !mailbox.name.is_reserved());
        Self {
            mailboxes: mailboxes
                .map(|mailbox| Mailbox {
                    name: mailbox.name.to_string(),
                    capacity: mailbox.capacity,
                    planted_by: planted_by(mailbox.planted_by).into(),
                    needs_token: !mailbox.token.is_empty(),
                })
                .collect(),
            ambiguous: manifest
                .ambiguous
                .iter()
                .map(|mailbox| AmbiguousMailbox { name: mailbox.name.to_string(), reason: mailbox.reason.clone() })
                .collect(),
        }
    }
}

/// Where a fork is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, serde::Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Its machine runs.
    Running,
    /// It is on disk, and comes back by `resume`.
    Standby,
    /// Its machine has ended by itself, or was ended from outside.
    Dead,
}

impl State {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Standby => "standby",
            Self::Dead => "dead",
        }
    }
}

/// One step and how long it took.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Step {
    /// The step.
    step: String,
    /// What was really done, where that can differ: `credited+reseeded`.
    outcome: String,
    /// Microseconds.
    micros: u64,
}

impl From<&StepTime> for Step {
    fn from(step: &StepTime) -> Self {
        Self { step: step.step.clone(), outcome: step.outcome.clone(), micros: step.micros }
    }
}

/// How long the source of forks was held up, in microseconds.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Pause {
    /// From the request to its ack after the thaw.
    asked_micros: u64,
    /// Of this, from the freeze of its workload on: nothing of it ran.
    frozen_micros: u64,
    /// Of this, the time in which its virtual CPUs stood still.
    stopped_micros: u64,
    /// Bytes of memory that it had for itself.
    dirty_bytes: u64,
    /// Bytes that were written for its children.
    written_bytes: u64,
    /// What took how long.
    steps: Vec<Step>,
}

impl From<&branch::Pause> for Pause {
    fn from(pause: &branch::Pause) -> Self {
        Self {
            asked_micros: pause.asked_micros,
            frozen_micros: pause.frozen_micros,
            stopped_micros: pause.stopped_micros,
            dirty_bytes: pause.dirty_bytes,
            written_bytes: pause.written_bytes,
            steps: pause.steps.iter().map(Step::from).collect(),
        }
    }
}

/// A mailbox of a fork that was written to.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct MailboxReport {
    /// The mailbox.
    name: String,
    /// Whether it acknowledged; only known if that was asked for.
    acknowledged: Option<bool>,
}

/// What is known of a fork that is on disk.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Standby {
    /// Since when, in milliseconds since the epoch.
    since_ms: u64,
    /// Bytes of memory that it had for itself.
    dirty_bytes: u64,
    /// Bytes on disk.
    disk_bytes: u64,
    /// How long nothing of it ran before it was on disk, in microseconds.
    captured_micros: u64,
}

/// A fork's network.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Network {
    /// `user` or `tap`.
    mode: String,
    /// The card's address.
    mac: String,
    /// IPv4 address.
    ipv4: Option<String>,
    /// IPv6 address.
    ipv6: Option<String>,
    /// IPv4 gateway.
    gateway: Option<String>,
    /// DNS servers.
    dns: Vec<String>,
    /// `acknowledged` (it is open), `waiting` or `failed` (nothing passes).
    #[schema(value_type = String)]
    state: network::NetworkState,
    /// How it came to be acknowledged: `channel`, `datagram`, `reconfigured` or `commands`.
    #[schema(value_type = Option<String>)]
    way: Option<network::Way>,
    /// What went wrong on the way there.
    troubles: Vec<String>,
}

/// A fork, as lists show it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Summary {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Where it is in its life.
    pub(crate) state: State,
    /// The template it came from.
    template: String,
    /// That template's id.
    template_id: String,
    /// When its identity was acknowledged, in milliseconds since the epoch.
    created_ms: u64,
    /// Labels.
    labels: BTreeMap<String, String>,
    /// IPv4 address, where it has a network that the host knows of.
    ipv4: Option<String>,
}

impl Summary {
    pub(crate) fn new(record: &ForkRecord, state: State) -> Self {
        Self {
            id: record.id.to_string(),
            name: record.name.to_string(),
            state,
            template: record.template.to_string(),
            template_id: record.template_id.clone(),
            created_ms: record.created_ms,
            labels: record.labels.clone(),
            ipv4: record.network.as_ref().and_then(|network| Some(network.ipv4?.to_string())),
        }
    }
}

/// A fork, with the report of what it was given and what was really done. No secret is in it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Fork {
    #[serde(flatten)]
    summary: Summary,
    /// Its host name.
    hostname: String,
    /// What runs it.
    engine: Engine,
    /// The fork that it was forked from, if that was a fork.
    source: Option<String>,
    /// What is known of its standby.
    standby: Option<Standby>,
    /// Its machine's process.
    pid: Option<u32>,
    /// `/etc/machine-id`.
    machine_id: String,
    /// Kernel boot id that it shows.
    boot_id: String,
    /// Names of the variables given.
    env: Vec<String>,
    /// Names of the secrets given.
    secrets: Vec<String>,
    /// Paths of the files given.
    files: Vec<String>,
    /// Mailboxes written to.
    mailboxes: Vec<MailboxReport>,
    /// Its network; none without.
    network: Option<Network>,
    /// The port at which its browser answers DevTools, if its recipe names one: reached by the route of its ports.
    devtools_port: Option<u16>,
    /// Limits that hold.
    limits: BTreeMap<String, u64>,
    /// From the request to the acknowledged identity, in microseconds.
    acked_micros: u64,
    /// The host's steps.
    host_steps: Vec<Step>,
    /// The guest's steps, as it reported them.
    guest_steps: Vec<Step>,
    /// Bytes of memory that it has for itself; only where one fork is asked for.
    private_bytes: Option<u64>,
    /// Bytes of memory that it shares with others; only where one fork is asked for.
    shared_bytes: Option<u64>,
}

impl Fork {
    /// With its memory, if it has any: the kernel takes a millisecond or two to count it.
    pub(crate) fn with_memory(record: &ForkRecord, state: State, dir: &Path) -> Self {
        let memory = (state == State::Running).then(|| forks::memory_of(record)).flatten();
        let (private_bytes, shared_bytes) = memory.unzip();
        Self { private_bytes, shared_bytes, ..Self::new(record, state, dir) }
    }

    /// `dir` is the fork's.
    pub(crate) fn new(record: &ForkRecord, state: State, dir: &Path) -> Self {
        let network = network::now(record, dir).map(|now| Network {
            mode: now.mode.to_string(),
            mac: now.mac,
            ipv4: now.ipv4.map(|address| address.to_string()),
            ipv6: now.ipv6.map(|address| address.to_string()),
            gateway: now.gateway.map(|address| address.to_string()),
            dns: now.dns.iter().map(ToString::to_string).collect(),
            state: now.state,
            way: now.way,
            troubles: now.troubles,
        });
        Self {
            summary: Summary::new(record, state),
            hostname: record.hostname.to_string(),
            engine: (&record.engine).into(),
            source: record.source.as_ref().map(ToString::to_string),
            standby: record.standby.as_ref().map(|standby| Standby {
                since_ms: standby.since_ms,
                dirty_bytes: standby.dirty_bytes,
                disk_bytes: standby.disk_bytes,
                captured_micros: standby.captured_micros,
            }),
            pid: (state == State::Running).then_some(record.process.pid),
            machine_id: record.machine_id.clone(),
            boot_id: record.boot_id.clone(),
            env: record.env.clone(),
            secrets: record.secrets.clone(),
            files: record.files.clone(),
            mailboxes: record
                .mailboxes
                .iter()
                .map(|mailbox| MailboxReport { name: mailbox.name.clone(), acknowledged: mailbox.acknowledged })
                .collect(),
            network,
            devtools_port: record.devtools_port.map(NonZeroU16::get),
            limits: record.limits.clone(),
            acked_micros: record.acked_micros,
            host_steps: record.host_steps.iter().map(Step::from).collect(),
            guest_steps: record.guest_steps.iter().map(Step::from).collect(),
            private_bytes: None,
            shared_bytes: None,
        }
    }
}
