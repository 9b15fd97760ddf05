//! What the recipe wants, parsed from the host's request: inside, only valid values exist.

use std::{collections::BTreeMap, time::Duration};

pub(crate) use guest_api::RUNTIME;
use guest_api::proto;
use identity::Limits;
use rustix::process::Signal;
use thiserror::Error;

use super::readiness::{Http, Readiness};

const MAX_SERVICES: usize = 32;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const DEFAULT_EVENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Nothing a recipe asks for may take longer.
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// A service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) workdir: String,
    pub(crate) user: String,
    pub(crate) in_template: bool,
    pub(crate) on_fork: OnFork,
    pub(crate) ready_line: String,
    pub(crate) readiness: Option<Readiness>,
    pub(crate) restart: Restart,
    pub(crate) timeout: Duration,
    /// Whether a fork's ack waits until it is ready.
    pub(crate) awaited: bool,
    /// What it and all that it starts may use together.
    pub(crate) limits: Limits,
}

/// What a service that ran in the template needs in a fork.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OnFork {
    Keep,
    Restart,
    Signal(String, Signal),
    Hook { command: Vec<String>, before_thaw: bool },
    Event,
}

/// When a process that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restart {
    Never,
    OnFailure,
    Always,
}

impl Restart {
    pub(crate) fn applies(self, success: bool) -> bool {
        match self {
            Self::Never => false,
            Self::OnFailure => !success,
            Self::Always => true,
        }
    }
}

/// The warmed runtime.
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    pub(crate) command: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) workdir: String,
    pub(crate) user: String,
    pub(crate) restart: Restart,
    pub(crate) ready_timeout: Duration,
    pub(crate) event_timeout: Duration,
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the recipe's {what} is not valid: {rule}")]
pub struct SpecError {
    /// Which part.
    what: String,
    /// Its rule.
    rule: &'static str,
}

fn refuse<T>(what: impl Into<String>, rule: &'static str) -> Result<T, SpecError> {
    Err(SpecError { what: what.into(), rule })
}

pub(crate) fn services(services: Vec<proto::Service>) -> Result<Vec<Service>, SpecError> {
    if services.len() > MAX_SERVICES {
        return refuse("list of services", "at most 32");
    }
    let mut names = std::collections::BTreeSet::new();
    services
        .into_iter()
        .map(|service| {
            let service = Service::parse(service)?;
            if !names.insert(service.name.clone()) {
                return refuse(format!("service {}", service.name), "its name must be its own");
            }
            Ok(service)
        })
        .collect()
}

impl Service {
    fn parse(service: proto::Service) -> Result<Self, SpecError> {
        let on_fork = service.on_fork();
        let name = service.name;
        let valid = (1..=32).contains(&name.len())
            && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && name != RUNTIME;
        if !valid {
            return refuse("service name", "1 to 32 lower-case letters, digits or '-', and not \"runtime\"");
        }
        let what = |field: &str| format!("{field} of service {name}");
        let command = command(service.command, || what("command"))?;
        let on_fork = match on_fork {
            proto::OnFork::Keep => OnFork::Keep,
            proto::OnFork::Restart => OnFork::Restart,
            proto::OnFork::Signal => match signal(&service.signal) {
                Some(signal) => OnFork::Signal(service.signal, signal),
                None => return refuse(what("signal"), "HUP, INT, QUIT, USR1, USR2, TERM, ALRM, CONT or WINCH"),
            },
            proto::OnFork::Hook => OnFork::Hook {
                command: self::command(service.hook, || what("hook"))?,
                before_thaw: service.hook_before_thaw,
            },
            proto::OnFork::Event => OnFork::Event,
        };
        let readiness = readiness(service.ready_port, service.ready_http, service.ready_text, || what("readiness"))?;
        Ok(Self {
            command,
            env: service.env.into_iter().collect(),
            workdir: service.workdir,
            user: service.user,
            in_template: service.start_in_template,
            on_fork,
            ready_line: service.ready_line,
            readiness,
            restart: restart(&service.restart, || what("restart"))?,
            timeout: timeout(service.timeout_ms, DEFAULT_TIMEOUT),
            awaited: !service.not_awaited,
            limits: limits(service.limits.unwrap_or_default()),
            name,
        })
    }
}

impl Runtime {
    pub(crate) fn parse(runtime: proto::Runtime) -> Result<Self, SpecError> {
        let restart = restart(&runtime.restart, || "restart of the runtime".to_owned())?;
        if restart == Restart::Always {
            return refuse("restart of the runtime", "never or on-failure");
        }
        Ok(Self {
            command: command(runtime.command, || "command of the runtime".to_owned())?,
            env: runtime.env.into_iter().collect(),
            workdir: runtime.workdir,
            user: runtime.user,
            restart,
            ready_timeout: timeout(runtime.ready_timeout_ms, DEFAULT_TIMEOUT),
            event_timeout: timeout(runtime.event_timeout_ms, DEFAULT_EVENT_TIMEOUT),
        })
    }
}

fn command(command: Vec<String>, what: impl Fn() -> String) -> Result<Vec<String>, SpecError> {
    if command.first().is_none_or(String::is_empty) { refuse(what(), "at least one word") } else { Ok(command) }
}

fn readiness(port: u32, path: String, text: String, what: impl Fn() -> String) -> Result<Option<Readiness>, SpecError> {
    let Ok(port) = u16::try_from(port) else { return refuse(what(), "a port up to 65535") };
    if !path.is_empty() && (!path.starts_with('/') || path.bytes().any(|byte| !byte.is_ascii_graphic())) {
        return refuse(what(), "a path that begins with / and has neither blanks nor control characters");
    }
    match (port, path.is_empty(), text.is_empty()) {
        (0, true, true) => Ok(None),
        (0, ..) | (_, true, false) => refuse(what(), "a path needs a port, and a text needs a path"),
        (port, true, true) => Ok(Some(Readiness { port, http: None })),
        (port, false, _) => Ok(Some(Readiness { port, http: Some(Http { path, text }) })),
    }
}

fn restart(text: &str, what: impl Fn() -> String) -> Result<Restart, SpecError> {
    match text {
        "" | "never" => Ok(Restart::Never),
        "on-failure" => Ok(Restart::OnFailure),
        "always" => Ok(Restart::Always),
        _ => refuse(what(), "never, on-failure or always"),
    }
}

/// 0 is none.
fn limits(limits: proto::Limits) -> Limits {
    let some = |number: u64| (number > 0).then_some(number);
    Limits { pids: some(limits.pids), memory: some(limits.memory), cpu_millis: some(limits.cpu_millis) }
}

/// 0 is the default.
pub(crate) fn timeout(ms: u32, default: Duration) -> Duration {
    if ms == 0 { default } else { Duration::from_millis(ms.into()).min(MAX_TIMEOUT) }
}

fn signal(name: &str) -> Option<Signal> {
    Some(match name {
        "HUP" => Signal::HUP,
        "INT" => Signal::INT,
        "QUIT" => Signal::QUIT,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "TERM" => Signal::TERM,
        "ALRM" => Signal::ALARM,
        "CONT" => Signal::CONT,
        "WINCH" => Signal::WINCH,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_a_recipe_may_name_is_known() {
        for name in guest_api::SIGNALS {
            assert!(signal(name).is_some(), "{name}");
        }
        assert_eq!(signal("PWR"), None);
    }
}
