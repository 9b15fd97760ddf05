//! Waiting until a fork runs as itself: what changes on disk wakes all who wait, and each looks for itself.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
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
}

impl Hold {
    /// Begins to watch, in a thread that ends with what is returned, or a while later.
    pub(crate) fn begin(home: &Home) -> io::Result<Self> {
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
        Ok(Self { home: home.clone(), standings, changes, changed })
    }

    /// Where a name leads now.
    pub(crate) fn look(&self, fork: &ForkName) -> io::Result<Standing> {
        self.standings.look(fork)
    }

    /// Where it leads once it does not have to be waited for any more, or at `until`.
    pub(crate) async fn wait(&self, fork: &ForkName, until: Instant) -> io::Result<Standing> {
        let mut changed = self.changed.clone();
        let mut watched = None;
        loop {
            changed.mark_unchanged();
            let standing = self.look(fork)?;
            let Standing::NotYet(what) = &standing else { return Ok(standing) };
            if Instant::now() >= until {
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
