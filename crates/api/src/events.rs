//! What happens, for whoever listens: the last of it is kept, so that a client that was away for a moment misses nothing.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use serde::Serialize;
use tokio::sync::broadcast;
use utoipa::ToSchema;

/// How many events are kept for clients that come back.
const KEPT: usize = 1024;

/// Something that happened.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Event {
    /// Its number: higher than those before it, of former daemons too.
    pub(crate) id: u64,
    /// When, in milliseconds since the epoch.
    time_ms: u64,
    /// What: `fork.created`, `fork.removed`, `fork.died`, `fork.standby`, `fork.resumed`, `template.created`, `template.removed`, `job.progress`,
    /// `job.done`, `job.failed`, `fork.reaped`, or `missed` (events are lost: look at the lists).
    #[schema(example = "fork.created")]
    pub(crate) kind: &'static str,
    /// The id of the fork or job, or the template's tag.
    pub(crate) subject: String,
    /// More of it.
    data: serde_json::Value,
}

/// Hands events on.
#[derive(Debug)]
pub(crate) struct Hub {
    kept: Mutex<(u64, VecDeque<Arc<Event>>)>,
    sender: broadcast::Sender<Arc<Event>>,
}

impl Hub {
    /// Numbers begin with the time, in microseconds: a client that comes back to another daemon is told that it missed something.
    pub(crate) fn new() -> Self {
        Self::after(now_ms().saturating_mul(1000))
    }

    fn after(last: u64) -> Self {
        Self { kept: Mutex::new((last, VecDeque::new())), sender: broadcast::Sender::new(KEPT) }
    }

    /// Says that something happened.
    pub(crate) fn say(&self, kind: &'static str, subject: impl Into<String>, data: serde_json::Value) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.0 += 1;
        let event = Arc::new(Event { id: kept.0, time_ms: now_ms(), kind, subject: subject.into(), data });
        if kept.1.len() == KEPT {
            kept.1.pop_front();
        }
        kept.1.push_back(Arc::clone(&event));
        // Under the lock: who subscribes sees each event once. That nobody listens is fine.
        let _ = self.sender.send(event);
    }

    /// What came after event `after`, and what comes. If some of it is not there any more, the first says so.
    pub(crate) fn listen(&self, after: Option<u64>) -> (Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(after) = after else { return (Vec::new(), self.sender.subscribe()) };
        let mut missed: Vec<Arc<Event>> = Vec::new();
        let first = kept.1.front().map_or(kept.0 + 1, |event| event.id);
        // A number from before the daemon's start is ahead of ours. The first is 1 at least.
        if after < first - 1 || after > kept.0 {
            missed.push(Arc::new(Self::missed(kept.0)));
        }
        missed.extend(kept.1.iter().filter(|event| event.id > after).cloned());
        (missed, self.sender.subscribe())
    }

    /// What stands for events that are lost.
    pub(crate) fn missed(id: u64) -> Event {
        Event { id, time_ms: now_ms(), kind: "missed", subject: String::new(), data: serde_json::Value::Null }
    }
}

pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_away_gets_what_it_missed_or_is_told_that_it_is_lost() {
        let hub = Hub::after(0);
        for number in 0..KEPT + 10 {
            hub.say("fork.created", number.to_string(), serde_json::Value::Null);
        }
        let ids = |after| hub.listen(after).0.iter().map(|event| (event.id, event.kind)).collect::<Vec<_>>();
        assert_eq!(ids(Some(1033)), [(1034, "fork.created")]);
        assert_eq!(ids(None), []);
        let lost = ids(Some(3));
        assert_eq!((lost[0].1, lost.len()), ("missed", KEPT + 1));
        assert_eq!(ids(Some(5000))[0].1, "missed", "it never was");
        assert_eq!(ids(Some(u64::MAX))[0].1, "missed", "nor will it be");
        let next = Hub::new();
        next.say("fork.created", "x", serde_json::Value::Null);
        assert_eq!(next.listen(Some(1034)).0[0].kind, "missed", "of another life of the daemon");
    }
}
