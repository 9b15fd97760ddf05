//! Channels to guests that many requests of one process share: a guest has eight, and each carries as many requests as there are.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use identity::ForkId;
use tokio::time::{Instant, timeout_at};

use super::{GuestChannel, GuestError};
use crate::{Home, forks, record::ForkRecord};

/// How long a channel that nobody uses is kept. Opening one takes some milliseconds, and one that is open keeps the guest from being idle.
const LINGER: Duration = Duration::from_secs(3);
/// How long it counts for everybody that an attempt has failed after all its time: else each who waits would have that time of his own.
const FAILED_FOR: Duration = Duration::from_secs(1);

/// A machine of a fork: one that came back from standby is another.
type Machine = (ForkId, u32, u64);
type Slot = Arc<tokio::sync::Mutex<State>>;

/// What is known of the way to one machine.
#[derive(Debug, Default)]
struct State {
    kept: Option<Kept>,
    failed: Option<Failed>,
}

#[derive(Debug)]
struct Kept {
    channel: GuestChannel,
    used: Instant,
}

/// An attempt that got no answer, or no channel, in all the time that it had. What fails at once is not kept: it may be otherwise by now.
#[derive(Debug)]
struct Failed {
    at: Instant,
    tried: Duration,
    busy: bool,
}

impl Failed {
    fn of(error: &GuestError, tried: Duration) -> Option<Self> {
        let busy = match error {
            GuestError::Busy => true,
            GuestError::Timeout(_) => false,
            _ => return None,
        };
        Some(Self { at: Instant::now(), tried, busy })
    }

    /// What it says to whoever would try for `limit` now; nothing if that is longer than it was tried for.
    fn answer(&self, limit: Duration) -> Option<GuestError> {
        let counts = self.is_fresh() && self.tried >= limit;
        counts.then_some(if self.busy { GuestError::Busy } else { GuestError::Timeout(limit) })
    }

    fn is_fresh(&self) -> bool {
        self.at.elapsed() < FAILED_FOR
    }
}

/// Channels by machine.
#[derive(Debug, Clone, Default)]
pub struct Channels {
    slots: Arc<Mutex<HashMap<Machine, Slot>>>,
}

fn lock(slots: &Mutex<HashMap<Machine, Slot>>) -> MutexGuard<'_, HashMap<Machine, Slot>> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

fn machine(record: &ForkRecord) -> Machine {
    (record.id.clone(), record.process.pid, record.process.start_time)
}

impl Channels {
    /// The channel to a fork's agent; whoever comes first opens it, and the others wait for that. Nobody waits longer than `limit`. Needs a runtime.
    ///
    /// # Errors
    /// As [`GuestChannel::connect`]; at once, if it has just failed so for another.
    pub async fn get(&self, home: &Home, record: &ForkRecord, limit: Duration) -> Result<GuestChannel, GuestError> {
        let deadline = Instant::now() + limit;
        let key = machine(record);
        let (slot, is_new) = {
            let mut slots = lock(&self.slots);
            let is_new = !slots.contains_key(&key);
            (Arc::clone(slots.entry(key.clone()).or_default()), is_new)
        };
        if is_new {
            self.sweep(key, Arc::clone(&slot));
        }
        let mut state = timeout_at(deadline, slot.lock()).await.map_err(|_| GuestError::Timeout(limit))?;
        if let Some(kept) = state.kept.as_mut().filter(|kept| !kept.channel.is_gone()) {
            kept.used = Instant::now();
            return Ok(kept.channel.clone());
        }
        if let Some(error) = state.failed.as_ref().and_then(|failed| failed.answer(limit)) {
            return Err(error);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match GuestChannel::connect(&forks::dir(home, record), left).await {
            Ok(channel) => {
                let kept = Kept { channel: channel.clone(), used: Instant::now() };
                *state = State { kept: Some(kept), failed: None };
                Ok(channel)
            }
            Err(error) => {
                state.failed = Failed::of(&error, left);
                Err(if let GuestError::Timeout(_) = error { GuestError::Timeout(limit) } else { error })
            }
        }
    }

    /// Closes a channel once nobody has used it for [`LINGER`], and forgets one that could not be opened.
    fn sweep(&self, key: Machine, slot: Slot) {
        let slots = Arc::downgrade(&self.slots);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LINGER).await;
                let mut state = slot.lock().await;
                let idle = |kept: &Kept| {
                    kept.channel.is_gone() || (kept.used.elapsed() >= LINGER && !kept.channel.is_shared())
                };
                if state.kept.as_ref().is_some_and(|kept| !idle(kept))
                    || state.failed.as_ref().is_some_and(Failed::is_fresh)
                {
                    continue;
                }
                let Some(slots) = slots.upgrade() else { return };
                // Whoever has taken the slot by now waits for its lock, and puts a channel into one that nobody finds: it ends with its use.
                lock(&slots).remove(&key);
                state.kept = None;
                return;
            }
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use serde_json::json;
    use tokio::{net::UnixListener, task::JoinSet};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn record() -> ForkRecord {
        serde_json::from_value(json!({
            "format": ForkRecord::FORMAT, "id": "a".repeat(20), "name": "hung", "hostname": "hung", "template": "t", "template_id": "0",
            "engine": {"name": "qemu", "version": "7.2", "accel": "tcg"}, "process": {"pid": 1, "start_time": 1, "boot_id": ""}, "created_ms": 0,
            "machine_id": "", "boot_id": "", "labels": {}, "env": [], "secrets": [], "files": [], "mailboxes": [], "limits": {},
            "cgroups": [], "acked_micros": 0, "host_steps": [], "guest_steps": [],
        }))
        .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn n4_a_hung_agent_keeps_everybody_waiting_for_the_same_time_not_for_one_after_another() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::below(place.path()).make().unwrap();
        let record = record();
        let dir = forks::dir(&home, &record);
        fs::create_dir_all(&dir).unwrap();
        // It takes connections, and never says a word.
        let agent = UnixListener::bind(dir.join("ctl.0.sock")).unwrap();
        let channels = Channels::default();
        let get = |limit| {
            let (channels, home, record) = (channels.clone(), home.clone(), record.clone());
            async move { channels.get(&home, &record, limit).await }
        };

        let start = Instant::now();
        let mut all = JoinSet::new();
        (0..5).for_each(|_| drop(all.spawn(get(LIMIT))));
        for asked in all.join_all().await {
            assert!(matches!(asked, Err(GuestError::Timeout(LIMIT))), "{asked:?}");
        }
        assert!(start.elapsed() < LIMIT + FAILED_FOR, "{:?}", start.elapsed());
        // Whoever comes now is told at once; whoever has more time than there was, and whoever comes later, tries for himself.
        let start = Instant::now();
        assert!(matches!(get(LIMIT).await, Err(GuestError::Timeout(LIMIT))));
        assert!(start.elapsed() < FAILED_FOR, "{:?}", start.elapsed());
        for (limit, pause) in [(LIMIT * 2, Duration::ZERO), (LIMIT, FAILED_FOR)] {
            tokio::time::advance(pause).await;
            let start = Instant::now();
            assert!(get(limit).await.is_err());
            assert!(start.elapsed() >= limit, "{:?}", start.elapsed());
        }
        drop(agent);
        tokio::time::advance(FAILED_FOR).await;
        let start = Instant::now();
        assert!(matches!(get(LIMIT).await, Err(GuestError::NotRunning)));
        assert!(start.elapsed() < LIMIT);
    }
}
