//! `bench`: how long forks take, always up to the acknowledged identity, step by step.

use std::{collections::BTreeMap, time::Instant};

use engine::Engine;
use serde::Serialize;
use store::Template;
use thiserror::Error;

use crate::{
    fork::{self, ForkError},
    forks,
    home::Home,
    network::{Mode, NetworkRequest},
    pool::{self, PoolError},
    progress::Progress,
    record::StepTime,
    request::ForkRequest,
    verify::Cleanup,
};

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The request was refused.
    #[error(transparent)]
    Refused(#[from] ForkError),
    /// The template's pool could not be filled.
    #[error("the template's pool could not be filled")]
    Pool(#[from] PoolError),
}

/// Figures over many values, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// How many values.
    pub count: usize,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// Forks made at once, in some rounds.
#[derive(Debug, Clone, Serialize)]
pub struct BenchRow {
    /// Forks at once.
    pub at_once: usize,
    /// Rounds.
    pub rounds: usize,
    /// From each fork's start to its acknowledged identity.
    pub acked_ms: Figures,
    /// The same of each fork, in milliseconds, so that several measurements can be counted together.
    pub acked_each_ms: Vec<f64>,
    /// From the request to the last fork's acknowledged identity.
    pub all_acked_ms: Figures,
    /// Bytes that a fork has for itself, on average, right after its ack.
    pub private_bytes: u64,
    /// Bytes that a fork shares, on average.
    pub shared_bytes: u64,
    /// The host's steps.
    pub host_steps: BTreeMap<String, Figures>,
    /// The guest's steps, as reported.
    pub guest_steps: BTreeMap<String, Figures>,
    /// Forks that failed.
    pub failed: usize,
}

/// Forks `template` in every size of `sizes`, `rounds` times each, and removes the forks again.
///
/// # Errors
/// [`BenchError`] if the request is refused or a pool can not be filled; forks that fail are counted.
pub fn bench(
    home: &Home,
    engine: &dyn Engine,
    template: &Template,
    sizes: &[usize],
    rounds: usize,
    network: Option<Mode>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<BenchRow>, BenchError> {
    sizes.iter().map(|&size| bench_size(home, engine, template, size, rounds, network, progress)).collect()
}

fn bench_size(
    home: &Home,
    engine: &dyn Engine,
    template: &Template,
    size: usize,
    rounds: usize,
    network: Option<Mode>,
    progress: &mut dyn FnMut(Progress),
) -> Result<BenchRow, BenchError> {
    let network = NetworkRequest { mode: network, ..NetworkRequest::default() };
    let request = ForkRequest { count: size, network, ..ForkRequest::default() };
    let (mut acked, mut all, mut memory, mut failed) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let (mut host_steps, mut guest_steps) = (BTreeMap::new(), BTreeMap::new());
    for round in 0..rounds {
        progress(Progress::of(format!("{size} at once"), round as u64, rounds as u64));
        // A pool is full before each round: what is measured is a fork, not the wait for the machine after it.
        pool::fill(home, engine, template, true)?;
        let mut made = Cleanup { home, forks: Vec::new() };
        let start = Instant::now();
        let results = fork::fork(home, engine, template, &request)?;
        all.push(start.elapsed().as_secs_f64() * 1e3);
        for result in results {
            match result {
                Ok(record) => made.forks.push(record),
                Err(_) => failed += 1,
            }
        }
        for record in &made.forks {
            acked.push(millis(record.acked_micros));
            memory.extend(forks::memory_of(record));
            collect(&mut host_steps, &record.host_steps);
            collect(&mut guest_steps, &record.guest_steps);
        }
    }
    let mean = |pick: fn(&(u64, u64)) -> u64| memory.iter().map(pick).sum::<u64>() / memory.len().max(1) as u64;
    Ok(BenchRow {
        at_once: size,
        rounds,
        acked_ms: figures(acked.clone()),
        acked_each_ms: acked,
        all_acked_ms: figures(all),
        private_bytes: mean(|memory| memory.0),
        shared_bytes: mean(|memory| memory.1),
        host_steps: host_steps.into_iter().map(|(step, values)| (step, figures(values))).collect(),
        guest_steps: guest_steps.into_iter().map(|(step, values)| (step, figures(values))).collect(),
        failed,
    })
}

fn collect(into: &mut BTreeMap<String, Vec<f64>>, steps: &[StepTime]) {
    for step in steps {
        into.entry(step.step.clone()).or_default().push(millis(step.micros));
    }
}

#[allow(clippy::cast_precision_loss)]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}

/// Percentiles by the nearest-rank method: every figure is a value that was really seen.
fn figures(mut values: Vec<f64>) -> Figures {
    values.sort_by(f64::total_cmp);
    let rank = |percent: usize| {
        let index = (values.len() * percent).div_ceil(100).max(1) - 1;
        values.get(index).copied().unwrap_or(f64::NAN)
    };
    Figures { count: values.len(), p50: rank(50), p90: rank(90), p99: rank(99), max: rank(100) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let figures = figures((1..=200).map(f64::from).collect());
        assert_eq!((figures.p50, figures.p90, figures.p99, figures.max), (100.0, 180.0, 198.0, 200.0));
        let one = super::figures(vec![7.0]);
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
    }
}
