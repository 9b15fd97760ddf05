//! The pages of a filled mailbox, changed anywhere. The reader never leaves its bounds, and a single changed byte of a
//! payload never passes. (More changes can: the checksum is against torn writes, not against the guest itself.)
#![no_main]

use identity::{
    AckKey, MailboxName,
    mailbox::{Header, PAGE_SIZE, PAYLOAD_PER_PAGE, Page, State, arm, fill, offset, take},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, Vec<u8>, Vec<(u8, u16, u8)>)| {
    let (spare, payload, changes) = input;
    let capacity = payload.len() + usize::from(spare);
    let mut pages = vec![[0; PAGE_SIZE]; capacity.div_ceil(PAYLOAD_PER_PAGE)];
    if arm(&mut pages, &MailboxName::identity(), b"token", [7; 16], capacity, true).is_err() {
        return;
    }
    let header = Header::parse(&pages[0]).expect("armed");
    for part in fill(&header, &payload, &AckKey::new([9; 32])).expect("it fits") {
        let page = &mut pages[part.page_index];
        page[offset::PAYLOAD_LEN..].copy_from_slice(part.tail.expose());
        page[offset::STATE..offset::NONCE].copy_from_slice(&State::Filled.to_bytes());
    }
    let count = pages.len();
    let at = |at: u16| usize::from(at) % PAGE_SIZE;
    for &(page, place, value) in &changes {
        pages[usize::from(page) % count][at(place)] = value;
    }
    let pages: Vec<&Page> = pages.iter().collect();
    if let Ok(Some((taken, _))) = take(&pages) {
        assert!(taken.expose().len() <= capacity);
        if changes.len() < 2 && changes.iter().all(|&(_, place, _)| at(place) >= offset::PAYLOAD) {
            assert!(taken.expose() == payload);
        }
    }
});
