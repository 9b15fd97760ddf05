//! The device thread: it waits for the host's ends of the devices (sockets, pipes, taps) and calls the devices back.
//!
//! Descriptors are watched edge-triggered. A device remembers what it was told and uses a descriptor until the kernel says
//! "would block"; so a host that hung up while the guest is not reading costs nothing, where a level-triggered watch would spin.
//! A callback may come for something that is no longer so: every callback must work with non-blocking descriptors.
//!
//! The loop starts paused. While it is paused no callback runs, so no guest memory is touched: what happens meanwhile is
//! delivered afterwards.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use rustix::{
    buffer::spare_capacity,
    event::{EventfdFlags, epoll, eventfd},
    io::Errno,
};
use thiserror::Error;

/// Most handlers one loop can have: one bit each in a word.
pub const MAX_HANDLERS: usize = 64;

/// Events taken from the kernel at once.
const BATCH: usize = 32;

/// The key of the loop's own eventfd; handlers' keys have the handler's number, below [`MAX_HANDLERS`], in the upper half.
const WAKE: u64 = u64::MAX;

/// Stack of the device thread, bytes. Its callbacks keep their buffers on the heap or in guest memory.
const STACK_BYTES: usize = 256 * 1024;

/// Why the device thread could not be started, or a descriptor not be watched.
#[derive(Debug, Error)]
pub enum EventsError {
    /// epoll or eventfd failed.
    #[error("host events can not be watched")]
    Epoll(#[source] io::Error),
    /// No thread.
    #[error("the device thread could not be started")]
    Thread(#[source] io::Error),
    /// More than [`MAX_HANDLERS`].
    #[error("more than {MAX_HANDLERS} devices want host events")]
    TooManyHandlers,
}

/// What a descriptor is ready for. After an error or a hang-up it counts as ready for both: the call will say what is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// There is something to read or accept.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The other side is gone, at least for sending.
    pub hang_up: bool,
}

/// What the loop tells a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostEvent {
    /// The descriptor registered with this key became ready.
    Ready(u32, Readiness),
    /// The handler asked for this call with [`Watcher::request`].
    Requested,
}

/// Something with host descriptors: a device behind its lock.
pub trait EventHandler: Send + Sync {
    /// Called on the device thread, never while the loop is paused. Must not block, and must bound its work: with more to
    /// do it calls [`Watcher::request`] and returns, so that the other devices get their turn.
    fn host_event(&self, event: HostEvent);
}

/// The device thread of one machine. Dropping it ends the thread.
pub struct EventLoop {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

/// A handler's access to the loop: which descriptors are watched for it.
#[derive(Clone)]
pub struct Watcher {
    shared: Arc<Shared>,
    handler: u32,
}

struct Shared {
    epoll: OwnedFd,
    wake: OwnedFd,
    /// Handlers to be called without an event of theirs, a bit each.
    requested: AtomicU64,
    /// Somebody waits for the gate: the device thread stays away from it, or a busy loop would keep it for ever.
    pausing: AtomicBool,
    /// Held while callbacks run.
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    running: bool,
    ended: bool,
    handlers: Vec<Arc<dyn EventHandler>>,
}

impl EventLoop {
    /// Starts the device thread, paused. `on_thread` runs on it first (for example to load its system call filter).
    ///
    /// # Errors
    /// [`EventsError`] if the kernel has no more descriptors or threads.
    pub fn start(on_thread: impl FnOnce() + Send + 'static) -> Result<Self, EventsError> {
        let failed = |errno: Errno| EventsError::Epoll(errno.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), flags).map_err(failed)?;
        let shared = Arc::new(Shared {
            epoll,
            wake,
            requested: AtomicU64::new(0),
            pausing: AtomicBool::new(false),
            gate: Mutex::default(),
            changed: Condvar::new(),
        });
        let ours = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("devices".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                on_thread();
                ours.run();
            })
            .map_err(EventsError::Thread)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Adds a handler. It gets events for what is then watched through the returned [`Watcher`].
    ///
    /// # Errors
    /// [`EventsError::TooManyHandlers`].
    pub fn register(&self, handler: Arc<dyn EventHandler>) -> Result<Watcher, EventsError> {
        let mut gate = self.shared.close_gate();
        let number = gate.handlers.len();
        if number >= MAX_HANDLERS {
            return Err(EventsError::TooManyHandlers);
        }
        gate.handlers.push(handler);
        let handler = u32::try_from(number).map_err(|_| EventsError::TooManyHandlers)?;
        Ok(Watcher { shared: Arc::clone(&self.shared), handler })
    }

    /// Lets callbacks run.
    pub fn resume(&self) {
        self.shared.close_gate().running = true;
        self.shared.changed.notify_all();
    }

    /// Waits until the callback under way, if any, is over; then none runs until [`resume`](Self::resume).
    /// Must not be called by a callback, nor with a device's lock held.
    pub fn pause(&self) {
        self.shared.close_gate().running = false;
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        {
            let mut gate = self.shared.close_gate();
            gate.ended = true;
            // Handlers own watchers, which own what is shared with the loop: a cycle, cut here.
            gate.handlers.clear();
        }
        self.shared.changed.notify_all();
        self.shared.wake_up();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").finish_non_exhaustive()
    }
}

impl Watcher {
    /// Watches a non-blocking descriptor for reading, writing and hang-up. The first event, for what it is ready for
    /// already, follows at once. Closing the descriptor (its last copy) ends the watch.
    ///
    /// # Errors
    /// `PermissionDenied` for descriptors that never block (regular files); or as `epoll_ctl(2)`.
    pub fn add(&self, fd: impl AsFd, key: u32) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(u64::from(self.handler) << 32 | u64::from(key));
        Ok(epoll::add(&self.shared.epoll, fd, data, flags)?)
    }

    /// Ends the watch of a descriptor. An event that is on its way may still arrive.
    pub fn remove(&self, fd: impl AsFd) {
        // Not watched: then there is nothing to end.
        let _ = epoll::delete(&self.shared.epoll, fd);
    }

    /// Asks for a call with [`HostEvent::Requested`] on the device thread, soon.
    pub fn request(&self) {
        self.shared.requested.fetch_or(1 << self.handler, Ordering::AcqRel);
        self.shared.wake_up();
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").field("handler", &self.handler).finish_non_exhaustive()
    }
}

impl Shared {
    fn close_gate(&self) -> MutexGuard<'_, Gate> {
        self.pausing.store(true, Ordering::Release);
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.pausing.store(false, Ordering::Release);
        self.changed.notify_all();
        gate
    }

    fn wake_up(&self) {
        // Fails only if the counter is full, and then the thread has been woken.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// The gate, once it is open; none if the loop has ended.
    fn pass_gate(&self) -> Option<MutexGuard<'_, Gate>> {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if gate.ended {
                return None;
            }
            if gate.running && !self.pausing.load(Ordering::Acquire) {
                return Some(gate);
            }
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(BATCH);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                // Only a bug can do this; devices without host events are better than a spinning thread.
                Err(_) => return,
            }
            for event in &events {
                let Some(gate) = self.pass_gate() else { return };
                self.dispatch(&gate, event);
            }
        }
    }

    fn dispatch(&self, gate: &Gate, event: &epoll::Event) {
        let data = event.data.u64();
        if data == WAKE {
            let mut count = [0; 8];
            // Would block: a wake-up that an earlier one has taken with it.
            let _ = rustix::io::read(&self.wake, &mut count);
            let requested = self.requested.swap(0, Ordering::AcqRel);
            for (number, handler) in gate.handlers.iter().enumerate() {
                if requested & 1 << number != 0 {
                    handler.host_event(HostEvent::Requested);
                }
            }
            return;
        }
        let Ok(number) = usize::try_from(data >> 32) else { return };
        let Some(handler) = gate.handlers.get(number) else { return };
        let key = u32::try_from(data & u64::from(u32::MAX)).unwrap_or_default();
        let flags = event.flags;
        let hang_up = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::RDHUP | epoll::EventFlags::ERR);
        let readiness = Readiness {
            readable: hang_up || flags.contains(epoll::EventFlags::IN),
            writable: hang_up || flags.contains(epoll::EventFlags::OUT),
            hang_up,
        };
        handler.host_event(HostEvent::Ready(key, readiness));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream, sync::mpsc, time::Duration};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);
    /// Long enough for an event that should not come.
    const MOMENT: Duration = Duration::from_millis(50);

    struct Recorder(Mutex<mpsc::Sender<HostEvent>>);

    impl EventHandler for Recorder {
        fn host_event(&self, event: HostEvent) {
            let _ = self.0.lock().unwrap().send(event);
        }
    }

    fn recorder() -> (Arc<Recorder>, mpsc::Receiver<HostEvent>) {
        let (sender, receiver) = mpsc::channel();
        (Arc::new(Recorder(Mutex::new(sender))), receiver)
    }

    #[test]
    fn a_hang_up_that_nobody_answers_is_told_once() {
        let events = EventLoop::start(|| ()).unwrap();
        let (handler, heard) = recorder();
        let watcher = events.register(handler).unwrap();
        events.resume();
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        watcher.add(&ours, 7).unwrap();
        let first = heard.recv_timeout(PATIENCE).unwrap();
        assert_eq!(first, HostEvent::Ready(7, Readiness { readable: false, writable: true, hang_up: false }));
        theirs.write_all(b"unread").unwrap();
        drop(theirs);
        let mut last = heard.recv_timeout(PATIENCE).unwrap();
        while let Ok(event) = heard.recv_timeout(MOMENT) {
            last = event;
        }
        assert_eq!(last, HostEvent::Ready(7, Readiness { readable: true, writable: true, hang_up: true }));
        assert!(heard.recv_timeout(MOMENT).is_err());
    }

    #[test]
    fn a_paused_loop_calls_nobody_and_forgets_nothing() {
        let events = EventLoop::start(|| ()).unwrap();
        let (handler, heard) = recorder();
        let watcher = events.register(handler).unwrap();
        watcher.request();
        assert!(heard.recv_timeout(MOMENT).is_err());
        events.resume();
        assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), HostEvent::Requested);
        events.pause();
        let (ours, theirs) = UnixStream::pair().unwrap();
        watcher.add(&ours, 1).unwrap();
        watcher.request();
        assert!(heard.recv_timeout(MOMENT).is_err());
        events.resume();
        let two = [heard.recv_timeout(PATIENCE).unwrap(), heard.recv_timeout(PATIENCE).unwrap()];
        assert!(two.contains(&HostEvent::Requested));
        drop(theirs);
    }

    /// A handler that asks for another call in every call.
    struct Busy(Mutex<Option<Watcher>>, AtomicU64);

    impl EventHandler for Busy {
        fn host_event(&self, _event: HostEvent) {
            self.1.fetch_add(1, Ordering::Relaxed);
            if let Some(watcher) = &*self.0.lock().unwrap() {
                watcher.request();
            }
        }
    }

    #[test]
    fn a_busy_handler_keeps_neither_the_others_nor_a_pause_waiting() {
        let events = EventLoop::start(|| ()).unwrap();
        let busy = Arc::new(Busy(Mutex::new(None), AtomicU64::new(0)));
        let watcher = events.register(busy.clone()).unwrap();
        *busy.0.lock().unwrap() = Some(watcher.clone());
        let (handler, heard) = recorder();
        let other = events.register(handler).unwrap();
        events.resume();
        watcher.request();
        for _ in 0..100 {
            other.request();
            assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), HostEvent::Requested);
            events.pause();
            let count = busy.1.load(Ordering::Relaxed);
            thread::yield_now();
            assert_eq!(busy.1.load(Ordering::Relaxed), count);
            events.resume();
        }
        drop(events);
        let count = busy.1.load(Ordering::Relaxed);
        assert!(count > 0);
    }

    #[test]
    fn handlers_are_dropped_with_the_loop() {
        let events = EventLoop::start(|| ()).unwrap();
        let busy = Arc::new(Busy(Mutex::new(None), AtomicU64::new(0)));
        *busy.0.lock().unwrap() = Some(events.register(busy.clone()).unwrap());
        drop(events);
        assert_eq!(Arc::strong_count(&busy), 1);
    }
}
