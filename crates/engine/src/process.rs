//! Processes known by pid **and** start time: a pid alone may by now be somebody else's.

use std::{
    fs, io,
    os::fd::OwnedFd,
    process::Child,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

/// A process, for ever: pid, start time and the boot of the host it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessRef {
    /// The pid.
    pub pid: u32,
    /// Start time in clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
    /// The host's boot id: after a reboot every recorded process is gone.
    pub boot_id: String,
}

impl ProcessRef {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start_time: start_time(pid)?, boot_id: boot_id()? })
    }

    /// This very process.
    ///
    /// # Errors
    /// If `/proc` can not be read.
    pub fn myself() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whether it is still there and no zombie. If that can not be found out it counts as alive: nobody is to be taken for dead, and
    /// reaped with all he has, because whoever looks has no descriptor left to look with.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.look().unwrap_or(true)
    }

    /// Whether it is still there and no zombie.
    ///
    /// # Errors
    /// If `/proc` can not be read, for another reason than that the process is gone.
    pub fn look(&self) -> io::Result<bool> {
        if boot_id()? != self.boot_id {
            return Ok(false);
        }
        match stat(self.pid) {
            Ok((state, start)) => Ok(start == self.start_time && state != 'Z' && state != 'X'),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A descriptor of the process; `None` if it is gone.
    ///
    /// # Errors
    /// If the kernel refuses for another reason.
    pub fn pidfd(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            // The last two: by now the number is that of a thread, before and since Linux 6.9.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The descriptor holds the pid now; if the start time still matches, it is the one we mean.
        Ok(self.look()?.then_some(fd))
    }

    /// Kills it and waits until it is gone. Nothing happens if it is gone already or the pid is another process'.
    ///
    /// # Errors
    /// `TimedOut` if it does not end within `limit`; `PermissionDenied` if it is somebody else's.
    pub fn kill(&self, limit: Duration) -> io::Result<()> {
        let Some(fd) = self.pidfd()? else { return Ok(()) };
        match pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        if wait_gone(&fd, limit)? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}

/// Children that live on without anybody who waits for them.
static LEFT: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Lets a child live on. In a program that ends soon, whoever comes next is its parent; one that stays calls [`reap`] now and then.
pub fn leave(child: Child) {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(child);
}

/// Takes those of the [left](leave) children off the system's list that have ended; how many they were. It does not wait.
pub fn reap() -> usize {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    let before = left.len();
    left.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    before - left.len()
}

/// Waits until the process behind a pidfd has ended; false when `limit` passed first.
///
/// # Errors
/// If poll fails.
pub fn wait_gone(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a file of `/proc/PID` could not be opened, or not be read, because there is no such process.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    [rustix::io::Errno::NOENT, rustix::io::Errno::SRCH]
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&error.raw_os_error())
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn start_time(pid: u32) -> io::Result<u64> {
    stat(pid).map(|(_, start)| start)
}

/// State and start time from `/proc/PID/stat`. The command name may hold anything, so fields are counted after its `)`.
fn stat(pid: u32) -> io::Result<(char, u64)> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    let text = String::from_utf8_lossy(&text);
    let parse = || {
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some((state, fields.nth(18)?.parse().ok()?))
    };
    parse().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/PID/stat"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn o2_a_child_that_was_left_is_no_zombie_for_ever() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessRef::of(child.id()).unwrap();
        leave(child);
        assert_eq!((reap(), process.is_alive()), (0, true));
        process.kill(Duration::from_secs(10)).unwrap();
        let of_it = || fs::read_to_string(format!("/proc/{}/stat", process.pid)).is_ok();
        assert!(of_it(), "its end is not told yet");
        assert_eq!((reap(), of_it()), (1, false));
    }

    #[test]
    fn o2_a_reused_pid_is_another_process() {
        let mut mine = ProcessRef::myself().unwrap();
        assert!(mine.is_alive());
        mine.start_time += 1;
        assert!(!mine.is_alive());
        assert!(mine.kill(Duration::from_secs(1)).is_ok(), "killing what is gone is no error, and kills nobody");
        let mut rebooted = ProcessRef::myself().unwrap();
        rebooted.boot_id = "another".into();
        assert!(!rebooted.is_alive());
    }

    /// Says that it is started by [`o2_a_process_that_can_not_be_looked_at_is_not_dead`].
    const ALONE: &str = "OFFSHOOT_TEST_ALONE";

    #[test]
    fn o2_a_process_that_can_not_be_looked_at_is_not_dead() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        if std::env::var_os(ALONE).is_none() {
            // In a process of its own: other tests open files.
            let test = "process::tests::o2_a_process_that_can_not_be_looked_at_is_not_dead";
            let mut alone = Command::new(std::env::current_exe().unwrap());
            let ran = alone.args(["--exact", test]).env(ALONE, "1").output().unwrap();
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
            return;
        }
        // It is not to hold the pipe that this process is read from, should this fail.
        let mut neighbour =
            Command::new("sleep").arg("1000").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let (lives, mut gone) = (ProcessRef::of(neighbour.id()).unwrap(), ProcessRef::myself().unwrap());
        gone.start_time += 1;
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: limit.maximum }).unwrap();
        let seen = (lives.is_alive(), gone.is_alive(), lives.look().is_err(), lives.pidfd().is_err());
        let killed = lives.kill(Duration::from_secs(1));
        setrlimit(Resource::Nofile, limit).unwrap();
        assert_eq!(seen, (true, true, true, true));
        assert!(killed.is_err(), "it was not ended, and that is said");
        assert!(lives.is_alive() && !gone.is_alive());
        lives.kill(Duration::from_secs(5)).unwrap();
        neighbour.wait().unwrap();
        assert!(!lives.look().unwrap(), "there is no such process");
    }

    #[test]
    fn kill_waits_until_the_process_is_gone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut neighbour = Command::new("sleep").arg("1000").spawn().unwrap();
        let (process, other) = (ProcessRef::of(child.id()).unwrap(), ProcessRef::of(neighbour.id()).unwrap());
        process.kill(Duration::from_secs(5)).unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(other.is_alive());
        other.kill(Duration::from_secs(5)).unwrap();
        neighbour.wait().unwrap();
    }
}
