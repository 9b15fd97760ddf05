//! Figures for Prometheus.

use std::{
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
    pool::{self, Pool},
};
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
struct OfKind {
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    method: String,
    route: String,
    status: u16,
}

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
    pool_ready: Family<OfPool, Gauge<i64, AtomicI64>>,
    pool_size: Family<OfPool, Gauge<i64, AtomicI64>>,
    memory: Family<OfKind, Gauge<i64, AtomicI64>>,
    requests: Family<OfRequest, Counter<u64, AtomicU64>>,
    request_seconds: Family<OfRequest, Histogram, fn() -> Histogram>,
    memory_asked: Mutex<Option<Instant>>,
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
            pool_ready,
            pool_size,
            memory,
            requests,
            request_seconds,
            memory_asked: Mutex::default(),
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
                // Names of the guest's steps are the guest's: only those of the usual form become a label.
                let name = step.step.as_str();
                let plain =
                    name.len() <= 40 && name.bytes().all(|byte| byte.is_ascii_lowercase() || b" -".contains(&byte));
                let step_name = if plain { name } else { "other" };
                let of_step = OfStep { engine: engine.clone(), side: side.into(), step: step_name.into() };
                self.step_seconds.get_or_create(&of_step).observe(in_seconds(step.micros));
            }
        }
    }

    /// A fork was not made.
    pub(crate) fn failed(&self, error: &ForkError, code: &str) {
        self.failures.get_or_create(&OfCode { code: code.into() }).inc();
        if matches!(error, ForkError::Ack(_)) {
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
