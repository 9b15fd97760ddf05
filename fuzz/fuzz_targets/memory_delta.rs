//! The pages of a captured fork, as a hostile file says them. What is taken is inside of the memory and of the file, in rising order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memory::delta::{Header, index_place, parse_index};

fuzz_target!(|input: (u16, Vec<u8>, Vec<u8>)| {
    let (pages, start, index) = input;
    let size = u64::from(pages) * 4096;
    let mut header: Header = [0; 4096];
    header.iter_mut().zip(&start).for_each(|(to, from)| *to = *from);
    let said = u64::from_le_bytes(header[32..40].try_into().expect("8 bytes"));
    let len = said.wrapping_mul(4096).wrapping_add(4096).wrapping_add(index.len() as u64);
    let Ok(place) = index_place(&header, len, size, "0123456789abcdef0123") else { return };
    assert!(place.start >= 4096 && place.end == len && place.end - place.start == index.len() as u64);
    let Ok(extents) = parse_index(&header, &index, size) else { return };
    let mut next = 0;
    for extent in extents {
        assert!(extent.offset >= next && extent.len > 0 && extent.offset + extent.len <= size);
        assert!(extent.at.is_none_or(|at| at >= 4096 && at + extent.len <= place.start));
        next = extent.offset + extent.len;
    }
});
