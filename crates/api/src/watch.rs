//! The forks as they are on disk, without reading each of them each time; and a thread that tells what changes, whoever changed it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use host::{
    ForkRecord, Home, forks,
    record::{self, RECORD},
};
use identity::ForkId;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::inotify,
};
use serde_json::json;
use store::Store;

use crate::{events::Hub, model::view::State};

/// How long a change that no watch sees stays unseen.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// How soon to look at what will be known soon.
const SOON: Duration = Duration::from_millis(20);

/// Which content of a file it is: inode, and the time of the last change.
type Stamp = (u64, i64, i64);

#[derive(Debug, Clone)]
struct Cached {
    stamp: Stamp,
    record: Arc<ForkRecord>,
    /// Its process; none if that had ended when it was looked for.
    process: Option<Arc<OwnedFd>>,
}

/// The forks of one home.
#[derive(Debug)]
pub(crate) struct Forks {
    home: Home,
    cache: Mutex<HashMap<ForkId, Cached>>,
}

impl Forks {
    pub(crate) fn new(home: &Home) -> Self {
        Self { home: home.clone(), cache: Mutex::default() }
    }

    /// All, oldest first. What is on disk counts: a record that has changed is read again.
    pub(crate) fn list(&self) -> io::Result<Vec<(Arc<ForkRecord>, State)>> {
        let all = self.look()?;
        let mut fds: Vec<PollFd<'_>> =
            all.iter().filter_map(|cached| Some(PollFd::new(cached.process.as_ref()?, PollFlags::IN))).collect();
        // A process' descriptor can be read from once the process has ended.
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let mut polled = fds.iter().map(|fd| fd.revents().is_empty());
        let lives: Vec<bool> =
            all.iter().map(|cached| cached.process.is_some() && polled.next().unwrap_or(false)).collect();
        let states =
            all.iter().zip(lives).map(|(cached, lives)| (Arc::clone(&cached.record), state(&cached.record, lives)));
        let mut list: Vec<_> = states.collect();
        list.sort_by(|(a, _), (b, _)| (a.created_ms, &a.name).cmp(&(b.created_ms, &b.name)));
        Ok(list)
    }

    fn look(&self) -> io::Result<Vec<Cached>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(self.home.forks())? {
            let name = entry?.file_name();
            let Some(id) = name.to_str().and_then(|name| ForkId::parse(name).ok()) else { continue };
            if let Ok(meta) = fs::metadata(self.home.forks().join(id.as_str()).join(RECORD)) {
                found.insert(id, (meta.ino(), meta.mtime(), meta.mtime_nsec()));
            }
        }
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|id, _| found.contains_key(id));
        let mut all = Vec::with_capacity(found.len());
        for (id, stamp) in found {
            match cache.get(&id) {
                Some(cached) if cached.stamp == stamp => all.push(cached.clone()),
                _ => {
                    let Some(record) = record::find(&self.home, id.as_str())? else { continue };
                    // That it can not be looked at now does not make it dead for ever.
                    let process = record.process.pidfd()?.map(Arc::new);
                    let cached = Cached { stamp, record: Arc::new(record), process };
                    cache.insert(id, cached.clone());
                    all.push(cached);
                }
            }
        }
        Ok(all)
    }

    fn processes(&self) -> Vec<Arc<OwnedFd>> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.values().filter_map(|cached| cached.process.clone()).collect()
    }
}

/// Where a fork is in its life.
pub(crate) fn state(record: &ForkRecord, lives: bool) -> State {
    match (&record.standby, lives) {
        (Some(_), _) => State::Standby,
        (None, true) => State::Running,
        (None, false) => State::Dead,
    }
}

/// The same, asked now.
pub(crate) fn state_now(record: &ForkRecord) -> State {
    state(record, record.is_alive())
}

/// Has the watching thread look at once.
#[derive(Debug, Clone)]
pub(crate) struct Waker(Arc<OwnedFd>);

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(crate) fn wake(&self) {
        // It can only fail because it is set already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// Starts the thread that tells what changes. It ends with the process.
pub(crate) fn start(home: &Home, store: Store, forks: Arc<Forks>, hub: Arc<Hub>, waker: Waker) -> io::Result<()> {
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    let flags = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::MOVED_FROM | inotify::WatchFlags::DELETE;
    inotify::add_watch(&changes, home.forks(), flags)?;
    inotify::add_watch(&changes, home.data.join("templates"), flags)?;
    let mut seen = Seen::default();
    // What is there at the start is no news.
    seen.look(&forks, &store, None)?;
    let watch = move || {
        loop {
            let processes = forks.processes();
            let mut fds = vec![PollFd::new(&changes, PollFlags::IN), PollFd::new(&waker.0, PollFlags::IN)];
            let dead = seen.dead(&forks);
            fds.extend(
                processes.iter().filter(|fd| !dead(fd)).map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)),
            );
            if poll(&mut fds, Some(&LOOK_AGAIN)).is_err() {
                thread::sleep(Duration::from_secs(1));
            }
            drain(&changes);
            drain(&waker.0);
            // Machines that this process started are its children.
            engine::process::reap();
            match seen.look(&forks, &store, Some(&hub)) {
                // The end of its machine would wake this thread again and again.
                Ok(true) => thread::sleep(SOON),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "the forks could not be looked at"),
            }
        }
    };
    thread::Builder::new().name("watch".into()).spawn(watch)?;
    Ok(())
}

fn drain(fd: &OwnedFd) {
    let mut buffer = [0; 4096];
    while rustix::io::read(fd, &mut buffer).is_ok_and(|count| count > 0) {}
}

/// What was there at the last look.
#[derive(Debug, Default)]
struct Seen {
    forks: BTreeMap<ForkId, (String, State)>,
    templates: BTreeSet<String>,
}

impl Seen {
    /// Whether a process is one whose end has been told: looking at it would return at once, for ever.
    fn dead(&self, forks: &Forks) -> impl Fn(&Arc<OwnedFd>) -> bool + use<> {
        let cache = forks.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let dead = |id: &ForkId| self.forks.get(id).is_none_or(|(_, state)| *state != State::Running);
        let fds: Vec<_> =
            cache.iter().filter(|(id, _)| dead(id)).filter_map(|(_, cached)| cached.process.clone()).collect();
        move |fd| fds.iter().any(|dead| Arc::ptr_eq(dead, fd))
    }

    /// Tells what is new. Whether something is on its way that will be known soon: a machine has ended, and somebody is at the fork, who may
    /// be removing it or putting it into standby.
    fn look(&mut self, forks: &Forks, store: &Store, hub: Option<&Hub>) -> io::Result<bool> {
        let mut soon = false;
        let mut now = BTreeMap::new();
        for (record, mut state) in forks.list()? {
            if let Some((_, before)) = self.forks.get(&record.id)
                && (state, *before) == (State::Dead, State::Running)
                && forks::is_busy(&forks.home, &record)
            {
                (state, soon) = (*before, true);
            }
            now.insert(record.id.clone(), (record.name.to_string(), state));
        }
        let say = |kind, subject: &str, data| {
            if let Some(hub) = hub {
                hub.say(kind, subject, data);
            }
        };
        for (id, (name, state)) in &now {
            let kind = match (self.forks.get(id).map(|(_, state)| *state), *state) {
                (None, State::Running | State::Standby) => "fork.created",
                (Some(before), now) if before == now => continue,
                (None | Some(_), State::Dead) => "fork.died",
                (Some(_), State::Standby) => "fork.standby",
                (Some(_), State::Running) => "fork.resumed",
            };
            say(kind, id.as_str(), json!({ "name": name, "state": state }));
        }
        for (id, (name, _)) in self.forks.iter().filter(|(id, _)| !now.contains_key(id)) {
            say("fork.removed", id.as_str(), json!({ "name": name }));
        }
        let listed = store.list().map_err(io::Error::other)?;
        let templates: BTreeSet<_> = listed.into_iter().flatten().map(|manifest| manifest.tag.to_string()).collect();
        templates.difference(&self.templates).for_each(|tag| say("template.created", tag, json!({})));
        self.templates.difference(&templates).for_each(|tag| say("template.removed", tag, json!({})));
        (self.forks, self.templates) = (now, templates);
        Ok(soon)
    }
}

/// A fork's directory.
pub(crate) fn dir(home: &Home, record: &ForkRecord) -> std::path::PathBuf {
    forks::dir(home, record)
}
