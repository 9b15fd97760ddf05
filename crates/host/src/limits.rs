//! Limits of a fork's process, by the host's control groups (version 2, or version 1 as root).
//!
//! The agent applies the same limits to the workload inside the guest, so that a workload meets them as it would on any
//! machine; the host's are the fence around a guest that does not keep to them. A limit that was asked for and can not
//! be applied is an error, never a warning.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use identity::ForkId;
use thiserror::Error;

use crate::request::LimitRequest;

/// What a machine's process needs beside the guest's memory: QEMU's own heap and its translated code (18 MiB measured, idle).
const PROCESS_OVERHEAD: u64 = 96 << 20;
/// Period of the CPU limit in microseconds (the kernel's default).
const CPU_PERIOD: u64 = 100_000;

/// Why a limit can not be applied.
#[derive(Debug, Error)]
pub enum LimitError {
    /// This host does not let us.
    #[error(
        "{option} was asked for, but this host does not let us limit {controller}: {reason}; run as root, or under `systemd-run --user --scope -p Delegate=yes`, or leave the option out"
    )]
    NotPossible {
        /// The option.
        option: &'static str,
        /// The kernel's controller.
        controller: &'static str,
        /// Why.
        reason: String,
    },
}

/// Control groups made for one fork. Dropped before [`ForkCgroups::keep`], they are removed.
#[derive(Debug, Default)]
pub struct ForkCgroups {
    dirs: Vec<PathBuf>,
    procs: Vec<File>,
    kept: bool,
}

impl ForkCgroups {
    /// Makes the groups that `limits` needs on the host; none without such limits.
    ///
    /// # Errors
    /// [`LimitError`]; nothing is left behind.
    pub fn make(id: &ForkId, limits: &LimitRequest) -> Result<Self, LimitError> {
        let mut groups = Self::default();
        if let Some(memory) = limits.memory {
            let bytes = (memory + PROCESS_OVERHEAD).to_string();
            groups.apply(id, "--memory-limit", "memory", ("memory.max", &bytes), ("memory.limit_in_bytes", &bytes))?;
        }
        if let Some(millis) = limits.cpu_millis {
            let quota = millis * CPU_PERIOD / 1000;
            let pair = format!("{quota} {CPU_PERIOD}");
            groups.apply(id, "--cpus", "cpu", ("cpu.max", &pair), ("cpu.cfs_quota_us", &quota.to_string()))?;
        }
        Ok(groups)
    }

    /// What the machine's process has to enter.
    #[must_use]
    pub fn procs(&self) -> Vec<BorrowedFd<'_>> {
        self.procs.iter().map(AsFd::as_fd).collect()
    }

    /// Leaves the groups to the fork and names them for its record.
    #[must_use]
    pub fn keep(mut self) -> Vec<PathBuf> {
        self.kept = true;
        std::mem::take(&mut self.dirs)
    }

    fn apply(
        &mut self,
        id: &ForkId,
        option: &'static str,
        controller: &'static str,
        v2: (&str, &str),
        v1: (&str, &str),
    ) -> Result<(), LimitError> {
        let not_possible = |reason: String| LimitError::NotPossible { option, controller, reason };
        let place = find(controller).map_err(not_possible)?;
        let (base, (file, value)) = match &place {
            Place::V2(base) => (base, v2),
            Place::V1(base) => (base, v1),
        };
        let at = |path: &Path, error: io::Error| not_possible(format!("{}: {error}", path.display()));
        let dir = base.join("offshoot").join(id.as_str());
        if let Place::V2(base) = &place {
            delegate(base, controller).map_err(|error| at(base, error))?;
        } else {
            fs::create_dir_all(base.join("offshoot")).map_err(|error| at(base, error))?;
        }
        if !self.dirs.contains(&dir) {
            fs::create_dir(&dir).map_err(|error| at(&dir, error))?;
            self.dirs.push(dir.clone());
            let procs = dir.join("cgroup.procs");
            self.procs.push(OpenOptions::new().write(true).open(&procs).map_err(|error| at(&procs, error))?);
        }
        let file = dir.join(file);
        fs::write(&file, value).map_err(|error| at(&file, error))
    }
}

impl Drop for ForkCgroups {
    fn drop(&mut self) {
        if !self.kept {
            for dir in &self.dirs {
                let _ = fs::remove_dir(dir);
            }
        }
    }
}

/// Removes a dead fork's control groups. Only directories that are ours by place and name are touched.
///
/// # Errors
/// If one can not be removed.
pub fn remove(groups: &[PathBuf], id: &ForkId) -> io::Result<()> {
    for group in groups
        .iter()
        .filter(|group| group.starts_with("/sys/fs/cgroup") && group.ends_with(Path::new("offshoot").join(id.as_str())))
    {
        match fs::remove_dir(group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Groups of ours below any controller we can see, with the fork ids they belong to.
#[must_use]
pub fn all() -> Vec<(PathBuf, ForkId)> {
    let mut found = Vec::new();
    for place in ["memory", "cpu"].iter().filter_map(|controller| find(controller).ok()) {
        let (Place::V1(base) | Place::V2(base)) = place;
        for entry in fs::read_dir(base.join("offshoot")).into_iter().flatten().flatten() {
            if let Ok(id) = ForkId::parse(&entry.file_name().to_string_lossy())
                && !found.iter().any(|(path, _)| *path == entry.path())
            {
                found.push((entry.path(), id));
            }
        }
    }
    found
}

/// Whether a controller can be used, for `doctor`.
///
/// # Errors
/// Why not.
pub fn available(controller: &'static str) -> Result<PathBuf, String> {
    match find(controller)? {
        Place::V1(base) | Place::V2(base) => match rustix::fs::access(&base, rustix::fs::Access::WRITE_OK) {
            Ok(()) => Ok(base),
            Err(error) => Err(format!("{}: {error}", base.display())),
        },
    }
}

enum Place {
    V1(PathBuf),
    V2(PathBuf),
}

/// Where groups can be made for `controller`: a version 1 hierarchy (root only), else the version 2 tree: its top for
/// root, else the part that the user's service manager was given.
fn find(controller: &str) -> Result<Place, String> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| format!("/proc/self/mounts: {error}"))?;
    let root = rustix::process::geteuid().is_root();
    let mut v2 = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(_), Some(target), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if kind == "cgroup" && options.split(',').any(|option| option == controller) {
            return if root {
                Ok(Place::V1(target.into()))
            } else {
                Err("control groups of version 1 need root".into())
            };
        }
        if kind == "cgroup2" {
            v2 = Some(PathBuf::from(target));
        }
    }
    let top = v2.ok_or("no control groups are mounted")?;
    let base = if root { top } else { user_base(&top)? };
    let controllers = fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
    if controllers.split_whitespace().any(|name| name == controller) {
        Ok(Place::V2(base))
    } else {
        Err(format!("{} has no {controller} controller", base.display()))
    }
}

/// The user manager's own part of the tree (`…/user@UID.service`), which systemd delegates.
fn user_base(top: &Path) -> Result<PathBuf, String> {
    let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| format!("/proc/self/cgroup: {error}"))?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let mut base = top.to_owned();
    for part in path.split('/') {
        base.push(part);
        if part.starts_with("user@") && part.ends_with(".service") {
            return Ok(base);
        }
    }
    Err("this process is not inside a delegated control group".into())
}

/// Makes `<base>/offshoot` and turns the controller on down to its children.
fn delegate(base: &Path, controller: &str) -> io::Result<()> {
    let ours = base.join("offshoot");
    match fs::create_dir(&ours) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for dir in [base, &ours] {
        let control = dir.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&control)?;
        if !enabled.split_whitespace().any(|name| name == controller) {
            fs::write(&control, format!("+{controller}"))?;
        }
    }
    Ok(())
}
