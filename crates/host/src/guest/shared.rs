//! Channels to guests that many requests of one process share: a guest has eight, and each carries as many requests as there are.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use identity::ForkId;

use super::{GuestChannel, GuestError};
use crate::{Home, forks, record::ForkRecord};

/// How long a channel that nobody uses is kept. Opening one takes some milliseconds, and one that is open keeps the guest from being idle.
const LINGER: Duration = Duration::from_secs(3);

/// A machine of a fork: one that came back from standby is another.
type Machine = (ForkId, u32, u64);
type Slot = Arc<tokio::sync::Mutex<Option<Kept>>>;

#[derive(Debug)]
struct Kept {
    channel: GuestChannel,
    used: Instant,
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
    /// The channel to a fork's agent; whoever comes first opens it within `limit`, and the others wait for that. Needs a runtime.
    ///
    /// # Errors
    /// As [`GuestChannel::connect`].
    pub async fn get(&self, home: &Home, record: &ForkRecord, limit: Duration) -> Result<GuestChannel, GuestError> {
        let key = machine(record);
        let (slot, is_new) = {
            let mut slots = lock(&self.slots);
            let is_new = !slots.contains_key(&key);
            (Arc::clone(slots.entry(key.clone()).or_default()), is_new)
        };
        if is_new {
            self.sweep(key, Arc::clone(&slot));
        }
        let mut kept = slot.lock().await;
        if let Some(kept) = kept.as_mut().filter(|kept| !kept.channel.is_gone()) {
            kept.used = Instant::now();
            return Ok(kept.channel.clone());
        }
        let channel = GuestChannel::connect(&forks::dir(home, record), limit).await?;
        *kept = Some(Kept { channel: channel.clone(), used: Instant::now() });
        Ok(channel)
    }

    /// Closes a channel once nobody has used it for [`LINGER`].
    fn sweep(&self, key: Machine, slot: Slot) {
        let slots = Arc::downgrade(&self.slots);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LINGER).await;
                let mut kept = slot.lock().await;
                let idle = |kept: &Kept| {
                    kept.channel.is_gone() || (kept.used.elapsed() >= LINGER && !kept.channel.is_shared())
                };
                if kept.as_ref().is_some_and(|kept| !idle(kept)) {
                    continue;
                }
                let Some(slots) = slots.upgrade() else { return };
                // Whoever has taken the slot by now waits for its lock, and puts a channel into one that nobody finds: it ends with its use.
                lock(&slots).remove(&key);
                *kept = None;
                return;
            }
        });
    }
}
