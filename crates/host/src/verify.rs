//! `verify`: forks a template and proves that the forks differ, from each other and from the template.
//!
//! What is compared is what a workload inside sees (the agent's `facts` tool runs as one), and what the warmed runtime
//! answers to the recipe's probes.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use engine::{Accel, Engine};
use serde::{Deserialize, Serialize};
use store::Template;
use thiserror::Error;

use crate::{
    fork::{self, ForkError},
    forks,
    guest::{GuestChannel, GuestError},
    home::Home,
    network::Mode,
    progress::Progress,
    record::ForkRecord,
    request::ForkRequest,
};

/// Time for one fork to answer a question.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// How often a fork is asked for its time.
const CLOCK_READINGS: usize = 3;

/// What one subject showed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// `template`, or the fork's name.
    pub subject: String,
    /// The fork's id; none for the template.
    pub id: Option<String>,
    /// From the request to the acknowledged identity, in milliseconds.
    pub acked_ms: Option<f64>,
    /// How far the guest's clock is from the host's, in milliseconds.
    pub clock_error_ms: Option<f64>,
    /// What must differ: field → value.
    pub values: BTreeMap<String, String>,
}

/// A value that more than one subject has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// The field.
    pub field: String,
    /// The value.
    pub value: String,
    /// Who has it.
    pub subjects: Vec<String>,
}

/// The outcome.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// The template first, then the forks.
    pub rows: Vec<Row>,
    /// Everything that two subjects share.
    pub shared: Vec<Shared>,
    /// Other failures, for people: a wrong clock, an identity that does not match.
    pub problems: Vec<String>,
    /// Whether the template passed.
    pub passed: bool,
}

/// Why there is no verdict.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// Fewer than two forks prove nothing.
    #[error("verify needs at least 2 forks to compare, not {0}; use -n 2 or more")]
    TooFew(usize),
    /// A fork could not be made.
    #[error("fork {number} could not be made")]
    Fork {
        /// Which, from 1.
        number: usize,
        /// The cause.
        #[source]
        source: ForkError,
    },
    /// The request was refused.
    #[error(transparent)]
    Refused(#[from] ForkError),
    /// A fork did not answer.
    #[error("fork {name} did not answer")]
    Guest {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: GuestError,
    },
    /// A fork's answer makes no sense.
    #[error("fork {name} gave an answer that can not be read")]
    Answer {
        /// Its name.
        name: String,
    },
}

/// Forks `template` `count` times, compares, and removes the forks again.
///
/// # Errors
/// [`VerifyError`]; the forks are removed in this case too.
pub async fn verify(
    home: &Home,
    engine: &dyn Engine,
    template: &Template,
    count: usize,
    progress: &mut dyn FnMut(Progress),
) -> Result<Verdict, VerifyError> {
    if count < 2 {
        return Err(VerifyError::TooFew(count));
    }
    progress(Progress::step(format!("forking {} {count} times", template.manifest().tag)));
    let mut made = Cleanup { home, forks: Vec::new() };
    let mut failed = None;
    let request = ForkRequest { count, ..ForkRequest::default() };
    for (index, result) in fork::fork(home, engine, template, &request)?.into_iter().enumerate() {
        match result {
            Ok(record) => made.forks.push(record),
            Err(source) => failed = failed.or(Some(VerifyError::Fork { number: index + 1, source })),
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let mut rows = vec![Row {
        subject: "template".into(),
        id: None,
        acked_ms: None,
        clock_error_ms: None,
        values: template.manifest().facts.clone(),
    }];
    let mut problems = Vec::new();
    for (index, record) in made.forks.iter().enumerate() {
        progress(Progress::of("asking the forks who they are", index as u64, count as u64));
        rows.push(ask(home, template, record, &mut problems).await?);
    }
    let shared = compare(&rows);
    let passed = shared.is_empty() && problems.is_empty();
    Ok(Verdict { rows, shared, problems, passed })
}

/// What a fork's clock may be slow by: the time is written down, and only then given to the fork, which is let run and says when
/// it has set its clock. How much of that it has noticed is not known: a busy host may let it wait.
fn until_acked_ms(record: &ForkRecord) -> f64 {
    let steps =
        record.host_steps.iter().filter(|step| matches!(step.step.as_str(), "deliver" | "resume" | "acknowledge"));
    Duration::from_micros(steps.map(|step| step.micros).sum()).as_secs_f64() * 1e3
}

/// How far the guest's clock is from ours, and by how much that may be wrong, both in milliseconds: of several answers the
/// one that was on its way for the shortest time tells best.
async fn clock_error(channel: &mut GuestChannel) -> Result<(f64, f64), GuestError> {
    let mut best: Option<(f64, f64)> = None;
    for _ in 0..CLOCK_READINGS {
        let before = now_ms();
        let pong = channel.ping().await?;
        let after = now_ms();
        #[allow(clippy::cast_precision_loss)] // A double keeps microseconds of today's time.
        let error = pong.wall_clock_ns as f64 / 1e6 - f64::midpoint(before, after);
        if best.is_none_or(|(took, _)| after - before < took) {
            best = Some((after - before, error));
        }
    }
    Ok(best.map_or((0.0, 0.0), |(took, error)| (error, took / 2.0)))
}

/// Asks one fork.
async fn ask(
    home: &Home,
    template: &Template,
    record: &ForkRecord,
    problems: &mut Vec<String>,
) -> Result<Row, VerifyError> {
    let name = record.name.to_string();
    let guest = |source| VerifyError::Guest { name: name.clone(), source };
    let mut channel = GuestChannel::connect(&forks::dir(home, record), ANSWER_LIMIT).await.map_err(guest)?;
    let (clock_error_ms, unknown_ms) = clock_error(&mut channel).await.map_err(guest)?;
    let wrong_ms = if record.engine.accel == Accel::Kvm { 50.0 } else { 500.0 };
    let limit_ms = wrong_ms + unknown_ms + until_acked_ms(record);
    if clock_error_ms.abs() > limit_ms {
        problems.push(format!("the clock of {name} is {clock_error_ms:.0} ms off (at most {limit_ms:.0} allowed)"));
    }

    let mut values = facts(&mut channel).await.map_err(guest)?;
    let mut all = vec![
        ("id", record.id.to_string()),
        ("name", record.name.to_string()),
        ("hostname", record.hostname.to_string()),
        ("machine_id", record.machine_id.clone()),
        ("boot_id", record.boot_id.clone()),
    ];
    if let Some(network) = &record.network {
        all.push(("mac", network.mac.clone()));
        all.extend(network.ipv4.map(|address| ("ipv4", address.to_string())));
        all.extend(network.ipv6.map(|address| ("ipv6", address.to_string())));
        if network.mode != Mode::Tap {
            // Between a fork and its own program these say nothing to anybody else, and all forks have the same.
            values.retain(|field, _| !matches!(field.as_str(), "ipv4" | "ipv6"));
            all.retain(|(field, _)| !matches!(*field, "ipv4" | "ipv6"));
        }
    }
    for (field, wanted) in all {
        match values.get(field) {
            Some(seen) if *seen == wanted => {}
            seen => problems.push(format!("{name} shows {field} {seen:?} instead of {wanted:?}")),
        }
    }
    for (probe, code) in &template.manifest().probes {
        values.insert(probe.clone(), self::probe(&mut channel, code).await.map_err(guest)?);
    }
    #[allow(clippy::cast_precision_loss)]
    let acked_ms = record.acked_micros as f64 / 1e3;
    let id = Some(record.id.to_string());
    Ok(Row { subject: name, id, acked_ms: Some(acked_ms), clock_error_ms: Some(clock_error_ms), values })
}

/// What a workload in the guest sees of itself.
///
/// # Errors
/// [`GuestError`].
pub async fn facts(channel: &mut GuestChannel) -> Result<BTreeMap<String, String>, GuestError> {
    let text = channel.facts().await?;
    let facts: BTreeMap<String, String> =
        serde_json::from_slice(&text).map_err(|_| GuestError::Refused("its facts can not be read".into()))?;
    Ok(facts.into_iter().map(|(field, value)| (clean(&field, 64), clean(&value, 200))).collect())
}

/// The warmed runtime's answer to one of the recipe's probes.
///
/// # Errors
/// [`GuestError`].
pub async fn probe(channel: &mut GuestChannel, code: &str) -> Result<String, GuestError> {
    let reply = channel.eval(code, ANSWER_LIMIT).await?;
    match reply.error {
        None => Ok(clean(&reply.value_json, 200)),
        Some(error) => Err(GuestError::Refused(format!("a probe failed: {}", clean(&error.message, 200)))),
    }
}

/// Everything that two rows share. A field that the template lacks is compared among the forks alone.
fn compare(rows: &[Row]) -> Vec<Shared> {
    let mut holders: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for row in rows {
        for (field, value) in &row.values {
            holders.entry((field, value)).or_default().push(&row.subject);
        }
    }
    holders
        .into_iter()
        .filter(|(_, subjects)| subjects.len() > 1)
        .map(|((field, value), subjects)| Shared {
            field: field.into(),
            value: value.into(),
            subjects: subjects.into_iter().map(Into::into).collect(),
        })
        .collect()
}

fn clean(text: &str, most: usize) -> String {
    text.chars().filter(|character| !character.is_control()).take(most).collect()
}

fn now_ms() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e3
}

/// Forks that are removed again, whatever happens.
pub(crate) struct Cleanup<'a> {
    pub(crate) home: &'a Home,
    pub(crate) forks: Vec<ForkRecord>,
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        for record in &self.forks {
            let _ = forks::kill(self.home, record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(subject: &str, values: &[(&str, &str)]) -> Row {
        let values = values.iter().map(|&(field, value)| (field.to_owned(), value.to_owned())).collect();
        Row { subject: subject.into(), id: None, acked_ms: None, clock_error_ms: None, values }
    }

    #[test]
    fn i16_a_shared_value_is_found_wherever_it_is() {
        let rows = [
            row("template", &[("hostname", "t"), ("random", "1")]),
            row("a", &[("hostname", "a"), ("random", "2"), ("probe", "x")]),
            row("b", &[("hostname", "b"), ("random", "1"), ("probe", "x")]),
        ];
        let shared = compare(&rows);
        let fields: Vec<_> = shared.iter().map(|shared| (shared.field.as_str(), shared.subjects.join("+"))).collect();
        assert_eq!(fields, [("probe", "a+b".to_owned()), ("random", "template+b".to_owned())]);
        assert!(compare(&rows[..2]).is_empty());
    }
}
