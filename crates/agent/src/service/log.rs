//! What services and the runtime wrote: one bounded ring for each, and followers that are woken by new bytes.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Bound,
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;
use tokio::sync::watch;

/// Bytes kept of each source; older ones go first.
pub const RING: usize = 256 << 10;

/// Most bytes of one chunk that a follower is given.
const CHUNK: usize = 64 << 10;

/// Most bytes of output that an error repeats.
const TAIL: usize = 2048;

/// The logs of all sources.
#[derive(Debug)]
pub struct Logs {
    rings: Mutex<BTreeMap<String, Ring>>,
    /// Counts changes, to wake followers.
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes ever written; the ring holds the last ones before it.
    end: u64,
    /// Where a fork's own bytes begin: `end` when the workload was frozen.
    frozen_at: u64,
}

/// What [`Logs::fill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    Bytes,
    Nothing,
    End,
}

/// Reads the logs from the beginning on, each byte once.
#[derive(Debug)]
pub struct Follower<'a> {
    logs: &'a Logs,
    positions: BTreeMap<String, u64>,
    /// Who was read last: the next one's turn is next, so that nobody who writes without end keeps the others from being read.
    last: String,
    version: watch::Receiver<u64>,
}

impl Ring {
    fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(RING)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(RING);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// What is kept from `position` on.
    fn from(&self, position: u64) -> impl Iterator<Item = u8> + '_ {
        let skip = usize::try_from(position.saturating_sub(self.start())).unwrap_or(usize::MAX);
        self.bytes.iter().skip(skip).copied()
    }
}

impl Logs {
    /// Empty logs.
    #[must_use]
    pub fn new() -> Self {
        Self { rings: Mutex::default(), version: watch::Sender::new(0) }
    }

    /// Reads once from a non-blocking descriptor into a source's ring. Reading and keeping are one step under one lock,
    /// so that two threads that read the same pipe do not swap its bytes.
    pub(crate) fn fill(&self, source: &str, fd: impl AsFd) -> Filled {
        let mut buffer = [0; 8192];
        let mut rings = self.lock();
        let result = loop {
            match rustix::io::read(&fd, &mut buffer) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        match result {
            Ok(0) => Filled::End,
            Ok(len) => {
                let ring = ring(&mut rings, source);
                ring.push(&buffer[..len]);
                ring.end += len as u64;
                drop(rings);
                self.version.send_modify(|version| *version += 1);
                Filled::Bytes
            }
            Err(Errno::AGAIN) => Filled::Nothing,
            Err(_) => Filled::End,
        }
    }

    /// Adds a line of the agent's own to a source.
    pub(crate) fn note(&self, source: &str, text: &str) {
        let line = format!("offshoot: {text}\n");
        let mut rings = self.lock();
        let ring = ring(&mut rings, source);
        ring.push(line.as_bytes());
        ring.end += line.len() as u64;
        drop(rings);
        self.version.send_modify(|version| *version += 1);
    }

    /// Where a source's next byte will be.
    pub(crate) fn position(&self, source: &str) -> u64 {
        self.lock().get(source).map_or(0, |ring| ring.end)
    }

    /// Whether a whole line with `text` in it was written from `position` on.
    pub(crate) fn has_line(&self, source: &str, position: u64, text: &str) -> bool {
        let rings = self.lock();
        let Some(ring) = rings.get(source) else { return false };
        let bytes: Vec<u8> = ring.from(position).collect();
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        String::from_utf8_lossy(&bytes[..whole]).lines().any(|line| line.contains(text))
    }

    /// The last lines of a source from `position` on, for an error.
    pub(crate) fn tail(&self, source: &str, position: u64) -> String {
        let rings = self.lock();
        let Some(ring) = rings.get(source) else { return String::new() };
        let bytes: Vec<u8> = ring.from(position.max(ring.end.saturating_sub(TAIL as u64))).collect();
        let text = String::from_utf8_lossy(&bytes);
        text.trim_end().chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '?' } else { c }).collect()
    }

    /// Remembers that everything up to now is the template's.
    pub(crate) fn mark_frozen(&self) {
        for ring in self.lock().values_mut() {
            ring.frozen_at = ring.end;
        }
    }

    /// Forgets what the template wrote.
    pub(crate) fn forget_template(&self) {
        for ring in self.lock().values_mut() {
            let old = usize::try_from(ring.frozen_at.saturating_sub(ring.start())).unwrap_or(usize::MAX);
            ring.bytes.drain(..old.min(ring.bytes.len()));
        }
    }

    /// A reader of everything that is kept and of everything to come.
    #[must_use]
    pub fn follow(&self) -> Follower<'_> {
        Follower { logs: self, positions: BTreeMap::new(), last: String::new(), version: self.version.subscribe() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Ring>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Logs {
    fn default() -> Self {
        Self::new()
    }
}

fn ring<'a>(rings: &'a mut BTreeMap<String, Ring>, source: &str) -> &'a mut Ring {
    if !rings.contains_key(source) {
        rings.insert(source.to_owned(), Ring::default());
    }
    rings.entry(source.to_owned()).or_default()
}

impl Follower<'_> {
    /// The next chunk: its source and at most 64 KiB of it. `None`: everything was taken.
    #[must_use = "a chunk is given once"]
    pub fn take(&mut self) -> Option<(String, Vec<u8>)> {
        // Seen before it is read: a byte that comes in between wakes us once too often, never too rarely.
        self.version.borrow_and_update();
        let rings = self.logs.lock();
        let last = self.last.as_str();
        let after = rings.range::<str, _>((Bound::Excluded(last), Bound::Unbounded));
        for (source, ring) in after.chain(rings.range::<str, _>((Bound::Unbounded, Bound::Included(last)))) {
            let position = self.positions.entry(source.clone()).or_default();
            let from = (*position).max(ring.start());
            let bytes: Vec<u8> = ring.from(from).take(CHUNK).collect();
            *position = from + bytes.len() as u64;
            if !bytes.is_empty() {
                self.last.clone_from(source);
                return Some((source.clone(), bytes));
            }
        }
        None
    }

    /// Waits until there may be something to take. May be dropped at any time.
    ///
    /// # Errors
    /// If the logs are gone.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.version.changed().await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(logs: &Logs, source: &str, bytes: &[u8]) {
        let mut rings = logs.lock();
        let ring = ring(&mut rings, source);
        ring.push(bytes);
        ring.end += bytes.len() as u64;
    }

    #[test]
    fn a_ring_keeps_the_last_bytes_only() {
        let logs = Logs::new();
        write(&logs, "web", &[b'a'; RING]);
        write(&logs, "web", b"tail\n");
        let mut follower = logs.follow();
        let mut all = Vec::new();
        while let Some((_, bytes)) = follower.take() {
            assert!(bytes.len() <= CHUNK);
            all.extend(bytes);
        }
        assert_eq!(all.len(), RING);
        assert!(all.ends_with(b"aatail\n"));
        assert_eq!(logs.tail("web", RING as u64), "tail");
    }

    #[test]
    fn everybody_is_read_in_turn() {
        let logs = Logs::new();
        write(&logs, "loud", &[b'a'; 3 * CHUNK]);
        write(&logs, "quiet", b"q");
        write(&logs, "again", b"g");
        let mut follower = logs.follow();
        let turns: Vec<String> = std::iter::from_fn(|| follower.take()).map(|(source, _)| source).collect();
        assert_eq!(turns, ["again", "loud", "quiet", "loud", "loud"]);
    }

    #[test]
    fn a_fork_forgets_what_the_template_wrote_and_nothing_else() {
        let logs = Logs::new();
        write(&logs, "web", b"template\n");
        logs.mark_frozen();
        write(&logs, "web", b"fork\n");
        logs.forget_template();
        assert_eq!(logs.follow().take(), Some(("web".into(), b"fork\n".to_vec())));
        assert_eq!(logs.position("web"), 14);
    }

    #[test]
    fn a_ready_line_counts_when_it_is_whole_and_of_this_life() {
        let logs = Logs::new();
        write(&logs, "web", b"listening\n");
        assert!(logs.has_line("web", 0, "listening"));
        assert!(!logs.has_line("web", 10, "listening"));
        write(&logs, "web", b"12:00 listening on 80");
        assert!(!logs.has_line("web", 10, "listening"));
        write(&logs, "web", b"\n");
        assert!(logs.has_line("web", 10, "listening"));
        assert!(!logs.has_line("db", 0, "listening"));
    }
}
