//! Who asked for what, and what came of it: one file of JSON lines for each token and each local user, only ever appended to. What was in a request
//! (a body, a query, a header) is not in it.
//!
//! ```text
//! <data>/api/audit/<who>.jsonl       what is written to
//! <data>/api/audit/<who>.jsonl.<n>   what came before, 1 the oldest; whoever keeps the audit elsewhere may take it away
//! ```
//!
//! What somebody did is never removed because of what they do later.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;

use crate::{auth::Principal, events::now_ms};

/// A file that has grown this long is set aside.
const MOST_BYTES: u64 = 64 << 20;
/// How many files are kept of requests without a valid token: anybody can make those, as many as they like.
const OF_NOBODY: u64 = 16;
/// Whose requests those are.
const NOBODY: &str = "nobody";
/// Most files that are held open. Tokens come and go.
const MOST_OPEN: usize = 64;
/// Longest path that is written down.
const MOST_PATH: usize = 300;

/// The audit.
#[derive(Debug)]
pub(crate) struct Audit {
    dir: PathBuf,
    most: u64,
    open: Mutex<HashMap<Arc<str>, (File, u64)>>,
}

/// One request.
#[derive(Debug, Serialize)]
pub(crate) struct Line<'a> {
    time_ms: u64,
    request: u64,
    who: &'a str,
    from: &'a str,
    name: &'a str,
    scope: String,
    method: &'a str,
    path: &'a str,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    micros: u64,
}

/// What came of a request.
#[derive(Debug)]
pub(crate) struct Outcome<'a> {
    pub(crate) request: u64,
    /// Where the connection came from.
    pub(crate) from: &'a str,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) status: u16,
    pub(crate) code: Option<&'a str>,
    pub(crate) micros: u64,
}

impl Audit {
    pub(crate) fn open(data: &Path) -> io::Result<Self> {
        let dir = data.join("api").join("audit");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir, most: MOST_BYTES, open: Mutex::default() })
    }

    /// Writes a line. Nobody: a request without a valid token.
    pub(crate) fn write(&self, who: Option<&Principal>, outcome: &Outcome<'_>) -> io::Result<()> {
        let id = who.map_or_else(|| Arc::from(NOBODY), |who| Arc::clone(&who.id));
        let line = Line {
            time_ms: now_ms(),
            request: outcome.request,
            who: &id,
            from: outcome.from,
            name: who.map_or("", |who| &who.name),
            scope: who.map_or_else(String::new, |who| who.scope.to_string()),
            method: outcome.method,
            path: cut(outcome.path),
            status: outcome.status,
            code: outcome.code,
            micros: outcome.micros,
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match open.get_mut(&id) {
            Some(entry) => entry,
            None => {
                if open.len() >= MOST_OPEN {
                    open.clear();
                }
                let opened = self.file(&id)?;
                open.entry(Arc::clone(&id)).or_insert(opened)
            }
        };
        if entry.1 + text.len() as u64 > self.most {
            self.set_aside(&id)?;
            *entry = self.file(&id)?;
        }
        entry.0.write_all(&text)?;
        entry.1 += text.len() as u64;
        Ok(())
    }

    /// Gives a file the next number.
    fn set_aside(&self, id: &str) -> io::Result<()> {
        let path = self.path(id);
        let numbered = |number: u64| path.with_extension(format!("jsonl.{number}"));
        let prefix = format!("{id}.jsonl.");
        let names = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name());
        let last = names.filter_map(|name| name.to_str()?.strip_prefix(&prefix)?.parse::<u64>().ok()).max();
        let next = last.unwrap_or_default() + 1;
        fs::rename(&path, numbered(next))?;
        match next.checked_sub(OF_NOBODY) {
            Some(old) if id == NOBODY => match fs::remove_file(numbered(old)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn file(&self, id: &str) -> io::Result<(File, u64)> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(self.path(id))?;
        let len = file.metadata()?.len();
        Ok((file, len))
    }

    fn path(&self, id: &str) -> PathBuf {
        // Ids are ours: `token-` and hexadecimal digits, `uid-` and a number, or `nobody`.
        self.dir.join(format!("{id}.jsonl"))
    }
}

fn cut(path: &str) -> &str {
    &path[..path.floor_char_boundary(MOST_PATH)]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn o1_who_asks_a_lot_does_not_flush_what_they_did_before() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit { most: 1000, ..Audit::open(dir.path()).unwrap() };
        let of = |who: Option<&Principal>, number: u64| {
            let (from, method, path) = ("unix:0", "GET", "/v1/forks");
            let outcome = Outcome { request: number, from, method, path, status: 200, code: None, micros: 5 };
            audit.write(who, &outcome).unwrap();
        };
        let who = Principal::of_token("a", "ci", crate::Scope::Read);
        (0..200).for_each(|number| [Some(&who), None].into_iter().for_each(|who| of(who, number)));
        let requests = |id: &str| {
            let mut seen = Vec::new();
            for entry in fs::read_dir(dir.path().join("api/audit")).unwrap() {
                let path = entry.unwrap().path();
                if path.file_name().unwrap().to_str().unwrap().starts_with(id) {
                    assert!(fs::metadata(&path).unwrap().len() <= 1000);
                    let lines = fs::read_to_string(&path).unwrap();
                    let number = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["request"].as_u64();
                    seen.extend(lines.lines().filter_map(number));
                }
            }
            seen.sort_unstable();
            seen
        };
        assert_eq!(requests("token-a"), (0..200).collect::<Vec<_>>());
        // Of nobody the last are there, and not more than that.
        let of_nobody = requests("nobody");
        assert!((50..199).contains(&of_nobody.len()) && of_nobody.last() == Some(&199), "{of_nobody:?}");
    }

    #[test]
    fn o1_lines_are_appended_and_a_hostile_path_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let audit = Audit::open(dir.path()).unwrap();
            let path = format!("/v1/forks/\n{{\"who\":\"x\"}}{}", "é".repeat(400));
            let outcome = Outcome {
                request: 1,
                from: "unix:0",
                method: "GET",
                path: &path,
                status: 401,
                code: Some("unauthorized"),
                micros: 5,
            };
            audit.write(None, &outcome).unwrap();
        }
        let text = fs::read_to_string(dir.path().join("api/audit/nobody.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line["who"] == "nobody" && line["path"].as_str().unwrap().len() <= MOST_PATH));
    }
}
