//! The pages that a fork of a template touches on its way to its ack, as a file: later forks are given them before they run, in
//! a few calls instead of a fault for each.
//!
//! ```text
//! 8 bytes  "OFSHPGS1"
//! then, up to MAX_RANGES times, little endian and in rising order:
//! u32      first page, counted from the beginning of the memory file
//! u32      bits 0 to 30: number of pages, at least 1; bit 31: whether they are read only, not copied
//! ```
//!
//! It is advice: a list that can not be read, or that names pages which are not there, only makes a fork slower.

use std::ops::Range;

use thiserror::Error;

use crate::layout::PAGE_BYTES;

const MAGIC: &[u8; 8] = b"OFSHPGS1";
/// Most ranges of a list.
pub const MAX_RANGES: usize = 8192;
/// Most pages of a list that are copied, 16 MiB: each is memory that every fork has for itself from its beginning.
pub const MAX_COPIED: u64 = 4096;
/// Most pages of a list that are read, 64 MiB: they cost time when a machine is started ahead, and page tables.
pub const MAX_READ: u64 = 16384;
/// Most bytes of an encoded list.
pub const MAX_BYTES: usize = MAGIC.len() + MAX_RANGES * ENTRY;
const ENTRY: usize = 8;
const READ: u32 = 1 << 31;

/// Why a list can not be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PageListError {
    /// Not such a file, or one of another version.
    #[error("it is no list of pages")]
    Format,
    /// More than a list may have.
    #[error("it has more than {MAX_RANGES} ranges, {MAX_COPIED} pages to copy or {MAX_READ} to read")]
    TooMany,
}

/// What a fork does with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It writes them, so they become its own.
    Copied,
    /// It reads them.
    Read,
}

impl Use {
    fn limit(self) -> u64 {
        match self {
            Self::Copied => MAX_COPIED,
            Self::Read => MAX_READ,
        }
    }
}

/// Ranges of pages, in rising order, none of them twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageList(Vec<(u32, u32, Use)>);

impl PageList {
    /// A list of ranges of bytes of a memory file: whole pages, none of them twice. What is above the limits is left out.
    pub fn new(copied: impl IntoIterator<Item = Range<u64>>, read: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut list = entries(copied, Use::Copied);
        let room = MAX_RANGES - list.len();
        list.extend(entries(read, Use::Read).into_iter().take(room));
        list.sort_by_key(|(first, ..)| *first);
        Self(list)
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let entry = |&(first, count, what): &(u32, u32, Use)| {
            let count = if what == Use::Read { count | READ } else { count };
            [first.to_le_bytes(), count.to_le_bytes()]
        };
        MAGIC.iter().copied().chain(self.0.iter().flat_map(entry).flatten()).collect()
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// [`PageListError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, PageListError> {
        let (entries, rest) = bytes.strip_prefix(MAGIC).ok_or(PageListError::Format)?.as_chunks::<ENTRY>();
        if !rest.is_empty() {
            return Err(PageListError::Format);
        }
        if entries.len() > MAX_RANGES {
            return Err(PageListError::TooMany);
        }
        let number = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
        let entry = |&[a, b, c, d, e, f, g, h]: &[u8; ENTRY]| {
            let count = number([e, f, g, h]);
            (number([a, b, c, d]), count & !READ, if count & READ == 0 { Use::Copied } else { Use::Read })
        };
        let list = Self(entries.iter().map(entry).collect());
        let mut end = 0;
        for &(first, count, _) in &list.0 {
            if count == 0 || u64::from(first) < end {
                return Err(PageListError::Format);
            }
            end = u64::from(first) + u64::from(count);
        }
        let too_many =
            |what: Use| list.parts(what).map(|part| (part.end - part.start) / PAGE_BYTES).sum::<u64>() > what.limit();
        if too_many(Use::Copied) || too_many(Use::Read) { Err(PageListError::TooMany) } else { Ok(list) }
    }

    /// Ranges of bytes of the memory file.
    pub fn parts(&self, what: Use) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().filter(move |(.., other)| *other == what).map(|&(first, count, _)| {
            let start = u64::from(first) * PAGE_BYTES;
            start..start + u64::from(count) * PAGE_BYTES
        })
    }
}

fn entries(parts: impl IntoIterator<Item = Range<u64>>, what: Use) -> Vec<(u32, u32, Use)> {
    let mut list = Vec::new();
    let mut room = what.limit();
    for part in parts {
        let pages = (part.end.saturating_sub(part.start) / PAGE_BYTES).min(room);
        let (Ok(first), Ok(count)) = (u32::try_from(part.start / PAGE_BYTES), u32::try_from(pages)) else { break };
        if count == 0 || list.len() == MAX_RANGES {
            break;
        }
        room -= pages;
        list.push((first, count, what));
    }
    list
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let (copied, read) = ([0..4096, 8192..40960], [4096..8192, (1 << 40)..(1 << 40) + 4096]);
        let list = PageList::new(copied.clone(), read.clone());
        assert_eq!(PageList::decode(&list.encode()).unwrap(), list);
        assert_eq!(list.parts(Use::Copied).collect::<Vec<_>>(), copied);
        assert_eq!(list.parts(Use::Read).collect::<Vec<_>>(), read);
        assert_eq!(PageList::decode(&PageList::default().encode()).unwrap(), PageList::default());
    }

    #[test]
    fn a_list_is_cut_where_it_gets_too_long() {
        let page = |index: u64| index * 2 * PAGE_BYTES..(index * 2 + 1) * PAGE_BYTES;
        let long = PageList::new((0..2000).map(page), (2000..20_000).map(page));
        assert_eq!((long.parts(Use::Copied).count(), long.parts(Use::Read).count()), (2000, MAX_RANGES - 2000));
        let large = PageList::new([0..1 << 30, (1 << 31)..(1 << 32)], [1 << 33..1 << 34]);
        assert_eq!(large.parts(Use::Copied).collect::<Vec<_>>(), [0..MAX_COPIED * PAGE_BYTES]);
        for list in [long, large] {
            assert!(list.encode().len() <= MAX_BYTES);
            assert_eq!(PageList::decode(&list.encode()).unwrap(), list);
        }
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let with = |entries: &[[u32; 2]]| {
            let bytes = entries.as_flattened().iter().flat_map(|number| number.to_le_bytes());
            PageList::decode(&MAGIC.iter().copied().chain(bytes).collect::<Vec<_>>())
        };
        assert!(with(&[[1, 2], [3, 1 | READ]]).is_ok());
        for bytes in [&b""[..], b"OFSHPGS2", b"OFSHPGS1\0\0\0\0", b"OFSHPGS1\0\0\0\0\0\0\0\0\0"] {
            assert_eq!(PageList::decode(bytes), Err(PageListError::Format));
        }
        for wrong in [[[1, READ], [2, 1]], [[1, 2], [2, 1 | READ]], [[5, 1], [1, 1]]] {
            assert_eq!(with(&wrong), Err(PageListError::Format));
        }
        for many in [READ - 1, u32::MAX] {
            assert_eq!(with(&[[0, many]]), Err(PageListError::TooMany));
        }
        assert_eq!(with(&vec![[0, 0]; MAX_RANGES + 1]), Err(PageListError::TooMany));
    }
}
