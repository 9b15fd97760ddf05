//! Writing into the private pages of a machine's process before it runs.
//!
//! The template's memory file itself is never written: two forks would race, and every later fork would start with the
//! first one's identity. So the mapping is looked up in `/proc/PID/maps` by the file it maps, and a shared one is refused.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
};

use identity::mailbox::{PAGE_SIZE, Page};

use crate::{Letter, PatchError, PrivateMemory, fill_mailboxes};

/// The memory of a guest as its machine's process maps it.
#[derive(Debug)]
pub struct ProcessMemory {
    memory: File,
    /// Where the file's bytes are: offset in the file, and in the process.
    mappings: Vec<(Range<u64>, u64)>,
}

impl ProcessMemory {
    /// Finds the private mapping of `file` in the process `pid`.
    ///
    /// # Errors
    /// [`PatchError::Mapping`] if there is none, it is shared, or does not cover `size` bytes.
    pub fn open(pid: u32, file: &File, size: u64) -> Result<Self, PatchError> {
        let mappings = mappings_of(pid, file, size)?;
        let memory =
            OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).map_err(PatchError::Open)?;
        Ok(Self { memory, mappings })
    }

    /// Fills mailboxes, all or nothing: every marker of every mailbox is checked before the first byte is written.
    ///
    /// # Errors
    /// [`PatchError`]; after [`PatchError::Write`] the memory is half-written, and the process must be killed.
    pub fn fill(&self, letters: &[Letter<'_>]) -> Result<(), PatchError> {
        fill_mailboxes(self, letters)
    }

    /// Reads any bytes of the guest's memory.
    ///
    /// # Errors
    /// What reading fails of; `InvalidInput` outside of it.
    pub fn read(&self, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (address, count) = self.piece(offset, bytes.len())?;
            let (piece, rest) = bytes.split_at_mut(count);
            self.memory.read_exact_at(piece, address)?;
            (offset, bytes) = (offset + count as u64, rest);
        }
        Ok(())
    }

    /// Writes any bytes into the guest's private memory. The machine must stand still.
    ///
    /// # Errors
    /// What writing fails of; `InvalidInput` outside of it.
    pub fn write(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (address, count) = self.piece(offset, bytes.len())?;
            let (piece, rest) = bytes.split_at(count);
            self.memory.write_all_at(piece, address)?;
            (offset, bytes) = (offset + count as u64, rest);
        }
        Ok(())
    }

    /// The address of the byte at `offset`, and how many of `len` lie together from there on.
    fn piece(&self, offset: u64, len: usize) -> io::Result<(u64, usize)> {
        let found = self.mappings.iter().find(|(range, _)| range.contains(&offset));
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "outside of the guest's memory");
        let (range, start) = found.ok_or_else(outside)?;
        let left = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
        Ok((start + (offset - range.start), len.min(left)))
    }

    /// The address of bytes that lie together in one mapping.
    fn address(&self, offset: u64, len: u64) -> io::Result<u64> {
        let whole = |range: &Range<u64>| range.contains(&offset) && range.end - offset >= len;
        self.mappings
            .iter()
            .find(|(range, _)| whole(range))
            .map(|(range, start)| start + (offset - range.start))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "outside of the guest's memory"))
    }
}

impl PrivateMemory for ProcessMemory {
    fn size(&self) -> u64 {
        self.mappings.last().map_or(0, |(range, _)| range.end)
    }

    fn read_pages(&self, offsets: &[u64]) -> io::Result<Vec<Page>> {
        let read = |offset: &u64| {
            let mut page: Page = [0; PAGE_SIZE];
            self.memory.read_exact_at(&mut page, self.address(*offset, PAGE_SIZE as u64)?)?;
            Ok(page)
        };
        offsets.iter().map(read).collect()
    }

    fn write_in_order(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        for (offset, bytes) in writes {
            self.memory.write_all_at(bytes, self.address(*offset, bytes.len() as u64)?)?;
        }
        Ok(())
    }
}

/// Where the private mapping of the first `size` bytes of `file` lies in the process `pid`, by offset in the file.
pub(crate) fn mappings_of(pid: u32, file: &File, size: u64) -> Result<Vec<(Range<u64>, u64)>, PatchError> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(PatchError::Open)?;
    let metadata = file.metadata().map_err(PatchError::Open)?;
    let device = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let mappings = private_mappings(&maps, |mapping| {
        mapping.inode == metadata.ino()
            && (mapping.device == device
                // Some file systems (btrfs, overlays) show another device in maps than in stat.
                || fs::metadata(&mapping.path)
                    .is_ok_and(|other| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino())))
    })?;
    let mut covered = 0;
    for (range, _) in &mappings {
        // A second mapping of a part would show the guest other bytes than the ones written.
        if range.start != covered {
            return Err(PatchError::Mapping("its mappings overlap or leave gaps"));
        }
        covered = range.end;
    }
    if covered != size {
        return Err(PatchError::Mapping("it does not cover the guest's memory"));
    }
    Ok(mappings)
}

/// Mappings of a file in `/proc/PID/maps`, by offset. The file is known by device and inode, never by its name.
fn private_mappings(maps: &str, is_the_file: impl Fn(&Mapping) -> bool) -> Result<Vec<(Range<u64>, u64)>, PatchError> {
    let mut mappings = Vec::new();
    for line in maps.lines() {
        let Some(mapping) = Mapping::parse(line) else { continue };
        if !is_the_file(&mapping) {
            continue;
        }
        if !mapping.private {
            return Err(PatchError::Mapping("it is shared, and writing would change the template"));
        }
        if mapping.writable {
            mappings.push((mapping.offset..mapping.offset + mapping.len, mapping.start));
        }
    }
    mappings.sort_by_key(|(range, _)| range.start);
    if mappings.is_empty() { Err(PatchError::Mapping("it does not map it")) } else { Ok(mappings) }
}

struct Mapping {
    start: u64,
    len: u64,
    offset: u64,
    private: bool,
    writable: bool,
    device: (u32, u32),
    inode: u64,
    path: String,
}

impl Mapping {
    /// `7f0000000000-7f0020000000 rw-p 00000000 fe:00 1234   /path`
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let rights = fields.next()?.as_bytes();
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        Some(Self {
            start,
            len: end.checked_sub(start)?,
            offset,
            private: rights.get(3) == Some(&b'p'),
            writable: rights.get(1) == Some(&b'w'),
            device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
            inode: fields.next()?.parse().ok()?,
            path: fields.collect::<Vec<_>>().join(" "),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 fe:00 77                         /data/memory.img
7f0000100000-7f0000200000 rw-p 00100000 fe:00 77                         /data/memory.img
7f1000000000-7f1000100000 rw-s 00000000 fe:00 78                         /data/other file
55d000000000-55d000100000 rw-p 00000000 00:00 0                          [heap]
";

    #[test]
    fn mappings_are_known_by_their_file_and_a_shared_one_is_refused() {
        let of = |inode| private_mappings(MAPS, |mapping| mapping.inode == inode && mapping.device == (0xfe, 0));
        let mib = 0x10_0000;
        assert_eq!(of(77).unwrap(), [(0..mib, 0x7f00_0000_0000), (mib..2 * mib, 0x7f00_0010_0000)]);
        assert!(matches!(of(78), Err(PatchError::Mapping(reason)) if reason.contains("shared")));
        assert!(matches!(of(1), Err(PatchError::Mapping(_))));
    }
}
