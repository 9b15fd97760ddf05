//! The processes of the frozen workload, and what `/proc` says of them. All of it is the workload's to choose, so all of it is bounded.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

use super::findings::clean;

/// Most processes and groups that are looked at, and most descriptors of one process.
const MAX_PROCESSES: usize = 1024;
const MAX_GROUPS: usize = 1024;
const MAX_DESCRIPTORS: usize = 4096;
/// Most bytes of a list of processes, of mappings, of variables or arguments.
const MAX_LIST: usize = 64 << 10;
const MAX_MAPS: usize = 4 << 20;
pub(super) const MAX_TEXT: usize = 256 << 10;

/// Where a process belongs to: the group that the agent started it in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A service of the recipe.
    Service(String),
    /// The warmed runtime.
    Runtime,
    /// None of them.
    Elsewhere,
}

impl Place {
    fn of(group: &str) -> Self {
        match (group, group.strip_prefix("service-")) {
            ("runtime", _) => Self::Runtime,
            (_, Some(service)) => Self::Service(clean(service)),
            _ => Self::Elsewhere,
        }
    }

    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Service(name) => Some(name),
            Self::Runtime => Some("runtime"),
            Self::Elsewhere => None,
        }
    }
}

/// A process.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Of its command, cleaned.
    pub(super) name: String,
    pub(super) place: Place,
}

/// Every process in the group and below, and whether that is all.
pub(super) fn all(workload: &Path) -> (Vec<Process>, bool) {
    let (mut found, mut looked_at) = (Vec::new(), 0);
    let mut groups: Vec<(PathBuf, Option<Place>)> = vec![(workload.to_owned(), None)];
    while let Some((group, place)) = groups.pop() {
        looked_at += 1;
        let procs = read(&group.join("cgroup.procs"), MAX_LIST).unwrap_or_default();
        let pids = procs.split(|&byte| byte == b'\n').filter_map(|line| str::from_utf8(line).ok()?.parse().ok());
        let at = place.clone().unwrap_or(Place::Elsewhere);
        found.extend(pids.map(|pid| Process { pid, name: String::new(), place: at.clone() }));
        if found.len() > MAX_PROCESSES || looked_at > MAX_GROUPS || procs.len() == MAX_LIST {
            found.truncate(MAX_PROCESSES);
            name_all(&mut found);
            return (found, false);
        }
        let below = fs::read_dir(&group).into_iter().flatten().flatten();
        for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).take(MAX_GROUPS) {
            // The agent's groups are those right below; what is in them made the others.
            let place = place.clone().unwrap_or_else(|| Place::of(&entry.file_name().to_string_lossy()));
            groups.push((entry.path(), Some(place)));
        }
    }
    name_all(&mut found);
    (found, true)
}

fn name_all(processes: &mut [Process]) {
    processes.sort_by_key(|process| process.pid);
    processes.iter_mut().for_each(|process| process.name = name(process.pid));
}

/// What the process calls itself, cleaned. The kernel keeps 15 bytes of it; if these begin its program's name, that is it.
pub(super) fn name(pid: u32) -> String {
    const KEPT: usize = 15;
    let comm = read(&of(pid, "comm"), 64).unwrap_or_default();
    let comm = String::from_utf8_lossy(comm.strip_suffix(b"\n").unwrap_or(&comm)).into_owned();
    let whole = (comm.len() == KEPT).then(|| program(pid)).flatten().filter(|program| program.starts_with(&comm));
    match clean(&whole.unwrap_or(comm)) {
        name if name.trim().is_empty() => "(without a name)".to_owned(),
        name => name,
    }
}

/// The name of the file of a process' program.
fn program(pid: u32) -> Option<String> {
    let path = fs::read_link(of(pid, "exe")).ok()?;
    let path = path.to_string_lossy();
    Some(base(path.strip_suffix(" (deleted)").unwrap_or(&path)).to_owned())
}

/// What a process has open.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    /// Inodes of sockets.
    pub(super) sockets: Vec<u64>,
    /// Paths of files, as the kernel tells them.
    pub(super) paths: Vec<String>,
}

/// A mapping of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapped {
    /// Its path.
    pub(super) path: String,
}

impl Process {
    /// Its variables or arguments (`environ`, `cmdline`), wiped on drop; at most [`MAX_TEXT`] bytes. None if they can not be read: it may be a zombie.
    pub(super) fn text(&self, file: &str) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(read(&of(self.pid, file), MAX_TEXT).unwrap_or_default())
    }

    /// A table of the network namespace that it is in.
    pub(super) fn network_table(&self, table: &str) -> String {
        let text = read(&of(self.pid, &format!("net/{table}")), MAX_MAPS).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The network namespace that it is in.
    pub(super) fn network_namespace(&self) -> Option<PathBuf> {
        fs::read_link(of(self.pid, "ns/net")).ok()
    }

    /// Its program's file, opened: some bytes of it are looked at.
    pub(super) fn open_program(&self) -> io::Result<File> {
        File::open(of(self.pid, "exe"))
    }

    /// The name of its program's file.
    pub(super) fn program(&self) -> Option<String> {
        program(self.pid)
    }

    pub(super) fn descriptors(&self) -> Descriptors {
        let mut found = Descriptors::default();
        let entries = fs::read_dir(of(self.pid, "fd")).into_iter().flatten().flatten();
        for target in entries.take(MAX_DESCRIPTORS).filter_map(|entry| fs::read_link(entry.path()).ok()) {
            let target = target.to_string_lossy();
            match target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')?.parse().ok()) {
                Some(inode) => found.sockets.push(inode),
                None if target.starts_with('/') => found.paths.push(target.into_owned()),
                None => {}
            }
        }
        found
    }

    /// The files that it has mapped, each once.
    pub(super) fn mapped(&self) -> Vec<Mapped> {
        let maps = read(&of(self.pid, "maps"), MAX_MAPS).unwrap_or_default();
        mapped(&String::from_utf8_lossy(&maps))
    }
}

/// Files in the text of `/proc/PID/maps`. A path is the sixth field and may hold anything; line ends in it are escaped by the kernel.
fn mapped(maps: &str) -> Vec<Mapped> {
    let mut found: Vec<Mapped> = Vec::new();
    for line in maps.lines() {
        let Some(at) = line.find('/') else { continue };
        // What stands before the path has no slash: range, rights, offset, device, inode.
        let (fields, path) = line.split_at(at);
        if fields.split_ascii_whitespace().count() == 5 && found.last().is_none_or(|last| last.path != path) {
            found.push(Mapped { path: path.to_owned() });
        }
    }
    found
}

/// The last component of a path.
pub(super) fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn of(pid: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

/// At most `max` bytes. All of it is allocated at once, so that nothing of it stays behind in memory that was too small.
fn read(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; max.min(4096)];
    let mut len = 0;
    loop {
        if len == bytes.len() {
            if len >= max {
                break;
            }
            let mut larger = vec![0; (len * 2).min(max)];
            larger[..len].copy_from_slice(&bytes);
            drop(Zeroizing::new(std::mem::replace(&mut bytes, larger)));
        }
        match file.read(&mut bytes[len..])? {
            0 => break,
            count => len += count,
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_group_says_whose_a_process_is_and_names_in_it_are_cleaned() {
        assert_eq!(Place::of("service-web"), Place::Service("web".into()));
        assert_eq!(Place::of("runtime"), Place::Runtime);
        assert_eq!(Place::of("exec-7"), Place::Elsewhere);
        assert_eq!(Place::of("service-\u{1b}"), Place::Service("\\u{1b}".into()));
    }

    #[test]
    fn processes_are_found_in_groups_below_and_belong_to_the_topmost() {
        let folder = tempfile_dir("processes");
        let deep = folder.join("service-web/a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir_all(folder.join("runtime")).unwrap();
        let own = std::process::id();
        fs::write(folder.join("cgroup.procs"), "").unwrap();
        fs::write(deep.join("cgroup.procs"), format!("{own}\njunk\n-1\n99999999999999\n")).unwrap();
        fs::write(folder.join("runtime/cgroup.procs"), "1\n").unwrap();
        let (found, complete) = all(&folder);
        let places: Vec<_> = found.iter().map(|process| (process.pid, process.place.name())).collect();
        assert!(complete);
        assert_eq!(places, [(1, Some("runtime")), (own, Some("web"))]);
        let many: String = (1..5000).map(|pid| format!("{pid}\n")).collect();
        fs::write(folder.join("cgroup.procs"), many).unwrap();
        let (found, complete) = all(&folder);
        assert_eq!((found.len(), complete), (MAX_PROCESSES, false));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_process_is_told_by_its_own_files() {
        let own = Process { pid: std::process::id(), name: String::new(), place: Place::Elsewhere };
        assert!(own.program().unwrap().starts_with(&name(own.pid)) || name(own.pid).len() < 15, "{}", name(own.pid));
        assert!(own.mapped().iter().any(|mapped| base(&mapped.path) == own.program().unwrap()));
        let file = File::open("/etc/hostname").unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let open = own.descriptors();
        assert!(open.paths.iter().any(|path| path == "/etc/hostname"), "{open:?}");
        assert!(!open.sockets.is_empty());
        drop((file, socket));
        assert!(!own.text("environ").is_empty() && !own.text("cmdline").is_empty());
        let none = Process { pid: u32::MAX, ..own };
        assert!(none.mapped().is_empty() && none.text("environ").is_empty() && none.program().is_none());
    }

    #[test]
    fn a_path_in_mappings_may_hold_anything() {
        let maps = "7f00-8f00 r-xp 00000000 00:00 0 \n\
            a000-b000 r--p 00000000 08:01 12    /usr/lib/a b.so\n\
            b000-c000 r-xp 00001000 08:01 12    /usr/lib/a b.so\n\
            c000-d000 rw-p 00000000 00:00 0     [heap]\n\
            d000-e000 rw-p 00000000 00:01 7     /memfd:x 08:01 (deleted)\njunk /not/five";
        let paths: Vec<_> = mapped(maps).into_iter().map(|mapped| mapped.path).collect();
        assert_eq!(paths, ["/usr/lib/a b.so", "/memfd:x 08:01 (deleted)"]);
    }

    #[test]
    fn no_more_is_read_than_may_be() {
        let folder = tempfile_dir("bounded");
        let path = folder.join("long");
        fs::write(&path, vec![b'x'; 10_000]).unwrap();
        assert_eq!(read(&path, 5000).unwrap().len(), 5000);
        assert_eq!(read(&path, 100_000).unwrap().len(), 10_000);
        fs::remove_dir_all(folder).unwrap();
    }

    fn tempfile_dir(test: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("offshoot-audit-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }
}
