//! What the adversary wrote, and whether it breaks the contract: identity before execution.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::Value;

use crate::Fork;

const ENTRY: usize = 128;

/// One entry. See `tests/recipes/watched/watch.c`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Which writer.
    pub writer: String,
    /// Its count.
    pub counter: u64,
    /// `CLOCK_MONOTONIC`, read first.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME`.
    pub realtime_ns: u64,
    /// From `getrandom`.
    pub random: [u8; 8],
    /// What `/run/offshoot/id` held; empty without one.
    pub id: String,
    /// The host name.
    pub hostname: String,
}

/// Reads the logs of all writers.
#[must_use]
pub fn read(dir: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    for file in fs::read_dir(dir).expect("the logs are there") {
        let path = file.expect("readable").path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let writer = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let bytes = fs::read(&path).expect("the log can be read");
        entries.extend(bytes.chunks_exact(ENTRY).filter_map(|bytes| parse(&writer, bytes)));
    }
    entries
}

fn parse(writer: &str, bytes: &[u8]) -> Option<Entry> {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let text = |from: usize, to: usize| {
        let text = &bytes[from..to];
        let len = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        String::from_utf8_lossy(&text[..len]).into_owned()
    };
    let counter = number(0);
    // Not written yet, or half-written when it was copied.
    (counter != 0 && counter == number(120)).then(|| Entry {
        writer: writer.to_owned(),
        counter,
        monotonic_ns: number(8),
        realtime_ns: number(16),
        random: bytes[24..32].try_into().expect("eight bytes"),
        id: text(32, 56),
        hostname: text(56, 120),
    })
}

/// The outcome of [`check`].
#[derive(Debug, Default)]
pub struct Findings {
    /// Entries from before the freeze.
    pub before: usize,
    /// Entries from after it, by fork.
    pub after: Vec<usize>,
    /// Writers with entries after the freeze, by fork.
    pub writers: Vec<usize>,
    /// What breaks the contract: why, and the entry.
    pub violations: Vec<(&'static str, Entry)>,
    /// How many of these entries no other fork has: written in the fork, beyond doubt, and not before the capture.
    pub of_one_fork: usize,
}

/// Checks every entry of every fork. `frozen_ns` is the template's monotonic clock at its freeze, `asked_ns` the host's wall
/// clock when the forks were asked for.
#[must_use]
pub fn check(forks: &[(Fork, Vec<Entry>)], frozen_ns: u64, asked_ns: u64) -> Findings {
    let mut findings = Findings::default();
    let mut drawn: BTreeMap<[u8; 8], usize> = BTreeMap::new();
    let place = |entry: &Entry| (entry.writer.clone(), entry.counter, entry.monotonic_ns);
    let mut holders: BTreeMap<_, usize> = BTreeMap::new();
    for entry in forks.iter().flat_map(|(_, entries)| entries) {
        *holders.entry(place(entry)).or_default() += 1;
    }
    for (index, (fork, entries)) in forks.iter().enumerate() {
        let (before, after): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry.monotonic_ns <= frozen_ns);
        let old: BTreeSet<[u8; 8]> = before.iter().map(|entry| entry.random).collect();
        findings.before += before.len();
        findings.after.push(after.len());
        findings.writers.push(after.iter().map(|entry| &entry.writer).collect::<BTreeSet<_>>().len());
        for entry in after {
            let known = findings.violations.len();
            let mut violation = |why| findings.violations.push((why, entry.clone()));
            if entry.id != fork.id() {
                violation("another id");
            }
            if entry.hostname != fork.text("hostname") {
                violation("another host name");
            }
            if entry.realtime_ns + 1_000_000_000 < asked_ns {
                violation("the template's wall clock");
            }
            let twin = drawn.insert(entry.random, index).is_some();
            if twin || old.contains(&entry.random) {
                violation("random bytes that were drawn before");
            }
            findings.of_one_fork += usize::from(findings.violations.len() > known && holders[&place(entry)] == 1);
        }
    }
    findings
}

/// A manifest's time of the freeze.
#[must_use]
pub fn frozen_ns(manifest: &Value) -> u64 {
    manifest["frozen_monotonic_ns"].as_u64().expect("a manifest says when its workload was frozen")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(counter: u64, monotonic_ns: u64, id: &str, random: u8) -> Entry {
        let (id, hostname) = (id.to_owned(), format!("host-{id}"));
        Entry {
            writer: "0".into(),
            counter,
            monotonic_ns,
            realtime_ns: 5_000_000_000,
            random: [random; 8],
            id,
            hostname,
        }
    }

    fn fork(id: &str) -> Fork {
        Fork { record: json!({ "id": id, "hostname": format!("host-{id}") }) }
    }

    #[test]
    fn i1_the_check_finds_each_kind_of_violation_and_nothing_else() {
        let kinds = |forks: &[(Fork, Vec<Entry>)], asked| {
            check(forks, 100, asked).violations.into_iter().map(|(why, _)| why).collect::<Vec<_>>()
        };
        let good = vec![entry(1, 50, "", 1), entry(2, 101, "a", 2)];
        let other = vec![entry(1, 50, "", 1), entry(2, 101, "b", 3)];
        assert!(kinds(&[(fork("a"), good.clone()), (fork("b"), other)], 5_000_000_000).is_empty());
        let stale = vec![entry(1, 50, "", 1), entry(2, 101, "", 4)];
        assert_eq!(kinds(&[(fork("a"), stale)], 0), ["another id", "another host name"]);
        assert_eq!(kinds(&[(fork("a"), good.clone())], 7_000_000_000), ["the template's wall clock"]);
        let both =
            [(fork("a"), vec![entry(2, 101, "", 4)]), (fork("b"), vec![entry(2, 101, "", 4), entry(3, 102, "", 5)])];
        assert_eq!(check(&both, 100, 0).of_one_fork, 1, "only the last one is not the template's");
        let twin = vec![entry(2, 101, "b", 2)];
        assert_eq!(kinds(&[(fork("a"), good), (fork("b"), twin)], 0), ["random bytes that were drawn before"]);
        let again = vec![entry(1, 50, "", 1), entry(2, 101, "a", 1)];
        assert_eq!(kinds(&[(fork("a"), again)], 0), ["random bytes that were drawn before"]);
    }
}
