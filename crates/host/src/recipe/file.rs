//! `recipe.toml` as it is written.

use std::{collections::BTreeMap, num::NonZeroU16, ops::Range};

use serde::Deserialize;
use toml::Spanned;

use super::expected::IdentityToml;
use super::values::{
    Command, Cpus, Env, FileMode, GuestPath, MemoryLimit, Name, Package, Pids, Seconds, Signal, Size, Suite, Text,
    User, Vcpus,
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecipeToml {
    pub(super) name: Name,
    pub(super) description: Option<Text>,
    pub(super) memory: Option<Size>,
    pub(super) vcpus: Option<Vcpus>,
    pub(super) network: Option<bool>,
    pub(super) rootfs: Spanned<RootToml>,
    #[serde(default)]
    pub(super) files: Vec<Spanned<FileToml>>,
    pub(super) env: Option<Env>,
    pub(super) runtime: Option<RuntimeToml>,
    #[serde(default)]
    pub(super) services: Vec<Spanned<ServiceToml>>,
    pub(super) identity: Option<Spanned<IdentityToml>>,
    pub(super) probes: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RootKind {
    Debian,
    Busybox,
    Directory,
    Tar,
    Oci,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RootToml {
    pub(super) kind: RootKind,
    pub(super) suite: Option<Suite>,
    pub(super) packages: Option<Vec<Package>>,
    pub(super) path: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileToml {
    pub(super) path: GuestPath,
    pub(super) source: Option<Text>,
    pub(super) content: Option<String>,
    pub(super) mode: Option<FileMode>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RuntimeRestart {
    #[default]
    Never,
    OnFailure,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ServiceRestart {
    #[default]
    Never,
    OnFailure,
    Always,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuntimeToml {
    pub(super) command: Command,
    pub(super) env: Option<Env>,
    pub(super) workdir: Option<GuestPath>,
    pub(super) user: Option<User>,
    #[serde(default)]
    pub(super) restart: RuntimeRestart,
    pub(super) ready_timeout_s: Option<Seconds>,
    pub(super) event_timeout_s: Option<Seconds>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum HookWhen {
    BeforeThaw,
    AfterThaw,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnFork {
    #[default]
    Keep,
    Restart,
    Event,
    Signal,
    Hook,
    Wait,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceToml {
    pub(super) name: Name,
    pub(super) command: Command,
    pub(super) env: Option<Env>,
    pub(super) workdir: Option<GuestPath>,
    pub(super) user: Option<User>,
    #[serde(default)]
    pub(super) on_fork: OnFork,
    pub(super) signal: Option<Signal>,
    pub(super) hook: Option<Command>,
    pub(super) hook_when: Option<HookWhen>,
    pub(super) awaited: Option<bool>,
    pub(super) ready_line: Option<Text>,
    pub(super) ready_port: Option<u16>,
    pub(super) ready_cdp: Option<NonZeroU16>,
    pub(super) ready_http: Option<Text>,
    pub(super) ready_text: Option<Text>,
    #[serde(default)]
    pub(super) restart: ServiceRestart,
    pub(super) timeout_s: Option<Seconds>,
    pub(super) limits: Option<LimitsToml>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsToml {
    pub(super) memory: Option<MemoryLimit>,
    pub(super) pids: Option<Pids>,
    pub(super) cpu: Option<Cpus>,
}

/// The line, counted from 1, on which a span begins.
pub(super) fn line(text: &str, span: &Range<usize>) -> usize {
    text.as_bytes().iter().take(span.start).filter(|byte| **byte == b'\n').count() + 1
}
