//! Waiting until a fork runs as itself: what changes on disk wakes all who wait, and each looks for itself.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use host::{
    ForkRecord, Home, forks, standby,
    standing::{Standing, Standings, Waiting},
};
use identity::ForkName;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
};
use store::Store;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// How long a change that no watch sees stays unseen.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often what is known of forks that are no more is forgotten.
const SWEEP: Duration = Duration::from_secs(30);
/// How often the watch finds out that nobody needs it any more.
const LOOK_UP: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Who waits for forks.
#[derive(Debug)]
pub(crate) struct Hold {
    home: Home,
    standings: Arc<Standings>,
    changes: Arc<OwnedFd>,
    changed: watch::Receiver<()>,
    /// Requests that wait, by the name that was asked for.
    held: Mutex<HashMap<ForkName, usize>>,
    /// Most of one name.
    most: usize,
}

/// One request that waits.
#[derive(Debug)]
struct Held<'a> {
    hold: &'a Hold,
    fork: &'a ForkName,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.hold.held();
        if let Some(count) = held.get_mut(self.fork) {
            *count -= 1;
            if *count == 0 {
                held.remove(self.fork);
            }
        }
    }
}

impl Hold {
    /// Begins to watch, in a thread that ends with what is returned, or a while later. At most `most` requests wait for one name at once.
    pub(crate) fn begin(home: &Home, most: usize) -> io::Result<Self> {
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        watch_for_changes(&changes, &home.forks())?;
        watch_for_changes(&changes, &home.names())?;
        let changes = Arc::new(changes);
        let standings = Arc::new(Standings::new(home));
        let (change, changed) = watch::channel(());
        let (reading, sweeping) = (Arc::clone(&changes), Arc::clone(&standings));
        let watch = move || {
            let mut swept = std::time::Instant::now();
            loop {
                if poll(&mut [PollFd::new(&*reading, PollFlags::IN)], Some(&LOOK_UP)).is_err() {
                    thread::sleep(LOOK_AGAIN);
                }
                // All that came: who waits looks at everything anyway.
                let mut buffer = [0; 4096];
                while rustix::io::read(&*reading, &mut buffer).is_ok_and(|count| count > 0) {}
                if swept.elapsed() >= SWEEP {
                    sweeping.sweep();
                    swept = std::time::Instant::now();
                }
                if change.send(()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("watch".into()).spawn(watch)?;
        Ok(Self { home: home.clone(), standings, changes, changed, held: Mutex::default(), most })
    }

    fn held(&self) -> MutexGuard<'_, HashMap<ForkName, usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more that waits for `fork`, unless there are too many.
    fn enter<'a>(&'a self, fork: &'a ForkName) -> Option<Held<'a>> {
        let mut held = self.held();
        let count = held.entry(fork.clone()).or_default();
        (*count < self.most).then(|| {
            *count += 1;
            Held { hold: self, fork }
        })
    }

    /// Where a name leads now.
    pub(crate) fn look(&self, fork: &ForkName) -> io::Result<Standing> {
        self.standings.look(fork)
    }

    /// Where it leads once it does not have to be waited for any more, or at `until`; at once, if too many wait for it already.
    pub(crate) async fn wait(&self, fork: &ForkName, until: Instant) -> io::Result<Standing> {
        let mut changed = self.changed.clone();
        let (mut watched, mut held) = (None, None);
        loop {
            changed.mark_unchanged();
            let standing = self.look(fork)?;
            let Standing::NotYet(what) = &standing else { return Ok(standing) };
            if Instant::now() >= until {
                return Ok(standing);
            }
            held = held.or_else(|| self.enter(fork));
            if held.is_none() {
                return Ok(standing);
            }
            if let Some(record) = what.record()
                && watched.as_ref() != Some(&record.id)
            {
                // The watch above its directory does not see what happens in it. If it is gone by now, that was seen.
                let _ = watch_for_changes(&self.changes, &forks::dir(&self.home, record));
                watched = Some(record.id.clone());
                continue;
            }
            let change = async {
                if let Waiting::Operation(record) = what {
                    self.settle(Arc::clone(record)).await;
                }
                if changed.changed().await.is_err() {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = change => {}
                () = sleep_until(until.min(Instant::now() + LOOK_AGAIN)) => {}
            }
        }
    }

    /// Brings back what somebody left in the middle and died, as every command does that finds it.
    async fn settle(&self, record: Arc<ForkRecord>) {
        let home = self.home.clone();
        let settle = move || {
            let store = Store::open(&home.data).ok()?;
            standby::settle(&home, &store, &record).ok()
        };
        // Whether it did is seen at the next look.
        let _ = tokio::task::spawn_blocking(settle).await;
    }
}

/// Records are renamed into place, and what is under way is removed when it is over.
fn watch_for_changes(changes: impl AsFd, dir: &Path) -> io::Result<()> {
    let flags = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::MOVED_FROM | inotify::WatchFlags::DELETE;
    inotify::add_watch(changes, dir, flags)?;
    Ok(())
}
