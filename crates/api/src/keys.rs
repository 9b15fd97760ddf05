//! Requests that may be sent twice: by their `Idempotency-Key` the second is given the first one's answer.
//!
//! ```text
//! <state>/api/keys/<hash of who, where and key>.json     the request's hash, and its answer once there is one
//! ```
//!
//! A daemon that died in the middle leaves a key without an answer. The forks that were finished carry the key's hash (`origin`), so the second
//! request is told which there are.

use std::{
    collections::HashSet,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::problem::Problem;

/// How long an answer is kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// An answer for 1000 forks has some megabytes.
const MAX_FILE: u64 = 64 << 20;

fn reused() -> Problem {
    let detail = "this key was used for another request; use a new key for each request";
    Problem::new(StatusCode::CONFLICT, "idempotency_key_reused", detail)
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    request: String,
    answer: Option<Answer>,
}

/// A status and a body.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

/// All keys.
#[derive(Debug)]
pub(crate) struct Keys {
    dir: PathBuf,
    /// Those whose first request is being worked on.
    working: Arc<Mutex<HashSet<String>>>,
}

/// What is known of a key.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Nothing: the request is done now, and [`Keys::answer`] notes what came of it.
    New(Key),
    /// It was answered.
    Answered(Answer),
    /// The daemon that worked on it died, or the work did; some of its forks may be there.
    Interrupted(Key),
}

/// A key of somebody, for one route: its hash. While it is there the request is being worked on.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) hash: String,
    request: String,
    working: Arc<Mutex<HashSet<String>>>,
}

impl Drop for Key {
    fn drop(&mut self) {
        lock(&self.working).remove(&self.hash);
    }
}

fn lock(working: &Mutex<HashSet<String>>) -> MutexGuard<'_, HashSet<String>> {
    working.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an answer was given so long ago that its key is as good as new.
fn is_old(path: &Path) -> bool {
    let written = fs::metadata(path).and_then(|meta| meta.modified());
    written.is_ok_and(|written| SystemTime::now().duration_since(written).unwrap_or_default() > KEPT)
}

impl Keys {
    pub(crate) fn open(state: &Path) -> io::Result<Self> {
        let dir = state.join("api").join("keys");
        fs::create_dir_all(&dir)?;
        let keys = Self { dir, working: Arc::default() };
        keys.sweep()?;
        Ok(keys)
    }

    /// Removes those that are too old to be answered, but for one that is being worked on.
    pub(crate) fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let working = lock(&self.working);
            let hash = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if !working.contains(hash) && is_old(&path) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Takes the key of a request, if it has one.
    pub(crate) fn claim(
        &self,
        headers: &HeaderMap,
        who: &str,
        route: &str,
        body: &[u8],
    ) -> Result<Option<Claim>, Problem> {
        let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
        let good = |key: &&str| (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
        let key = key.to_str().ok().filter(good).ok_or_else(|| {
            Problem::invalid("Idempotency-Key", "a key is 1 to 255 printable ASCII characters without blanks")
        })?;
        // The parts have no NUL, so no two keys are mixed up.
        let hash = blake3::hash([who, "\0", route, "\0", key].concat().as_bytes()).to_hex()[..32].to_owned();
        let request = blake3::hash(body).to_hex().to_string();
        let in_progress = || {
            let detail = "the first request with this key is still being worked on; ask again";
            Problem::new(StatusCode::CONFLICT, "idempotency_in_progress", detail)
        };
        // One at a time has the key; whoever comes meanwhile is told so, unless what it asks for is something else.
        if !lock(&self.working).insert(hash.clone()) {
            return Err(if self.is_of(&hash, &request) { in_progress() } else { reused() });
        }
        let key = Key { hash, request, working: Arc::clone(&self.working) };
        let path = self.path(&key);
        if is_old(&path) {
            let _ = fs::remove_file(&path);
        }
        let failed = |error: io::Error| Problem::internal(&error);
        let record = Record { request: key.request.clone(), answer: None };
        let text = serde_json::to_vec(&record).map_err(io::Error::from).map_err(failed)?;
        match OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
            Ok(mut file) => {
                file.write_all(&text).map_err(failed)?;
                Ok(Some(Claim::New(key)))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.known(key).map(Some),
            Err(error) => Err(failed(error)),
        }
    }

    fn known(&self, key: Key) -> Result<Claim, Problem> {
        // One that can not be read was torn by a crash: its request is taken for this one.
        let Some(record) = self.record(&key.hash) else { return Ok(Claim::Interrupted(key)) };
        if record.request != key.request {
            return Err(reused());
        }
        match record.answer {
            Some(answer) => Ok(Claim::Answered(answer)),
            None => Ok(Claim::Interrupted(key)),
        }
    }

    /// Whether a key is that of this request; one that is not known yet is.
    fn is_of(&self, hash: &str, request: &str) -> bool {
        self.record(hash).is_none_or(|record| record.request == request)
    }

    fn record(&self, hash: &str) -> Option<Record> {
        let path = self.dir.join(format!("{hash}.json"));
        let meta = fs::metadata(&path).ok().filter(|meta| meta.len() <= MAX_FILE);
        serde_json::from_slice(&meta.and_then(|_| fs::read(&path).ok())?).ok()
    }

    /// Notes what came of it.
    pub(crate) fn answer(&self, key: &Key, answer: &Answer) -> io::Result<()> {
        let record = Record { request: key.request.clone(), answer: Some(answer.clone()) };
        let temporary = self.dir.join(format!(".{}.tmp", key.hash));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        fs::rename(temporary, self.path(key))
    }

    /// Nothing was begun: the key is as good as new.
    pub(crate) fn give_back(&self, key: &Key) {
        let _ = fs::remove_file(self.path(key));
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{}.json", key.hash))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn headers(key: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("idempotency-key", key.parse().unwrap());
        headers
    }

    #[test]
    fn a_key_is_answered_once_and_belongs_to_whom_and_what_it_was_sent_by_and_for() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        let claim = |who, route, key, body: &[u8]| keys.claim(&headers(key), who, route, body);
        let Some(Claim::New(key)) = claim("a", "/forks", "k", b"1").unwrap() else { panic!("not new") };
        assert_eq!(claim("a", "/forks", "k", b"1").unwrap_err().code(), "idempotency_in_progress");
        assert_eq!(claim("a", "/forks", "k", b"2").unwrap_err().code(), "idempotency_key_reused");
        keys.answer(&key, &Answer { status: 201, body: Value::Bool(true) }).unwrap();
        drop(key);
        let Some(Claim::Answered(answer)) = claim("a", "/forks", "k", b"1").unwrap() else { panic!("not answered") };
        assert_eq!((answer.status, answer.body), (201, Value::Bool(true)));
        assert_eq!(claim("a", "/forks", "k", b"2").unwrap_err().code(), "idempotency_key_reused");
        // Work that ended without an answer: what it made is looked for.
        drop(claim("a", "/forks", "lost", b"1").unwrap());
        assert!(matches!(claim("a", "/forks", "lost", b"1"), Ok(Some(Claim::Interrupted(_)))));
        for (who, route, other) in [("b", "/forks", "k"), ("a", "/templates", "k"), ("a", "/forks", "k2")] {
            assert!(matches!(claim(who, route, other, b"1"), Ok(Some(Claim::New(_)))));
        }
        assert!(matches!(claim("a", "/forks", "not a key", b"1"), Err(problem) if problem.code() == "invalid_request"));
    }

    #[test]
    fn a_key_is_good_for_a_day_while_the_daemon_lives_too() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        let claim = |name| keys.claim(&headers(name), "a", "/forks", b"1").unwrap().unwrap();
        let answered = |name| {
            let Claim::New(key) = claim(name) else { panic!("{name} is not new") };
            keys.answer(&key, &Answer { status: 201, body: Value::Null }).unwrap();
            keys.path(&key)
        };
        let age = |path: &Path, age| {
            fs::File::options().write(true).open(path).unwrap().set_modified(SystemTime::now() - age).unwrap();
        };
        let [young, old, swept] = ["young", "old", "swept"].map(answered);
        age(&young, KEPT - Duration::from_secs(60));
        [&old, &swept].into_iter().for_each(|path| age(path, KEPT + Duration::from_secs(60)));
        assert!(matches!(claim("young"), Claim::Answered(_)));
        let Claim::New(working) = claim("old") else { panic!("not new") };
        // What is being worked on is not swept, however long it takes.
        age(&old, KEPT + Duration::from_secs(60));
        keys.sweep().unwrap();
        assert_eq!([&young, &old, &swept].map(|path| path.exists()), [true, true, false]);
        drop(working);
    }

    #[test]
    fn o2_a_key_of_a_daemon_that_died_is_known_as_interrupted() {
        let dir = tempfile::tempdir().unwrap();
        let first = Keys::open(dir.path()).unwrap();
        let Ok(Some(Claim::New(key))) = first.claim(&headers("k"), "a", "/forks", b"1") else { panic!("not new") };
        let second = Keys::open(dir.path()).unwrap();
        let Ok(Some(Claim::Interrupted(again))) = second.claim(&headers("k"), "a", "/forks", b"1") else {
            panic!("not interrupted")
        };
        assert_eq!(again.hash, key.hash);
        second.give_back(&again);
        drop(again);
        assert!(matches!(second.claim(&headers("k"), "a", "/forks", b"1"), Ok(Some(Claim::New(_)))));
    }
}
