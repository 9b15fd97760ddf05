//! Guest memory: one file, mapped at the place of the guest's RAM.
//!
//! ```text
//! file     0 ............ 3 GiB ........ end
//! guest    0 ............ 3 GiB  (hole)  4 GiB ........
//! ```
//!
//! A template's own machine writes through to the file; a fork maps the file copy-on-write and cannot reach it (a
//! descriptor that is open for reading only is enough).

use std::{fs::File, io};

use ::memory::{Delta, DeltaError};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion, mmap::MmapRegionError,
};

use crate::layout::{HIGH_RAM_START, LOW_RAM_END, PAGE_BYTES};

/// [`PAGE_BYTES`], for pointers.
const PAGE: usize = 4096;

/// The guest's RAM. A clone is another handle of the same memory.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Who sees what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The file: the template's own machine.
    Shared,
    /// Nobody but this machine: a fork.
    Private,
}

/// Why memory was not mapped.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Not a number of bytes that can be mapped.
    #[error("guest memory of {0} bytes cannot be mapped: a multiple of 4 KiB is needed")]
    Size(u64),
    /// A guest that touched what the file does not have would kill the process.
    #[error("the memory file has {file} bytes, the machine needs {needed}")]
    Short {
        /// Bytes of the file.
        file: u64,
        /// Bytes of the machine's memory.
        needed: u64,
    },
    /// The kernel.
    #[error("guest memory was not mapped")]
    Map(#[source] io::Error),
    /// The kernel, when room was asked for.
    #[error("no room for guest memory")]
    Reserve(#[from] MmapRegionError),
    /// Regions that overlap; cannot happen with the ones of this module.
    #[error(transparent)]
    Regions(#[from] GuestRegionCollectionError),
}

/// Maps the first `bytes` of `file` as a machine's memory.
///
/// # Errors
/// [`MemoryError`]; nothing stays mapped.
pub fn map(file: &File, bytes: u64, sharing: Sharing) -> Result<GuestMemory, MemoryError> {
    let memory = reserve(bytes)?;
    fill(&memory, file, sharing)?;
    Ok(memory)
}

/// Room for a machine's memory that holds nothing yet. KVM may be told of it; the guest must not run before [`fill`].
///
/// # Errors
/// [`MemoryError::Size`], [`MemoryError::Reserve`].
pub fn reserve(bytes: u64) -> Result<GuestMemory, MemoryError> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MemoryError::Size(bytes));
    }
    let mut regions = Vec::with_capacity(2);
    for (address, length) in [(0, bytes.min(LOW_RAM_END)), (HIGH_RAM_START, bytes.saturating_sub(LOW_RAM_END))] {
        if length > 0 {
            let length = usize::try_from(length).map_err(|_| MemoryError::Size(bytes))?;
            let (prot, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
            let region = MmapRegion::build(None, length, prot, flags)?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(address)).ok_or(MemoryError::Size(bytes))?);
        }
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Writes what a captured fork had for itself into memory that is a private mapping of its template's.
///
/// # Errors
/// [`DeltaError::Read`], [`DeltaError::Write`], after which the memory must not be used.
pub fn put_above(memory: &GuestMemory, own: &Delta) -> Result<(), DeltaError> {
    own.apply_with(|offset, pages| {
        let below = usize::try_from(LOW_RAM_END.saturating_sub(offset)).unwrap_or(usize::MAX).min(pages.len());
        let (low, high) = pages.split_at(below);
        for (offset, part) in [(offset, low), (offset + below as u64, high)] {
            if !part.is_empty() {
                let at = address_of(offset, part.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
                memory.write_slice(part, at).map_err(io::Error::other)?;
            }
        }
        Ok(())
    })
}

/// Puts the file in the place of reserved memory (or of another file's).
///
/// # Errors
/// [`MemoryError::Short`]; [`MemoryError::Map`], after which the memory must not be used.
pub fn fill(memory: &GuestMemory, file: &File, sharing: Sharing) -> Result<(), MemoryError> {
    let needed = size(memory);
    let length = file.metadata().map_err(MemoryError::Map)?.len();
    if length < needed {
        return Err(MemoryError::Short { file: length, needed });
    }
    let sharing = match sharing {
        Sharing::Shared => MapFlags::SHARED,
        Sharing::Private => MapFlags::PRIVATE | MapFlags::NORESERVE,
    };
    let mut offset = 0;
    for region in memory.iter() {
        let length = region.size();
        // SAFETY: the range is a mapping that `reserve` made and `memory` owns; it is replaced in one step, by one that
        // is as long, and nothing refers to what was in it (bytes of guest memory are only ever accessed volatile).
        let at = unsafe {
            rustix::mm::mmap(
                region.as_ptr().cast(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                sharing | MapFlags::FIXED,
                file,
                offset,
            )
        };
        at.map_err(|error| MemoryError::Map(error.into()))?;
        offset += region.len();
    }
    Ok(())
}

/// Makes pages present and writable ahead of the guest's first access, at `bytes` bytes from an offset in the memory file.
///
/// In private memory each becomes the machine's own copy. That is cheaper here, in one call, than by the guest's faults: a
/// fault that copies a page which a vCPU has mapped already makes all vCPUs leave the guest.
/// It is advice: what is not there, or not possible, is left to the guest's faults.
pub fn populate(memory: &GuestMemory, offset_in_file: u64, bytes: u64) {
    let slice = usize::try_from(bytes).ok().zip(address_of(offset_in_file, bytes));
    let Some(slice) = slice.and_then(|(count, address)| memory.get_slice(address, count).ok()) else { return };
    let start = slice.ptr_guard_mut().as_ptr();
    let before = start.addr() % PAGE;
    // SAFETY: the range, from the start of its first page, lies in a mapping of `memory`'s, which is borrowed; the advice
    // changes nothing that can be read there.
    let _ = unsafe { madvise(start.wrapping_sub(before).cast(), slice.len() + before, Advice::LinuxPopulateWrite) };
}

/// Bytes of RAM.
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Address in the guest of `bytes` bytes that start at an offset in the memory file.
///
/// `None` if they do not lie together in the guest, that is across the hole at 3 GiB, or past the end of all addresses.
/// Whether the machine has that much memory is not known here.
pub fn address_of(offset_in_file: u64, bytes: u64) -> Option<GuestAddress> {
    let end = offset_in_file.checked_add(bytes)?;
    if end <= LOW_RAM_END {
        return Some(GuestAddress(offset_in_file));
    }
    let address = offset_in_file.checked_sub(LOW_RAM_END)?.checked_add(HIGH_RAM_START)?;
    address.checked_add(bytes).map(|_| GuestAddress(address))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn only_a_shared_mapping_reaches_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut byte = [0];
        for (sharing, seen) in [(Sharing::Private, 0), (Sharing::Shared, 7)] {
            let memory = map(&file, 1 << 20, sharing).unwrap();
            memory.write_obj(7_u8, GuestAddress(5000)).unwrap();
            file.read_exact_at(&mut byte, 5000).unwrap();
            assert_eq!(byte, [seen], "{sharing:?}");
        }
    }

    #[test]
    fn populated_pages_are_private_copies_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"before", 8192).unwrap();
        let memory = map(&file, 1 << 20, Sharing::Private).unwrap();
        populate(&memory, 8192 + 10, 100);
        // Past the end, or nothing at all: no harm.
        populate(&memory, 1 << 20, 4096);
        populate(&memory, 0, 0);
        file.write_all_at(b"after!", 8192).unwrap();
        let mut read = [0; 6];
        memory.read_slice(&mut read, GuestAddress(8192)).unwrap();
        assert_eq!(&read, b"before");
    }

    #[test]
    fn private_memory_needs_no_right_to_write() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let read_only = File::open(file.path()).unwrap();
        let memory = map(&read_only, 8192, Sharing::Private).unwrap();
        memory.write_obj(7_u8, GuestAddress(0)).unwrap();
        assert!(matches!(map(&read_only, 8192, Sharing::Shared), Err(MemoryError::Map(_))));
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8191).unwrap();
        assert!(matches!(map(&file, 8192, Sharing::Private), Err(MemoryError::Short { file: 8191, needed: 8192 })));
        for bytes in [0, 4095] {
            assert!(matches!(reserve(bytes), Err(MemoryError::Size(_))));
        }
    }

    #[test]
    fn memory_past_three_gigabytes_continues_at_four() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LOW_RAM_END + 8192).unwrap();
        file.write_all_at(b"high", LOW_RAM_END + 4096).unwrap();
        let memory = map(&file, LOW_RAM_END + 8192, Sharing::Private).unwrap();
        let mut read = [0; 4];
        memory.read_slice(&mut read, address_of(LOW_RAM_END + 4096, 4).unwrap()).unwrap();
        assert_eq!(&read, b"high");
        assert_eq!(size(&memory), LOW_RAM_END + 8192);
        assert!(memory.read_slice(&mut read, GuestAddress(LOW_RAM_END)).is_err());
    }

    #[test]
    fn offsets_across_the_hole_have_no_address() {
        assert_eq!(address_of(0, LOW_RAM_END), Some(GuestAddress(0)));
        assert_eq!(address_of(LOW_RAM_END - 1, 2), None);
        assert_eq!(address_of(LOW_RAM_END, 2), Some(GuestAddress(HIGH_RAM_START)));
        assert_eq!(address_of(u64::MAX, 1), None);
        assert_eq!(address_of(u64::MAX - 5, 5), None);
    }
}
