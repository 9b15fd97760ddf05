//! One page of a template's memory. The harness puts magic and checksum right, so that the fields are reached.
#![no_main]

use identity::mailbox::{Header, MAGIC, PAGE_SIZE, Page, offset};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut page: Page = [0; PAGE_SIZE];
    let len = bytes.len().min(PAGE_SIZE);
    page[..len].copy_from_slice(&bytes[..len]);
    let _ = Header::parse(&page);

    page[..MAGIC.len()].copy_from_slice(&MAGIC);
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&page[..offset::STATE]);
    checksum.update(&page[offset::NONCE..offset::HEADER_CRC]);
    page[offset::HEADER_CRC..offset::PAYLOAD_LEN].copy_from_slice(&checksum.finalize().to_le_bytes());
    if let Ok(header) = Header::parse(&page) {
        assert!(header.page_index < header.page_count);
        assert!(header.page_count <= identity::mailbox::MAX_PAGES);
        assert!(header.capacity <= identity::mailbox::MAX_CAPACITY);
    }
});
