//! Which pages of a private mapping a process has touched, and which of them it has copied for itself.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use identity::mailbox::PAGE_SIZE;

use crate::{PatchError, patch::mappings_of};

/// Bits of an entry of `/proc/PID/pagemap` (Linux' `admin-guide/mm/pagemap.rst`): the page is a file's (or shared), it is in
/// swap, it is there.
const OF_FILE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// Entries read at once: 2 GiB of guest memory.
const ENTRIES: usize = 1 << 19;

/// Pages as ranges of bytes of the file, in rising order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Those that the process has written, and so has for itself.
    pub copied: Vec<Range<u64>>,
    /// Those that it maps and has not written: what it has read, and their neighbours that the kernel mapped with them.
    pub read: Vec<Range<u64>>,
}

/// What process `pid` has touched of the first `size` bytes of `file`.
///
/// # Errors
/// [`PatchError::Mapping`] if it does not map the file as a fork does, [`PatchError::Open`] if it can not be looked at.
pub fn touched_pages(pid: u32, file: &File, size: u64) -> Result<Touched, PatchError> {
    let mappings = mappings_of(pid, file, size)?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(PatchError::Open)?;
    let mut touched = Touched::default();
    for (range, start) in mappings {
        find(&pagemap, range, start, &mut touched).map_err(PatchError::Open)?;
    }
    Ok(touched)
}

fn find(pagemap: &File, range: Range<u64>, start: u64, touched: &mut Touched) -> io::Result<()> {
    let page = PAGE_SIZE as u64;
    let mut offset = range.start;
    while offset < range.end {
        let entries = usize::try_from((range.end - offset).div_ceil(page)).unwrap_or(usize::MAX).min(ENTRIES);
        let mut bytes = vec![0; entries * 8];
        pagemap.read_exact_at(&mut bytes, (start + (offset - range.start)) / page * 8)?;
        for entry in bytes.as_chunks::<8>().0 {
            let entry = u64::from_le_bytes(*entry);
            let pages = if entry & OF_FILE == 0 { &mut touched.copied } else { &mut touched.read };
            match pages.last_mut() {
                _ if entry & (PRESENT | SWAPPED) == 0 => {}
                Some(last) if last.end == offset => last.end += page,
                _ => pages.push(offset..offset + page),
            }
            offset += page;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read},
        process::{Command, Stdio},
    };

    use super::*;

    /// A process that maps the file, reads two pages of it and writes three.
    const PROGRAM: &str = "
import mmap, sys
file = open(sys.argv[1], 'rb')
memory = mmap.mmap(file.fileno(), 65536, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
memory[0], memory[40960]
for page in (2, 3, 15):
    memory[page * 4096] = 1
print('ready', flush=True)
sys.stdin.read()
";

    #[test]
    fn written_pages_are_told_from_read_ones() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(65536).unwrap();
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .arg(file.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap().by_ref()).read_line(&mut line).unwrap();
        let found = touched_pages(child.id(), file.as_file(), 65536);
        let other = tempfile::tempfile().unwrap();
        let refused = touched_pages(child.id(), &other, 65536);
        drop(child.stdin.take());
        child.wait().unwrap();
        let found = found.unwrap();
        assert_eq!(found.copied, [8192..16384, 61440..65536]);
        let contains = |offset: u64| found.read.iter().any(|range| range.contains(&offset));
        assert!(contains(0) && contains(40960) && !contains(8192) && !contains(61440), "{found:?}");
        assert!(matches!(refused, Err(PatchError::Mapping(_))));
    }
}
