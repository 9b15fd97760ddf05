//! Which pages of a private mapping a process has copied for itself.

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

/// The pages that process `pid` has copied of the first `size` bytes of `file`, as ranges of bytes in rising order.
///
/// # Errors
/// [`PatchError::Mapping`] if it does not map the file as a fork does, [`PatchError::Open`] if it can not be looked at.
pub fn copied_pages(pid: u32, file: &File, size: u64) -> Result<Vec<Range<u64>>, PatchError> {
    let mappings = mappings_of(pid, file, size)?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(PatchError::Open)?;
    let mut copied = Vec::new();
    for (range, start) in mappings {
        find(&pagemap, range, start, &mut copied).map_err(PatchError::Open)?;
    }
    Ok(copied)
}

fn find(pagemap: &File, range: Range<u64>, start: u64, copied: &mut Vec<Range<u64>>) -> io::Result<()> {
    let page = PAGE_SIZE as u64;
    let mut offset = range.start;
    while offset < range.end {
        let entries = usize::try_from((range.end - offset).div_ceil(page)).unwrap_or(usize::MAX).min(ENTRIES);
        let mut bytes = vec![0; entries * 8];
        pagemap.read_exact_at(&mut bytes, (start + (offset - range.start)) / page * 8)?;
        for entry in bytes.as_chunks::<8>().0 {
            let entry = u64::from_le_bytes(*entry);
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                match copied.last_mut() {
                    Some(last) if last.end == offset => last.end += page,
                    _ => copied.push(offset..offset + page),
                }
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
    fn written_pages_are_found_and_read_ones_are_not() {
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
        let found = copied_pages(child.id(), file.as_file(), 65536);
        let other = tempfile::tempfile().unwrap();
        let refused = copied_pages(child.id(), &other, 65536);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(found.unwrap(), [8192..16384, 61440..65536]);
        assert!(matches!(refused, Err(PatchError::Mapping(_))));
    }
}
