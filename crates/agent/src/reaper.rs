//! Takes in every process of the guest that ends.
//!
//! Pid 1 is the parent of every orphan, so it must wait for any child; and the one who started a process must still get
//! its exit status. One thread does all waiting. It first looks for an ended child without reaping it, and reaps it only
//! under the table's lock. A start holds that lock from before the fork until the child is in the table. So a child can
//! not be reaped before its owner is known, and no pid is used again while somebody may still think it is his.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Exit {
    /// The exit code as a shell shows it: 128 + signal if a signal ended the process.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }

    /// Whether the process exited with code 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

/// Where a process' exit will be known.
#[derive(Debug, Default)]
pub(crate) struct ExitCell {
    exit: Mutex<Option<Exit>>,
    blocking: Condvar,
    asynchronous: tokio::sync::Notify,
}

impl ExitCell {
    fn set(&self, exit: Exit) {
        *self.exit.lock().unwrap_or_else(PoisonError::into_inner) = Some(exit);
        self.blocking.notify_all();
        self.asynchronous.notify_waiters();
    }

    pub(crate) fn get(&self) -> Option<Exit> {
        *self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<Exit> {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        while exit.is_none() {
            exit = match deadline {
                None => self.blocking.wait(exit).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.blocking.wait_timeout(exit, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        *exit
    }

    pub(crate) async fn exited(&self) -> Exit {
        loop {
            // Registered before the look, so that an exit in between is not missed.
            let mut notified = std::pin::pin!(self.asynchronous.notified());
            notified.as_mut().enable();
            if let Some(exit) = self.get() {
                return exit;
            }
            notified.await;
        }
    }
}

type Table = HashMap<i32, Arc<ExitCell>>;

/// Reaps children. Clones share one table.
#[derive(Debug, Clone, Default)]
pub struct Reaper {
    /// Children whose exit somebody waits for. While this is locked, nothing is reaped.
    table: Arc<Mutex<Table>>,
    /// Wakes the thread when it found no child at all.
    started: Arc<Condvar>,
}

/// Holds off all reaping while a child is started.
#[derive(Debug)]
pub(crate) struct Starting<'a> {
    table: MutexGuard<'a, Table>,
    started: &'a Condvar,
}

impl Starting<'_> {
    /// Registers the child that was started.
    pub(crate) fn register(mut self, pid: i32) -> Arc<ExitCell> {
        let cell = Arc::new(ExitCell::default());
        self.table.insert(pid, Arc::clone(&cell));
        self.started.notify_one();
        cell
    }
}

impl Reaper {
    /// Starts the thread that reaps.
    ///
    /// # Errors
    /// If the thread can not be started.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let this = reaper.clone();
        thread::Builder::new().name("reaper".into()).stack_size(256 * 1024).spawn(move || this.run())?;
        Ok(reaper)
    }

    pub(crate) fn starting(&self) -> Starting<'_> {
        Starting { table: self.lock(), started: &self.started }
    }

    fn run(&self) {
        loop {
            match wait(Wait::AnyPeek) {
                Ok(Some((pid, _))) => self.reap(pid),
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                    // No child at all. An orphan only comes from a registered child, so one of those must come first.
                    let table = self.lock();
                    if table.is_empty() {
                        drop(self.started.wait(table).unwrap_or_else(PoisonError::into_inner));
                    }
                }
                Ok(None) | Err(_) => {}
            }
        }
    }

    fn reap(&self, pid: i32) {
        let mut table = self.lock();
        // A start that failed reaps its child itself; then there is nothing left here.
        let Ok(Some((_, exit))) = wait(Wait::Reap(pid)) else { return };
        if let Some(cell) = table.remove(&pid) {
            drop(table);
            cell.set(exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Wait {
    /// Blocks until any child has ended, and leaves it as it is.
    AnyPeek,
    /// Reaps this child if it has ended.
    Reap(i32),
}

fn wait(what: Wait) -> io::Result<Option<(i32, Exit)>> {
    let (kind, id, options) = match what {
        Wait::AnyPeek => (libc::P_ALL, 0, libc::WEXITED | libc::WNOWAIT),
        Wait::Reap(pid) => (libc::P_PID, pid.unsigned_abs(), libc::WEXITED | libc::WNOHANG),
    };
    // SAFETY: all zeroes is a valid siginfo_t, and waitid writes nothing but that.
    let info = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        if libc::waitid(kind, id, &raw mut info, options) != 0 {
            return Err(io::Error::last_os_error());
        }
        info
    };
    // SAFETY: waitid fills these fields (or leaves them zero when no child had ended).
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let exit = if info.si_code == libc::CLD_EXITED { Exit::Code(status) } else { Exit::Signal(status) };
    Ok((pid != 0).then_some((pid, exit)))
}
