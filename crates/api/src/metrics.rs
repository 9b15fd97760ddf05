//! Figures for Prometheus.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64},
    },
    time::{Duration, Instant},
};

use host::{
    ForkRecord,
    fork::ForkError,
    forks,
    handoff::network::NetworkError,
    network::{self, NetworkReport, NetworkState, Way},
    pool::{self, Pool},
};
use identity::ForkId;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::{model::view::State, watch::Forks};

/// Asking each fork for its memory costs some ten microseconds; a scraper that asks more often gets the last answer.
const MEMORY_EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfEngine {
    engine: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStep {
    engine: String,
    side: String,
    step: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCode {
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPool {
    template: String,
    network: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfAck {
    mode: String,
    way: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    method: String,
    route: String,
    status: u16,
}

/// The steps of a guest (the agent's `keeper`). What a guest says beyond these is `other`: their names are its own, and each would be a histogram
/// for ever.
const GUEST_STEPS: [&str; 17] = [
    "boot-id",
    "clock",
    "document",
    "entropy",
    "environment",
    "files",
    "fork-marks",
    "hostname",
    "identity-dir",
    "limits",
    "machine-id",
    "network",
    "resolv-conf",
    "runtime-memory",
    "secrets",
    "ssh-host-keys",
    "thaw",
];

/// A millisecond to half a minute, each twice the one before.
fn seconds() -> Histogram {
    Histogram::new((0..16).map(|power| f64::from(1 << power) / 1000.0))
}

/// All figures.
pub(crate) struct Metrics {
    registry: Registry,
    forks: Family<OfState, Gauge<i64, AtomicI64>>,
    made: Family<OfEngine, Counter<u64, AtomicU64>>,
    fork_seconds: Family<OfEngine, Histogram, fn() -> Histogram>,
    step_seconds: Family<OfStep, Histogram, fn() -> Histogram>,
    failures: Family<OfCode, Counter<u64, AtomicU64>>,
    ack_failures: Family<OfCode, Counter<u64, AtomicU64>>,
    network_acks: Family<OfAck, Counter<u64, AtomicU64>>,
    networks: Family<OfState, Gauge<i64, AtomicI64>>,
    pool_ready: Family<OfPool, Gauge<i64, AtomicI64>>,
    pool_size: Family<OfPool, Gauge<i64, AtomicI64>>,
    memory: Family<OfKind, Gauge<i64, AtomicI64>>,
    requests: Family<OfRequest, Counter<u64, AtomicU64>>,
    request_seconds: Family<OfRequest, Histogram, fn() -> Histogram>,
    memory_asked: Mutex<Option<Instant>>,
    /// Forks whose network was not acknowledged yet when they were made: somebody else waits for it.
    waiting: Mutex<HashSet<ForkId>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("offshoot");
        macro_rules! family {
            ($name:literal, $help:literal $(, $unit:expr)?) => {{
                let family = Family::default();
                family!(@register registry, $name, $help, family.clone() $(, $unit)?);
                family
            }};
            (seconds $name:literal, $help:literal) => {{
                let family = Family::new_with_constructor(seconds as fn() -> Histogram);
                registry.register_with_unit($name, $help, Unit::Seconds, family.clone());
                family
            }};
            (@register $registry:ident, $name:literal, $help:literal, $family:expr) => {
                $registry.register($name, $help, $family)
            };
            (@register $registry:ident, $name:literal, $help:literal, $family:expr, $unit:expr) => {
                $registry.register_with_unit($name, $help, $unit, $family)
            };
        }
        let forks = family!("forks", "Forks by state");
        let made = family!("forks_made", "Forks made by this daemon");
        let fork_seconds = family!(seconds "fork_duration", "From the request to the acknowledged identity");
        let step_seconds = family!(seconds "fork_step_duration", "Steps of a fork, of the host and of the guest");
        let failures = family!("fork_failures", "Forks that could not be made");
        let ack_failures = family!("ack_failures", "Forks destroyed because an acknowledgement was missing or refused");
        let network_acks = family!("network_acks", "Networks of forks of this daemon that were acknowledged, and how");
        let networks = family!("networks", "Networks of running forks by state");
        let pool_ready = family!("pool_ready", "Spare machines that are ready");
        let pool_size = family!("pool_size", "Spare machines that a template is to have");
        let memory = family!("forks_memory", "Memory of all running forks", Unit::Bytes);
        let requests = family!("http_requests", "Requests answered");
        let request_seconds = family!(seconds "http_request_duration", "From a request's head to its answer's head");
        Self {
            registry,
            forks,
            made,
            fork_seconds,
            step_seconds,
            failures,
            ack_failures,
            network_acks,
            networks,
            pool_ready,
            pool_size,
            memory,
            requests,
            request_seconds,
            memory_asked: Mutex::default(),
            waiting: Mutex::default(),
        }
    }

    /// A fork was made.
    pub(crate) fn made(&self, record: &ForkRecord) {
        let engine = format!("{}-{}", record.engine.name, record.engine.accel);
        let of_engine = OfEngine { engine: engine.clone() };
        self.made.get_or_create(&of_engine).inc();
        self.fork_seconds.get_or_create(&of_engine).observe(in_seconds(record.acked_micros));
        for (side, steps) in [("host", &record.host_steps), ("guest", &record.guest_steps)] {
            for step in steps {
                let name = step.step.as_str();
                let name = if side == "host" || GUEST_STEPS.contains(&name) { name } else { "other" };
                let of_step = OfStep { engine: engine.clone(), side: side.into(), step: name.into() };
                self.step_seconds.get_or_create(&of_step).observe(in_seconds(step.micros));
            }
        }
        match &record.network {
            Some(report) if report.state == NetworkState::Waiting => {
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(record.id.clone());
            }
            Some(report) => self.network_acknowledged(report),
            None => {}
        }
    }

    /// Counts how a network came to be acknowledged, if it was.
    fn network_acknowledged(&self, report: &NetworkReport) {
        let way = match (report.state, report.way) {
            (NetworkState::Acknowledged, Some(way)) => way,
            _ => return,
        };
        let way = match way {
            Way::Channel => "channel",
            Way::Datagram => "datagram",
            Way::Reconfigured => "reconfigured",
            Way::Commands => "commands",
        };
        self.network_acks.get_or_create(&OfAck { mode: report.mode.to_string(), way }).inc();
    }

    /// The networks of the forks that run, as they are now.
    fn look_at_networks(&self, home: &host::Home, running: &[&ForkRecord]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut still: HashSet<ForkId> = HashSet::new();
        let mut counts = [(NetworkState::Acknowledged, 0), (NetworkState::Waiting, 0), (NetworkState::Failed, 0)];
        for record in running {
            let Some(report) = network::now(record, &forks::dir(home, record)) else { continue };
            counts.iter_mut().filter(|(state, _)| *state == report.state).for_each(|(_, count)| *count += 1);
            match (waiting.contains(&record.id), report.state) {
                (true, NetworkState::Waiting) => drop(still.insert(record.id.clone())),
                (true, _) => self.network_acknowledged(&report),
                (false, _) => {}
            }
        }
        *waiting = still;
        for (state, count) in counts {
            let state = match state {
                NetworkState::Acknowledged => "acknowledged",
                NetworkState::Waiting => "waiting",
                NetworkState::Failed => "failed",
            };
            self.networks.get_or_create(&OfState { state: state.into() }).set(count);
        }
    }

    /// A fork was not made.
    pub(crate) fn failed(&self, error: &ForkError, code: &str) {
        self.failures.get_or_create(&OfCode { code: code.into() }).inc();
        let network = |error: &NetworkError| matches!(error, NetworkError::NoAck { .. } | NetworkError::Refused(_));
        if matches!(error, ForkError::Ack(_)) || matches!(error, ForkError::Network(error) if network(error)) {
            self.ack_failures.get_or_create(&OfCode { code: code.into() }).inc();
        }
    }

    /// A request was answered.
    pub(crate) fn answered(&self, method: &str, route: &str, status: u16, took: Duration) {
        let of = OfRequest { method: method.into(), route: route.into(), status };
        self.requests.get_or_create(&of).inc();
        self.request_seconds.get_or_create(&of).observe(took.as_secs_f64());
    }

    /// Everything as text, the state of forks and pools as it is now.
    pub(crate) fn text(&self, home: &host::Home, forks: &Forks) -> Result<String, Box<dyn std::error::Error>> {
        let list = forks.list()?;
        for state in [State::Running, State::Standby, State::Dead] {
            let count = list.iter().filter(|(_, other)| *other == state).count();
            self.forks.get_or_create(&OfState { state: state.as_str().into() }).set(i64::try_from(count)?);
        }
        let running = list.iter().filter(|(_, state)| *state == State::Running).map(|(record, _)| &**record);
        self.look_at_networks(home, &running.collect::<Vec<_>>());
        // One that has been given up is no line any more.
        self.pool_ready.clear();
        self.pool_size.clear();
        for Pool { template, size, network, ready, .. } in pool::list(home)? {
            let of = OfPool { template: template.to_string(), network: network.to_string() };
            self.pool_ready.get_or_create(&of).set(i64::try_from(ready)?);
            self.pool_size.get_or_create(&of).set(i64::try_from(size)?);
        }
        let mut asked = self.memory_asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_none_or(|when| when.elapsed() > MEMORY_EVERY) {
            let running = list.iter().filter(|(_, state)| *state == State::Running);
            let sums = running
                .filter_map(|(record, _)| forks::memory_of(record))
                .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            for (kind, bytes) in [("private", sums.0), ("shared", sums.1)] {
                self.memory.get_or_create(&OfKind { kind: kind.into() }).set(i64::try_from(bytes)?);
            }
            *asked = Some(Instant::now());
        }
        drop(asked);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[allow(clippy::cast_precision_loss)] // Durations of steps are far below 2^52 µs.
fn in_seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use host::{Home, acks::AckWaitError, codes::Coded, record::NewFork};
    use serde_json::json;

    use super::*;
    use crate::tests::record;

    fn step(name: &str) -> host::record::StepTime {
        host::record::StepTime { step: name.into(), outcome: String::new(), micros: 1 }
    }

    fn report(state: &str, way: Option<&str>) -> NetworkReport {
        serde_json::from_value(json!({
            "mode": "tap", "mac": "", "ipv4": null, "ipv6": null, "gateway": null, "dns": [], "state": state, "way": way,
            "acked_micros": null, "policy": net::Policy::default(),
        }))
        .unwrap()
    }

    fn id(digit: char) -> ForkId {
        ForkId::parse(&digit.to_string().repeat(20)).unwrap()
    }

    fn text(metrics: &Metrics, home: &Home) -> String {
        metrics.text(home, &Forks::new(home)).unwrap()
    }

    #[test]
    fn o1_what_a_guest_calls_its_steps_costs_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path()).make().unwrap();
        let metrics = Metrics::new();
        let mut fork = record(&id('a'), "a");
        fork.host_steps = vec![step("start and load")];
        fork.guest_steps = (0..26).map(|number| step(&"abcdefghijklmnopqrstuvwxyz"[number..])).collect();
        fork.guest_steps.extend(["entropy", "thaw", "service.web"].map(step));
        metrics.made(&fork);
        let text = text(&metrics, &home);
        let of_guest = "side=\"guest\",step=\"";
        let mut names: Vec<_> = text.split(of_guest).skip(1).filter_map(|rest| rest.split('"').next()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names, ["entropy", "other", "thaw"]);
        assert!(text.contains("side=\"host\",step=\"start and load\""), "{text}");
    }

    #[test]
    fn o1_acks_that_are_missing_are_counted_by_their_code_and_other_failures_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path()).make().unwrap();
        let metrics = Metrics::new();
        let no_ack = NetworkError::NoAck { limit: Duration::from_secs(1), troubles: Vec::new() };
        for error in [
            ForkError::Ack(AckWaitError::Flood),
            ForkError::Network(no_ack),
            ForkError::Network(NetworkError::Refused(String::new())),
            ForkError::Network(NetworkError::OnePortManyForks(2)),
        ] {
            metrics.failed(&error, error.code());
        }
        let text = text(&metrics, &home);
        let line = |figure: &str, code: &str| text.contains(&format!("offshoot_{figure}_total{{code=\"{code}\"}} 1"));
        for code in ["ack_flood", "network_ack_timeout", "network_refused"] {
            assert!(line("ack_failures", code) && line("fork_failures", code), "{code}: {text}");
        }
        assert!(line("fork_failures", "one_port_many_forks") && !line("ack_failures", "one_port_many_forks"), "{text}");
    }

    #[test]
    fn n3_which_way_a_network_was_acknowledged_is_counted_also_if_that_was_later() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path()).make().unwrap();
        let metrics = Metrics::new();
        let mut dirs = Vec::new();
        for (digit, state, way) in [
            ('a', "acknowledged", Some("datagram")),
            ('b', "waiting", None),
            ('c', "waiting", None),
            ('d', "failed", None),
        ] {
            let mut fork = record(&id(digit), &format!("f-{digit}"));
            fork.process = engine::ProcessRef::myself().unwrap();
            fork.network = Some(report(state, way));
            let new = NewFork::begin(&home, &fork.id).unwrap();
            dirs.push(new.publish(&home, &fork).unwrap());
            metrics.made(&fork);
        }
        let acks = |text: &str, way: &str, count: u64| {
            let of = format!("offshoot_network_acks_total{{mode=\"tap\",way=\"{way}\"}}");
            match count {
                0 => assert!(!text.contains(&of), "{text}"),
                _ => assert!(text.contains(&format!("{of} {count}\n")), "{text}"),
            }
        };
        let states = |text: &str, counts: [usize; 3]| {
            for (state, count) in ["acknowledged", "waiting", "failed"].iter().zip(counts) {
                assert!(text.contains(&format!("offshoot_networks{{state=\"{state}\"}} {count}\n")), "{text}");
            }
        };
        let before = text(&metrics, &home);
        acks(&before, "datagram", 1);
        acks(&before, "commands", 0);
        states(&before, [1, 2, 1]);
        let outcome = |dir: &std::path::Path, outcome| std::fs::write(dir.join("network.json"), outcome).unwrap();
        outcome(&dirs[1], r#"{"state": "acknowledged", "way": "commands", "troubles": []}"#);
        outcome(&dirs[2], r#"{"state": "failed", "way": null, "troubles": []}"#);
        for _ in 0..2 {
            let after = text(&metrics, &home);
            acks(&after, "datagram", 1);
            acks(&after, "commands", 1);
            states(&after, [2, 0, 2]);
        }
    }
}
