//! What is done before the capture so that the resume is short.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use super::{
    Parts, Prepared, apply, identity_dir,
    root::{Root, fill, reserve},
};
use crate::{cgroup, console, network::RESOLV_CONF};

/// Files that a new identity fills: made, opened and empty before the capture, because a first look at a path, and a first
/// change of a length, are among the slowest things a fork could do. What could not be opened is written as any other
/// file. Whoever goes on without a new identity calls [`Blanks::put_back`].
#[derive(Debug, Default)]
pub(super) struct Blanks {
    own: [Option<Own>; 3],
    identity: Vec<(String, OwnedFd)>,
    /// [`RESOLV_CONF`], where there is a card.
    resolv_conf: Option<Own>,
    has_card: bool,
}

/// One that carries the machine's own name or id.
#[derive(Debug)]
pub(super) struct Own {
    file: OwnedFd,
    /// What was in it.
    content: Vec<u8>,
}

impl Own {
    /// Gives the file its content.
    pub(super) fn fill(&self, content: &str) -> io::Result<()> {
        fill(&self.file, content.as_bytes())
    }

    /// Gives the file what it had.
    pub(super) fn put_back(&self) -> io::Result<()> {
        fill(&self.file, &self.content)
    }
}

/// Makes a file as blank as it was before it was filled.
fn empty(file: &OwnedFd) -> io::Result<()> {
    rustix::fs::ftruncate(file, 0)?;
    reserve(file);
    Ok(())
}

const OWN: [(&str, u32); 3] = [("/etc/hostname", 0o644), ("/etc/hosts", 0o644), ("/etc/machine-id", 0o444)];

impl Blanks {
    fn open(parts: &Parts, first_identity: bool) -> Self {
        let open = |(path, mode): (&str, u32)| {
            let content = parts.root.read(path).unwrap_or_default();
            match parts.root.open_blank(path, mode) {
                Ok(file) => Some(Own { file, content }),
                Err(_) => {
                    // It may have been emptied; it keeps what it had.
                    let _ = parts.root.write(path, mode, &content);
                    None
                }
            }
        };
        // Later ones replace the files there are.
        let identity = if first_identity { parts.identity.blanks() } else { Vec::new() };
        let has_card = parts.handoff.network.has_card();
        let resolv_conf = if has_card { open((RESOLV_CONF, 0o644)) } else { None };
        Self { own: OWN.map(open), identity, resolv_conf, has_card }
    }

    pub(super) fn hostname(&self, root: &Root, content: &str) -> io::Result<()> {
        self.write(0, root, content)
    }

    pub(super) fn hosts(&self, root: &Root, content: &str) -> io::Result<()> {
        self.write(1, root, content)
    }

    pub(super) fn machine_id(&self, root: &Root, content: &str) -> io::Result<()> {
        self.write(2, root, content)
    }

    /// [`RESOLV_CONF`], for the network's step.
    pub(super) fn resolv_conf(&self) -> Option<&Own> {
        self.resolv_conf.as_ref()
    }

    /// Those of the identity directory.
    pub(super) fn identity(&self) -> &[(String, OwnedFd)] {
        &self.identity
    }

    fn write(&self, which: usize, root: &Root, content: &str) -> io::Result<()> {
        match &self.own[which] {
            Some(own) => own.fill(content),
            None => root.write(OWN[which].0, OWN[which].1, content.as_bytes()),
        }
    }

    /// Whether an identity finds all that it fills: it changes no other file then.
    pub(super) fn are_complete(&self) -> bool {
        self.own.iter().all(Option::is_some)
            && self.identity.len() == identity_dir::EVERY.len()
            && (self.resolv_conf.is_some() || !self.has_card)
    }

    /// Makes all of them blank again.
    pub(super) fn empty(&self) -> io::Result<()> {
        let own = self.own.iter().flatten().chain(&self.resolv_conf).map(|own| &own.file);
        own.chain(self.identity.iter().map(|(_, file)| file)).try_for_each(empty)
    }

    /// Everything as it was.
    pub(super) fn put_back(self, parts: &Parts) -> io::Result<()> {
        for own in self.own.iter().flatten().chain(&self.resolv_conf) {
            own.put_back()?;
        }
        parts.identity.remove_blanks(&self.identity)
    }
}

/// Finds out what the resume needs to know of the workload's files.
pub(super) fn look_ahead(parts: &Parts, prepared: &mut Prepared) {
    let hosts = parts.root.read("/etc/hosts").unwrap_or_default();
    prepared.hosts = apply::hosts_without_own_name(&String::from_utf8_lossy(&hosts));
    prepared.filled = Blanks::default();
    prepared.blanks = Blanks::open(parts, prepared.written.is_empty());
    prepared.dbus_machine_id = parts.root.is_file(apply::DBUS_MACHINE_ID);
    let is_key =
        |name: &String| name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub"));
    prepared.host_keys =
        parts.root.list("/etc/ssh").into_iter().filter(is_key).map(|name| format!("/etc/ssh/{name}")).collect();
    prepared.had_host_keys |= !prepared.host_keys.is_empty();
    prepared.wants_host_keys = prepared.had_host_keys
        && ["/usr/bin/ssh-keygen", "/bin/ssh-keygen"].iter().any(|path| parts.root.is_file(path));
}

/// Only the agent and the kernel's own threads may be outside the workload's cgroup: anything else would not freeze.
pub(super) fn no_stragglers(workload: &Path) -> io::Result<()> {
    for pid in outside(Path::new(cgroup::MOUNT), workload)?.into_iter().filter(|pid| pid != "1") {
        // A process that is gone meanwhile is no matter.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        if !is_kernel_thread(&stat) {
            return Err(io::Error::other(format!(
                "process {pid} has left the workload's cgroup and would not be frozen; do not move processes between cgroups"
            )));
        }
    }
    Ok(())
}

/// The processes of the group `top`, and of those below it but `except`.
fn outside(top: &Path, except: &Path) -> io::Result<Vec<String>> {
    let mut processes = Vec::new();
    let mut groups = vec![top.to_owned()];
    while let Some(group) = groups.pop() {
        let look = || Ok::<_, io::Error>((fs::read_to_string(group.join("cgroup.procs"))?, fs::read_dir(&group)?));
        let (procs, below) = match look() {
            Ok(seen) => seen,
            // A group that was removed meanwhile had none.
            Err(error) if group != top && error.raw_os_error().is_some_and(is_gone) => continue,
            Err(error) => return Err(error),
        };
        processes.extend(procs.lines().map(ToOwned::to_owned));
        let is_group = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        groups.extend(below.flatten().filter(is_group).map(|entry| entry.path()).filter(|path| path != except));
    }
    Ok(processes)
}

/// What the kernel answers for a group that is not there any more.
fn is_gone(error: i32) -> bool {
    matches!(error, libc::ENOENT | libc::ENODEV)
}

/// Whether a line of `/proc/PID/stat` is a kernel thread's, by its flags (field 9, `PF_KTHREAD`), and not a zombie's.
fn is_kernel_thread(stat: &str) -> bool {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    // The name, in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let state = fields.next();
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    state == Some("Z") || flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// Makes the agent's program and data present and keeps them so: a page fault at resume costs more than the step that
/// needs the page. Stacks and the allocator's reserves are left out; they would only make every fork larger.
pub(super) fn lock_memory() {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    for (start, len) in maps.lines().filter_map(resume_mapping) {
        // SAFETY: locking changes no memory; a range that is gone meanwhile is an error, no more.
        if let Err(error) = unsafe { rustix::mm::mlock(start as *mut _, len) } {
            console::note(&format!("memory at {start:x} could not be locked: {error}"));
        }
    }
}

fn resume_mapping(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_whitespace();
    let (range, access) = (fields.next()?, fields.next()?);
    let path = fields.nth(3).unwrap_or_default();
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let wanted = access.starts_with('r') && (path.starts_with('/') || path == "[heap]");
    wanted.then(|| (start, end - start))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_a_rehearsal_has_filled_is_blank_again() {
        let folder = std::env::temp_dir().join(format!("offshoot-blank-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("name");
        let file = OwnedFd::from(fs::File::create(&path).unwrap());
        fill(&file, b"rehearsal-with-a-long-name").unwrap();
        fill(&file, b"a").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"aehearsal-with-a-long-name", "why it is emptied");
        empty(&file).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        fill(&file, b"a").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"a");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn only_the_program_and_its_heap_are_locked() {
        assert_eq!(resume_mapping("00400000-00402000 r-xp 00000000 00:02 5    /init"), Some((0x40_0000, 0x2000)));
        assert_eq!(resume_mapping("01000000-01001000 rw-p 00000000 00:00 0    [heap]"), Some((0x100_0000, 0x1000)));
        assert_eq!(resume_mapping("7f00000000-7f00100000 rw-p 00000000 00:00 0"), None);
        assert_eq!(resume_mapping("7f00000000-7f00100000 rw-p 00000000 00:00 0 [stack]"), None);
        assert_eq!(resume_mapping("junk"), None);
    }

    #[test]
    fn i1_processes_of_every_group_but_the_workloads_are_outside_of_it() {
        let top = tempfile::tempdir().unwrap();
        for (group, procs) in
            [("", "1\n2\n"), ("hooks", ""), ("hooks/hook-a", "7\n"), ("workload", ""), ("workload/x", "9\n")]
        {
            let dir = top.path().join(group);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("cgroup.procs"), procs).unwrap();
        }
        fs::write(top.path().join("cgroup.events"), "").unwrap();
        let mut found = outside(top.path(), &top.path().join("workload")).unwrap();
        found.sort();
        assert_eq!(found, ["1", "2", "7"]);
        // One that goes meanwhile.
        fs::create_dir(top.path().join("going")).unwrap();
        assert!(outside(top.path(), &top.path().join("workload")).is_ok());
        assert!(outside(&top.path().join("going"), Path::new("/")).is_err(), "the top has to be there");
    }

    #[test]
    fn i1_a_process_can_not_pass_as_a_kernel_thread_by_its_name() {
        assert!(is_kernel_thread("12 (kworker/0:1) I 2 0 0 0 -1 69238880 0 0"));
        assert!(!is_kernel_thread("13 (a) I 2 0 0 0 -1 69238880) S 1 13 13 0 -1 4194560 0"));
        assert!(is_kernel_thread("14 (gone) Z 1 14 14 0 -1 4228108 0"));
        assert!(!is_kernel_thread(""));
    }
}
