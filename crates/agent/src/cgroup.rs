//! Control groups of the workload: one below another, one for each process that the agent starts.

use std::{
    borrow::Cow,
    fs, io,
    path::{Path, PathBuf},
    time::Instant,
};

use identity::Limits;
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

    /// Sets the group's limits and reads each back. What is not limited now, and was `before`, is not limited any more.
    ///
    /// # Errors
    /// If the kernel refuses a limit or shows another one.
    pub fn set_limits(&self, before: Limits, limits: Limits) -> io::Result<Cow<'static, str>> {
        if before == limits {
            return Ok(if limits == Limits::default() { "none" } else { "kept" }.into());
        }
        for (file, before, value) in [
            ("pids.max", before.pids.map(|n| n.to_string()), limits.pids.map(|n| n.to_string())),
            ("memory.max", before.memory.map(pages), limits.memory.map(pages)),
            ("cpu.max", before.cpu_millis.map(quota), limits.cpu_millis.map(quota)),
        ] {
            if before == value {
                continue;
            }
            let none = if file == "cpu.max" { "max 100000" } else { "max" };
            let value = value.as_deref().unwrap_or(none);
            let refused = |error: io::Error| io::Error::new(error.kind(), format!("{file}: {error}"));
            self.write(file, value).map_err(refused)?;
            let shown = self.read(file).map_err(refused)?;
            if shown != value {
                return Err(io::Error::other(format!("{file} is {shown} after {value} was written")));
            }
        }
        Ok("set".into())
    }

    /// Lets the groups below this one be limited so.
    ///
    /// # Errors
    /// If the kernel has not what that takes.
    pub fn let_limit(&self, limits: Limits) -> io::Result<()> {
        for (controller, wanted) in
            [("pids", limits.pids.is_some()), ("memory", limits.memory.is_some()), ("cpu", limits.cpu_millis.is_some())]
        {
            if wanted {
                let refused =
                    |error: io::Error| io::Error::new(error.kind(), format!("controller {controller}: {error}"));
                self.write("cgroup.subtree_control", &format!("+{controller}")).map_err(refused)?;
            }
        }
        Ok(())
    }

    /// Removes the group; it must be empty.
    ///
    /// # Errors
    /// If it is not empty.
    pub fn remove(&self) -> io::Result<()> {
        fs::remove_dir(&self.0)
    }
}

/// The kernel counts memory in pages.
fn pages(bytes: u64) -> String {
    (bytes / 4096 * 4096).to_string()
}

/// Microseconds of CPU time in each period of 100 ms. The kernel's least quota is 1 ms.
fn quota(millis: u64) -> String {
    format!("{} 100000", millis.saturating_mul(100).max(1000))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_given_in_the_kernels_units() {
        assert_eq!(quota(500), "50000 100000");
        assert_eq!(quota(1), "1000 100000");
        assert_eq!(pages(4097), "4096");
    }

    #[test]
    fn f9_a_limit_that_the_kernel_does_not_know_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let group = Cgroup(folder.path().to_owned());
        let limits = Limits { memory: Some(16 << 20), pids: Some(8), ..Limits::default() };
        let refused = |result: io::Result<()>| result.unwrap_err().to_string();
        assert!(refused(group.let_limit(limits)).starts_with("controller pids: "));
        assert!(refused(group.set_limits(Limits::default(), limits).map(drop)).starts_with("pids.max: "));
        for file in ["cgroup.subtree_control", "pids.max", "memory.max"] {
            fs::write(folder.path().join(file), "").unwrap();
        }
        group.let_limit(limits).unwrap();
        group.set_limits(Limits::default(), limits).unwrap();
        assert_eq!([group.read("pids.max").unwrap(), group.read("memory.max").unwrap()], ["8", "16777216"]);
        assert_eq!(group.set_limits(limits, limits).unwrap(), "kept");
        assert!(group.set_limits(limits, Limits { cpu_millis: Some(500), ..limits }).is_err());
    }

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
