//! What `/proc` says.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// Processes (not this one) that run in `dir` or hold a file in it.
#[must_use]
pub fn inside(dir: &Path) -> Vec<u32> {
    let Ok(dir) = dir.canonicalize() else { return Vec::new() };
    all()
        .into_iter()
        .filter(|&pid| pid != std::process::id())
        .filter(|pid| {
            let proc = Path::new("/proc").join(pid.to_string());
            let below = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(&dir));
            let fds = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
            below(&proc.join("cwd")) || fds.into_iter().any(|fd| below(&fd.path()))
        })
        .collect()
}

/// All processes.
#[must_use]
pub fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc can be read").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The children of a process, zombies too.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    children.flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Whether the process is there and no zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|fields| !matches!(fields[0].as_str(), "Z" | "X"))
}

/// Processor time used so far, in clock ticks (100 a second).
#[must_use]
pub fn ticks(pid: u32) -> u64 {
    let fields = stat(pid).expect("the process is there");
    let field = |index: usize| fields[index].parse::<u64>().expect("a number");
    field(11) + field(12)
}

/// Fields of `/proc/PID/stat` from the state on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Some(text.rsplit_once(')')?.1.split_whitespace().map(ToOwned::to_owned).collect())
}

/// Kills a process, if it is there, and waits until it has ended: on a busy machine one with much memory lives on for a while after the signal, and whoever
/// looks then is right to say so.
pub fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if pidfd_send_signal(&process, Signal::KILL).is_ok() {
        let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&Timespec { tv_sec: 60, tv_nsec: 0 }));
        assert_eq!(ended, Ok(1), "a killed process ends");
    }
}

/// Bytes of a fork's guest memory, as the guest sees them: `offset` is that in the template's memory file.
#[must_use]
pub fn guest_memory(pid: u32, memory_file: &Path, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::MetadataExt;
    let inode = fs::metadata(memory_file).expect("the memory file is there").ino();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process' mappings can be read");
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.len() < 5 || fields[4].parse::<u64>().ok() != Some(inode) {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("a number");
        let (start, end) = fields[0].split_once('-').expect("a range");
        let (start, end, at) = (hex(start), hex(end), hex(fields[2]));
        if (at..at + (end - start)).contains(&offset) {
            assert!(fields[1].contains('p'), "the template's memory is mapped shared: {line}");
            let mut bytes = vec![0; len];
            let memory = File::open(format!("/proc/{pid}/mem")).expect("the process' memory can be opened");
            memory.read_exact_at(&mut bytes, start + offset - at).expect("the process' memory can be read");
            return bytes;
        }
    }
    panic!("process {pid} does not map {}", memory_file.display());
}
