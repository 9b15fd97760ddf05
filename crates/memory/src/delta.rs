//! The pages that a fork has for itself, as a file: with its template's memory they are the fork's memory.
//!
//! A fork maps its template's memory privately, so what it has written is in anonymous pages of its mapping, and stays so
//! in a fork that was itself restored from such a file. A delta is therefore always one layer above a template.
//!
//! ```text
//! 0      magic "OFSDELTA", format u32, bytes of a page u32, bytes of memory u64, ranges u64, data pages u64,
//!        template id (32 bytes, zero at its end); zero up to 4096                       all numbers little endian
//! 4096   the data pages, in the order of the ranges
//! then   the ranges, in rising order: first page u64, number of pages u32, kind u32 (0: zeros, 1: data)
//! ```
//!
//! A reader believes nothing: every range is inside the memory, above the one before, and accounted for in the file's length.
//! Whether the bytes are the ones that were written is for its owner to know (by a hash beside it).

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use identity::mailbox::{PAGE_SIZE, Page};
use thiserror::Error;

use crate::{ProcessMemory, sparse::CHUNK};

const MAGIC: &[u8; 8] = b"OFSDELTA";
const FORMAT: u32 = 1;
const HEADER: usize = PAGE_SIZE;
const ENTRY: usize = 16;
const TEMPLATE: Range<usize> = 40..72;
const ZEROS: u32 = 0;
const DATA: u32 = 1;
const PAGE: u64 = PAGE_SIZE as u64;

/// What a delta says of itself before its pages.
pub type Header = [u8; HEADER];

/// Why a delta was refused. Nothing was written then, but by [`DeltaError::Write`].
#[derive(Debug, Error)]
pub enum DeltaError {
    /// It can not be read.
    #[error("the file of a fork's pages can not be read")]
    Read(#[source] io::Error),
    /// It is not of the form this build knows, or contradicts itself.
    #[error("the file of a fork's pages is malformed: {0}")]
    Malformed(&'static str),
    /// It belongs to another template.
    #[error("the file of a fork's pages was made above another template")]
    OtherTemplate,
    /// The machine's memory could not be written: it must be destroyed.
    #[error("a fork's pages could not be written into its machine's memory")]
    Write(#[source] io::Error),
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeltaSize {
    /// Bytes that the fork had for itself.
    pub dirty: u64,
    /// Of these, bytes that are in the file. The others are as in the template, or zeros.
    pub data: u64,
    /// Of these, bytes that are zeros and are not in the template.
    pub zeros: u64,
}

/// One run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte, as offset in the memory.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where its bytes are in the file; `None` for zeros.
    pub at: Option<u64>,
}

/// Writes the pages in `dirty` (as [`touched_pages`](crate::touched_pages) finds them, of a machine that stands still) that are not as in `base`,
/// the template's memory. Each page that is dirty is shown to `seen`, with its offset.
///
/// # Errors
/// What reading the process or writing the file fails of.
pub fn write_delta(
    memory: &ProcessMemory,
    size: u64,
    dirty: &[Range<u64>],
    base: &File,
    template: &str,
    out: &File,
    mut seen: impl FnMut(u64, &Page),
) -> io::Result<DeltaSize> {
    let mut written = DeltaSize::default();
    let mut index = Index::default();
    let (mut own, mut old) = (vec![0; CHUNK], vec![0; CHUNK]);
    for range in dirty {
        let mut at = range.start;
        while at < range.end {
            let count = usize::try_from(range.end - at).unwrap_or(CHUNK).min(CHUNK);
            let (own, old) = (&mut own[..count], &mut old[..count]);
            memory.read(at, own)?;
            base.read_exact_at(old, at)?;
            let place = HEADER as u64 + index.data_pages * PAGE;
            let mut kept = 0;
            for page in 0..count / PAGE_SIZE {
                let bytes = page * PAGE_SIZE..(page + 1) * PAGE_SIZE;
                let offset = at + bytes.start as u64;
                written.dirty += PAGE;
                if let Some(page) = own[bytes.clone()].first_chunk() {
                    seen(offset, page);
                }
                if own[bytes.clone()] == old[bytes.clone()] {
                    continue;
                }
                if own[bytes.clone()].iter().all(|&byte| byte == 0) {
                    written.zeros += PAGE;
                    index.push(offset / PAGE, ZEROS);
                } else {
                    index.push(offset / PAGE, DATA);
                    own.copy_within(bytes, kept);
                    kept += PAGE_SIZE;
                }
            }
            out.write_all_at(&own[..kept], place)?;
            written.data += kept as u64;
            at += count as u64;
        }
    }
    let entries: Vec<u8> = index.ranges.iter().flat_map(|range| range.to_bytes()).collect();
    out.write_all_at(&entries, HEADER as u64 + index.data_pages * PAGE)?;
    out.write_all_at(&index.header(size, template), 0)?;
    Ok(written)
}

/// Shows every page in `dirty` to `seen`, with its offset.
///
/// # Errors
/// What reading the process fails of.
pub fn for_each_page(memory: &ProcessMemory, dirty: &[Range<u64>], mut seen: impl FnMut(u64, &Page)) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for range in dirty {
        let mut at = range.start;
        while at < range.end {
            let count = usize::try_from(range.end - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut buffer[..count];
            memory.read(at, chunk)?;
            for (index, page) in chunk.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
                seen(at + (index * PAGE_SIZE) as u64, page);
            }
            at += count as u64;
        }
    }
    Ok(())
}

/// Ranges under construction.
#[derive(Debug, Default)]
struct Index {
    ranges: Vec<Pages>,
    data_pages: u64,
}

#[derive(Debug, Clone, Copy)]
struct Pages {
    first: u64,
    count: u32,
    kind: u32,
}

impl Pages {
    fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.count.to_le_bytes());
        bytes[12..].copy_from_slice(&self.kind.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; ENTRY]) -> Self {
        Self { first: u64_at(bytes, 0), count: u32_at(bytes, 8), kind: u32_at(bytes, 12) }
    }
}

impl Index {
    fn push(&mut self, page: u64, kind: u32) {
        self.data_pages += u64::from(kind);
        match self.ranges.last_mut() {
            Some(last) if last.kind == kind && last.first + u64::from(last.count) == page && last.count < u32::MAX => {
                last.count += 1;
            }
            _ => self.ranges.push(Pages { first: page, count: 1, kind }),
        }
    }

    fn header(&self, size: u64, template: &str) -> Header {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        #[allow(clippy::cast_possible_truncation)] // 4096
        header[12..16].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        header[16..24].copy_from_slice(&size.to_le_bytes());
        header[24..32].copy_from_slice(&(self.ranges.len() as u64).to_le_bytes());
        header[32..40].copy_from_slice(&self.data_pages.to_le_bytes());
        header[TEMPLATE].copy_from_slice(&template_field(template));
        header
    }
}

fn template_field(template: &str) -> [u8; 32] {
    let mut field = [0; 32];
    field.iter_mut().zip(template.bytes()).for_each(|(to, from)| *to = from);
    field
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Where the ranges are in a file of `len` bytes that begins with `header`, and is for a machine of `size` bytes of memory.
///
/// # Errors
/// [`DeltaError::Malformed`], [`DeltaError::OtherTemplate`].
pub fn index_place(header: &Header, len: u64, size: u64, template: &str) -> Result<Range<u64>, DeltaError> {
    let refuse = |what| Err(DeltaError::Malformed(what));
    if &header[..8] != MAGIC {
        return refuse("it does not begin like one");
    }
    if u32_at(header, 8) != FORMAT || u64::from(u32_at(header, 12)) != PAGE {
        return refuse("it has another format");
    }
    if header[TEMPLATE] != template_field(template) {
        return Err(DeltaError::OtherTemplate);
    }
    if header[TEMPLATE.end..].iter().any(|&byte| byte != 0) {
        return refuse("its header has more than it says");
    }
    if u64_at(header, 16) != size {
        return refuse("it is of a machine with another memory");
    }
    let (ranges, pages) = (u64_at(header, 24), u64_at(header, 32));
    let most = size / PAGE;
    if ranges > most || pages > most {
        return refuse("it has more pages than the memory");
    }
    let start = HEADER as u64 + pages * PAGE;
    let end = start + ranges * ENTRY as u64;
    if end == len { Ok(start..end) } else { refuse("it has another length than it says") }
}

/// The runs of pages, from the bytes at [`index_place`].
///
/// # Errors
/// [`DeltaError::Malformed`].
pub fn parse_index(header: &Header, index: &[u8], size: u64) -> Result<Vec<Extent>, DeltaError> {
    let refuse = |what| Err(DeltaError::Malformed(what));
    let (entries, rest) = index.as_chunks::<ENTRY>();
    if !rest.is_empty() || entries.len() as u64 != u64_at(header, 24) {
        return refuse("it has another number of ranges than it says");
    }
    let (mut extents, mut next, mut at) = (Vec::with_capacity(entries.len()), 0, HEADER as u64);
    for entry in entries {
        let Pages { first, count, kind } = Pages::parse(entry);
        let end = first.checked_add(u64::from(count));
        let Some(end) = end.filter(|&end| count > 0 && first >= next && end <= size / PAGE) else {
            return refuse("its ranges overlap, or lie outside of the memory");
        };
        let len = u64::from(count) * PAGE;
        let place = match kind {
            ZEROS => None,
            DATA => Some(at),
            _ => return refuse("it has a range of no known kind"),
        };
        at += place.map_or(0, |_| len);
        extents.push(Extent { offset: first * PAGE, len, at: place });
        next = end;
    }
    if at == HEADER as u64 + u64_at(header, 32) * PAGE {
        Ok(extents)
    } else {
        refuse("its ranges do not have its pages")
    }
}

/// A delta that was checked and can be put above its template.
#[derive(Debug)]
pub struct Delta {
    file: File,
    extents: Vec<Extent>,
}

impl Delta {
    /// Reads and checks what it says of itself. `size` is the machine's memory in bytes.
    ///
    /// # Errors
    /// [`DeltaError`].
    pub fn open(file: File, size: u64, template: &str) -> Result<Self, DeltaError> {
        let len = file.metadata().map_err(DeltaError::Read)?.len();
        if len < HEADER as u64 {
            return Err(DeltaError::Malformed("it is shorter than its header"));
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).map_err(DeltaError::Read)?;
        let place = index_place(&header, len, size, template)?;
        // Not more than the file has: the length was just compared.
        let mut index = vec![0; usize::try_from(place.end - place.start).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut index, place.start).map_err(DeltaError::Read)?;
        let extents = parse_index(&header, &index, size)?;
        Ok(Self { file, extents })
    }

    /// The runs of pages.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Writes every page into the private memory of a machine that stands still and has its template's memory.
    ///
    /// # Errors
    /// [`DeltaError::Read`], [`DeltaError::Write`]: the memory is half-written, and the machine must be destroyed.
    pub fn apply(&self, memory: &ProcessMemory) -> Result<(), DeltaError> {
        self.apply_with(|offset, pages| memory.write(offset, pages))
    }

    /// The same for memory that is written with `write`, which is given an offset and some pages.
    ///
    /// # Errors
    /// As those of [`apply`](Self::apply).
    pub fn apply_with(&self, mut write: impl FnMut(u64, &[u8]) -> io::Result<()>) -> Result<(), DeltaError> {
        let mut buffer = vec![0; CHUNK];
        for extent in &self.extents {
            let mut done = 0;
            while done < extent.len {
                let count = usize::try_from(extent.len - done).unwrap_or(CHUNK).min(CHUNK);
                let chunk = &mut buffer[..count];
                match extent.at {
                    Some(at) => self.file.read_exact_at(chunk, at + done).map_err(DeltaError::Read)?,
                    None => chunk.fill(0),
                }
                write(extent.offset + done, chunk).map_err(DeltaError::Write)?;
                done += count as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 * PAGE;

    fn index(ranges: &[(u64, u32, u32)]) -> (Header, Vec<u8>, u64) {
        let ranges: Vec<_> = ranges.iter().map(|&(first, count, kind)| Pages { first, count, kind }).collect();
        let data_pages = ranges.iter().map(|range| u64::from(range.count) * u64::from(range.kind & 1)).sum();
        let bytes: Vec<u8> = ranges.iter().flat_map(|range| range.to_bytes()).collect();
        let len = HEADER as u64 + data_pages * PAGE + bytes.len() as u64;
        (Index { ranges, data_pages }.header(SIZE, "template"), bytes, len)
    }

    fn parse(ranges: &[(u64, u32, u32)]) -> Result<Vec<Extent>, DeltaError> {
        let (header, bytes, len) = index(ranges);
        index_place(&header, len, SIZE, "template")?;
        parse_index(&header, &bytes, SIZE)
    }

    #[test]
    fn ranges_are_taken_in_their_order_with_their_places() {
        let extents = parse(&[(0, 2, 1), (2, 1, 0), (63, 1, 1)]).unwrap();
        let places: Vec<_> =
            extents.iter().map(|extent| (extent.offset / PAGE, extent.len / PAGE, extent.at)).collect();
        assert_eq!(places, [(0, 2, Some(PAGE)), (2, 1, None), (63, 1, Some(3 * PAGE))]);
    }

    #[test]
    fn hostile_ranges_are_refused() {
        let hostile: [&[(u64, u32, u32)]; 7] = [
            &[(1, 2, 1), (2, 1, 1)],
            &[(5, 1, 1), (4, 1, 1)],
            &[(63, 2, 0)],
            &[(u64::MAX, 2, 0)],
            &[(u64::MAX / PAGE, 1, 0)],
            &[(3, 0, 0)],
            &[(3, 1, 2)],
        ];
        for ranges in hostile {
            assert!(matches!(parse(ranges), Err(DeltaError::Malformed(_))), "{ranges:?}");
        }
        let (header, bytes, len) = index(&[(0, 2, 1)]);
        assert!(matches!(index_place(&header, len, SIZE, "other"), Err(DeltaError::OtherTemplate)));
        assert!(matches!(index_place(&header, len, 2 * SIZE, "template"), Err(DeltaError::Malformed(_))));
        assert!(matches!(index_place(&header, len - 1, SIZE, "template"), Err(DeltaError::Malformed(_))));
        assert!(matches!(parse_index(&header, &bytes[1..], SIZE), Err(DeltaError::Malformed(_))));
        let mut flood = header;
        flood[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(index_place(&flood, len, SIZE, "template"), Err(DeltaError::Malformed(_))));
    }

    proptest::proptest! {
        #[test]
        fn whatever_an_index_says_is_inside_and_in_order_or_refused(
            ranges in proptest::collection::vec((0..70_u64, 0..5_u32, 0..3_u32), 0..20),
            change in proptest::option::of((0..100_usize, proptest::num::u8::ANY)),
        ) {
            let (mut header, mut bytes, len) = index(&ranges);
            if let Some((at, value)) = change {
                let byte = if at < 40 { header.get_mut(at) } else { bytes.get_mut(at - 40) };
                byte.into_iter().for_each(|byte| *byte = value);
            }
            let Ok(place) = index_place(&header, len, SIZE, "template") else { return Ok(()) };
            proptest::prop_assert_eq!(place.end, len);
            let Ok(extents) = parse_index(&header, &bytes, SIZE) else { return Ok(()) };
            let mut next = 0;
            for extent in extents {
                proptest::prop_assert!(extent.offset >= next && extent.len > 0 && extent.offset + extent.len <= SIZE);
                proptest::prop_assert!(extent.at.is_none_or(|at| at >= PAGE && at + extent.len <= place.start));
                next = extent.offset + extent.len;
            }
        }
    }
}
