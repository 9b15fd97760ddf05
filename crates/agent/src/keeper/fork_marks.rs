//! Pages that the kernel wipes in the child of a process (`MADV_WIPEONFORK`), wiped in a fork of the machine.
//!
//! Libraries keep one to notice that their process was copied: BoringSSL, AWS-LC, LibreSSL draw a fresh seed for their random generators once it reads
//! as zeros. A fork of the machine copies every process, and the kernel in it knows nothing of that. So the agent does what the kernel would: it looks
//! for these pages while the workload is frozen for the capture, and wipes them in each fork before the thaw.

use std::{
    fs,
    io::{self, BufRead, BufReader},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::fs::{Mode, OFlags};

use crate::console;

/// Most places, and most bytes of all together, of one process. The libraries that are known have one or two pages each.
const MAX_PLACES: usize = 256;
const MAX_BYTES: usize = 1 << 20;

/// Those of one process.
#[derive(Debug)]
pub(super) struct ForkMarks {
    pid: u32,
    memory: OwnedFd,
    /// Addresses and lengths.
    places: Vec<(u64, usize)>,
}

/// Those of every process in the group and below, which must be frozen. One that can not be looked at has none.
pub(super) fn find(group: &Path) -> Vec<ForkMarks> {
    let mut found = Vec::new();
    let mut groups = vec![group.to_owned()];
    while let Some(group) = groups.pop() {
        let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        found.extend(procs.lines().filter_map(|pid| pid.parse().ok()).filter_map(ForkMarks::of));
        let below = fs::read_dir(&group).into_iter().flatten().flatten();
        groups
            .extend(below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    found
}

impl ForkMarks {
    fn of(pid: u32) -> Option<Self> {
        let smaps = fs::File::open(format!("/proc/{pid}/smaps")).ok()?;
        let places = places(BufReader::new(smaps)).ok()?;
        if places.is_empty() {
            return None;
        }
        if places.len() > MAX_PLACES || places.iter().map(|(_, len)| len).sum::<usize>() > MAX_BYTES {
            console::warn(&format!("process {pid} has more memory that is wiped in children than is wiped in forks"));
            return None;
        }
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let memory = rustix::fs::open(format!("/proc/{pid}/mem"), flags, Mode::empty()).ok()?;
        Some(Self { pid, memory, places })
    }

    /// Whose they are.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Fills them with zeros.
    pub(super) fn wipe(&self) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        for &(address, len) in &self.places {
            let mut done = 0;
            while done < len {
                let part = ZEROS.get(..(len - done).min(ZEROS.len())).unwrap_or_default();
                match rustix::io::pwrite(&self.memory, part, address + done as u64)? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    count => done += count,
                }
            }
        }
        Ok(())
    }
}

/// The mappings with the flag `wf`, from the text of `/proc/PID/smaps`: one more than [`MAX_PLACES`] at most. Nothing in it is believed but numbers and
/// flags: a file's name in it may be anything, but is behind them in its line, and no line of another kind begins with an address. It is read
/// line by line: a process may have mappings for 100 MiB of it.
fn places(mut smaps: impl BufRead) -> io::Result<Vec<(u64, usize)>> {
    let mut last = None;
    let mut found = Vec::new();
    let mut bytes = Vec::new();
    while found.len() <= MAX_PLACES && smaps.read_until(b'\n', &mut bytes)? > 0 {
        let line = String::from_utf8_lossy(&bytes);
        let line = line.trim_end_matches('\n');
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "wf") {
                found.extend(last);
            }
            last = None;
        } else if let Some(mapping) = mapping(line) {
            last = Some(mapping);
        }
        bytes.clear();
    }
    Ok(found)
}

fn mapping(line: &str) -> Option<(u64, usize)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    Some((start, usize::try_from(end.checked_sub(start)?).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::mm::{Advice, MapFlags, ProtFlags};

    use super::*;

    #[test]
    fn the_mappings_with_the_flag_are_found_and_no_others() {
        let smaps = "7f00-8f00 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr mr mw me ac wf sd \n\
            a000-b000 rw-p 00000000 00:00 0 wf\nVmFlags: rd wr mr mw me ac sd \nVmFlags: wf\nc000-d000 r--p 0 08:01 1 /x VmFlags: wf\nVmFlags: rd xwf\n\
            b-a rw-p\nVmFlags: wf\nffffffffffffffff-0 rw-p\nVmFlags: wf";
        assert_eq!(places(smaps.as_bytes()).unwrap(), [(0x7f00, 0x1000)]);
        // A name that is no text hides nothing.
        let named = [b"1000-2000 rw-p 00000000 00:00 0 /\xff\n".as_slice(), smaps.as_bytes()].concat();
        assert_eq!(places(&named[..]).unwrap(), [(0x7f00, 0x1000)]);
    }

    #[test]
    fn of_a_process_with_too_many_mappings_no_more_is_read_than_shows_that() {
        let mapping = b"7f00-8f00 rw-p 00000000 00:00 0 \nVmFlags: wf\n";
        let without_end = std::iter::repeat_n(mapping, 100_000).flatten().copied().collect::<Vec<_>>();
        let mut smaps = &without_end[..];
        assert_eq!(places(&mut smaps).unwrap().len(), MAX_PLACES + 1);
        assert!(smaps.len() > without_end.len() / 2);
    }

    #[test]
    fn what_the_kernel_would_wipe_in_a_child_is_wiped_and_nothing_else() {
        let map = || {
            // SAFETY: a new mapping at an address that the kernel chooses.
            let at = unsafe {
                rustix::mm::mmap_anonymous(
                    std::ptr::null_mut(),
                    8192,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )
            };
            at.unwrap().cast::<u8>()
        };
        let (marked, plain) = (map(), map());
        // SAFETY: the mappings just made; nobody else has them.
        unsafe {
            rustix::mm::madvise(marked.cast(), 8192, Advice::LinuxWipeOnFork).unwrap();
            for at in [0, 5000] {
                marked.add(at).write_volatile(1);
                plain.add(at).write_volatile(1);
            }
        }
        let marks = ForkMarks::of(std::process::id()).unwrap();
        assert!(marks.places.contains(&(marked as u64, 8192)));
        marks.wipe().unwrap();
        // SAFETY: as above.
        unsafe {
            for at in [0, 5000] {
                assert_eq!((marked.add(at).read_volatile(), plain.add(at).read_volatile()), (0, 1));
            }
            rustix::mm::munmap(marked.cast(), 8192).unwrap();
            rustix::mm::munmap(plain.cast(), 8192).unwrap();
        }
    }
}
