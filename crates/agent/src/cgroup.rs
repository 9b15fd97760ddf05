//! Control groups of the workload: one below another, one for each process that the agent starts.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Instant,
};

use rustix::event::{PollFd, PollFlags};

/// Where the agent mounts the cgroup hierarchy.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// A control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

/// What `cgroup.events` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Events {
    /// Whether a process is in the group or below it.
    pub populated: bool,
    /// Whether every process in it is frozen.
    pub frozen: bool,
}

impl Events {
    /// Reads the file's text: lines of a key, a space and 0 or 1. Unknown keys are skipped.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut events = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("populated", value)) => events.populated = value == "1",
                Some(("frozen", value)) => events.frozen = value == "1",
                _ => {}
            }
        }
        events
    }
}

impl Cgroup {
    /// The group at `path`, made if it is not there.
    ///
    /// # Errors
    /// If it can not be made.
    pub fn create(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(Self(path)),
        }
    }

    /// A group below this one, made if it is not there.
    ///
    /// # Errors
    /// If it can not be made.
    pub fn child(&self, name: &str) -> io::Result<Self> {
        Self::create(self.0.join(name))
    }

    /// The group's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes one of the group's files.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        // Not fs::write: the files can not be created or truncated.
        let file = fs::OpenOptions::new().write(true).open(self.0.join(file))?;
        rustix::io::write(&file, value.as_bytes())?;
        Ok(())
    }

    /// Reads one of the group's files, without the last newline.
    ///
    /// # Errors
    /// If it can not be read.
    pub fn read(&self, file: &str) -> io::Result<String> {
        let mut text = fs::read_to_string(self.0.join(file))?;
        text.truncate(text.trim_end().len());
        Ok(text)
    }

    /// Waits until `cgroup.events` says what `wanted` looks for. The kernel wakes a poller at every change.
    ///
    /// # Errors
    /// `TimedOut` at the deadline; otherwise if the file can not be read.
    pub fn wait_events(&self, deadline: Instant, wanted: impl Fn(Events) -> bool) -> io::Result<()> {
        let file = fs::File::open(self.0.join("cgroup.events"))?;
        let mut buffer = [0; 256];
        loop {
            let len = rustix::io::pread(&file, &mut buffer, 0)?;
            if wanted(Events::parse(&String::from_utf8_lossy(&buffer[..len]))) {
                return Ok(());
            }
            let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
            let timeout = left.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
            match rustix::event::poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Freezes every process in the group and below, and waits until the kernel says that all are.
    ///
    /// # Errors
    /// `TimedOut` if one does not freeze in time (it may be in uninterruptible sleep).
    pub fn freeze(&self, deadline: Instant) -> io::Result<()> {
        self.write("cgroup.freeze", "1")?;
        self.wait_events(deadline, |events| events.frozen)
    }

    /// Lets them run again.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn thaw(&self) -> io::Result<()> {
        self.write("cgroup.freeze", "0")
    }

    /// Ends every process in the group and below (SIGKILL), and waits until they are gone.
    ///
    /// # Errors
    /// `TimedOut` if one is not gone in time.
    pub fn kill(&self, deadline: Instant) -> io::Result<()> {
        self.write("cgroup.kill", "1")?;
        self.wait_events(deadline, |events| !events.populated)
    }

    /// Removes the group; it must be empty.
    ///
    /// # Errors
    /// If it is not empty.
    pub fn remove(&self) -> io::Result<()> {
        fs::remove_dir(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_by_key_and_not_by_place() {
        assert_eq!(Events::parse("populated 1\nfrozen 0\n"), Events { populated: true, frozen: false });
        assert_eq!(Events::parse("frozen 1\nother 7\npopulated 0\n"), Events { populated: false, frozen: true });
        assert_eq!(Events::parse("frozen 10\nnotfrozen 1\n\nx"), Events::default());
        assert_eq!(Events::parse(""), Events::default());
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let folder = std::env::temp_dir().join(format!("offshoot-cgroup-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let group = Cgroup(folder.clone());
        let deadline = Instant::now() + std::time::Duration::from_millis(20);
        let result = group.wait_events(deadline, |events| events.frozen);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        group.wait_events(deadline, |events| events.populated).unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
