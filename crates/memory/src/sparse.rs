//! Files with holes: a guest touches a third of its memory, and the rest need not be on disk.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use identity::mailbox::PAGE_SIZE;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

/// How much is read at a time.
pub(crate) const CHUNK: usize = 1 << 20;

/// The parts of a file that hold data, in order, aligned outwards to pages. A file system that knows no holes shows one.
///
/// # Errors
/// If the file can not be examined.
pub fn data_extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let len = file.metadata()?.len();
    let page = PAGE_SIZE as u64;
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(len);
        extents.push(start / page * page..end.next_multiple_of(page).min(len));
        at = end;
    }
    Ok(extents)
}

/// Makes a hole of every page that holds only zeros. Returns the bytes of data that are left.
///
/// # Errors
/// If the file can not be read or changed. A file system that can not make holes is no error.
pub fn punch_zero_pages(file: &File) -> io::Result<u64> {
    let mut left: i128 = 0;
    let mut buffer = vec![0; CHUNK];
    for extent in data_extents(file)? {
        let mut at = extent.start;
        while at < extent.end {
            let count = usize::try_from(extent.end - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut buffer[..count];
            file.read_exact_at(chunk, at)?;
            for run in zero_runs(chunk) {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match fallocate(file, flags, at + run.start as u64, run.len() as u64) {
                    Ok(()) => left -= i128::try_from(run.len()).unwrap_or_default(),
                    Err(rustix::io::Errno::OPNOTSUPP) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            left += i128::try_from(count).unwrap_or_default();
            at += count as u64;
        }
    }
    Ok(u64::try_from(left).unwrap_or_default())
}

/// Runs of whole pages of zeros.
fn zero_runs(chunk: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, page) in chunk.chunks(PAGE_SIZE).enumerate() {
        if page.iter().any(|&byte| byte != 0) {
            continue;
        }
        let start = index * PAGE_SIZE;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += page.len(),
            _ => runs.push(start..start + page.len()),
        }
    }
    runs
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn zero_pages_become_holes_and_nothing_else_changes() {
        let file = tempfile::tempfile().unwrap();
        let mut content = vec![0_u8; 64 * PAGE_SIZE];
        content[5 * PAGE_SIZE + 17] = 1;
        content[63 * PAGE_SIZE] = 2;
        file.write_all_at(&content, 0).unwrap();
        assert_eq!(punch_zero_pages(&file).unwrap(), 2 * PAGE_SIZE as u64);
        let mut after = vec![0; content.len()];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(after == content);
        assert!(file.metadata().unwrap().blocks() * 512 < 16 * PAGE_SIZE as u64);
        let extents = data_extents(&file).unwrap();
        assert!(extents.iter().any(|extent| extent.contains(&(5 * PAGE_SIZE as u64))), "{extents:?}");
    }
}
