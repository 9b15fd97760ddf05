//! The mailbox page, as a hostile guest and a dying host may leave it.
#![allow(clippy::unwrap_used)]

use std::ops::Range;

use offshoot_identity::{
    AckKey, MailboxName,
    mailbox::{
        self, Header, MAX_CAPACITY, MAX_PAGES, MAX_TOKEN, MailboxError, PAGE_SIZE, PAYLOAD_PER_PAGE, Page, State, fill,
        offset, take, wipe,
    },
};
use proptest::prelude::*;

const KEY: [u8; 32] = [9; 32];

fn name(text: &str) -> MailboxName {
    MailboxName::parse(text).unwrap()
}

/// As many pages as the capacity needs, armed; they held something else before.
fn arm(
    name: &MailboxName,
    token: &[u8],
    nonce: [u8; 16],
    capacity: usize,
    by_agent: bool,
) -> Result<Vec<Page>, MailboxError> {
    let mut pages = vec![[0xa5; PAGE_SIZE]; capacity.div_ceil(PAYLOAD_PER_PAGE)];
    mailbox::arm(&mut pages, name, token, nonce, capacity, by_agent)?;
    Ok(pages)
}

fn armed(capacity: usize) -> Vec<Page> {
    arm(&name("app:config"), b"abc", [7; 16], capacity, false).unwrap()
}

/// Every write of the host, in its order: page, place, bytes.
fn writes(pages: &[Page], payload: &[u8]) -> Vec<(usize, usize, Vec<u8>)> {
    let header = Header::parse(&pages[0]).unwrap();
    let parts = fill(&header, payload, &AckKey::new(KEY)).unwrap();
    let mut writes: Vec<_> =
        parts.iter().map(|part| (part.page_index, offset::PAYLOAD_LEN, part.tail.expose().to_vec())).collect();
    writes.extend((0..pages.len()).rev().map(|index| (index, offset::STATE, State::Filled.to_bytes().to_vec())));
    writes
}

fn apply(pages: &mut [Page], writes: &[(usize, usize, Vec<u8>)]) {
    for (index, at, bytes) in writes {
        pages[*index][*at..*at + bytes.len()].copy_from_slice(bytes);
    }
}

fn read(pages: &[Page]) -> Result<Option<Vec<u8>>, MailboxError> {
    let pages: Vec<&Page> = pages.iter().collect();
    Ok(take(&pages)?.map(|(payload, key)| {
        assert_eq!(key.expose(), &KEY);
        payload.expose().to_vec()
    }))
}

/// Bytes that the header's checksum covers, and those after it that the host writes.
const HEADER: [Range<usize>; 2] = [0..offset::STATE, offset::NONCE..offset::PAYLOAD_LEN];

#[test]
fn i3_a_write_that_stops_anywhere_is_never_taken() {
    let payload = vec![0x5a; MAX_CAPACITY];
    let pages = armed(MAX_CAPACITY);
    let all = writes(&pages, &payload);
    for done in 0..all.len() {
        let mut pages = pages.clone();
        apply(&mut pages, &all[..done]);
        assert_eq!(read(&pages), Ok(None), "after {done} of {} writes", all.len());
    }
    let mut whole = pages;
    apply(&mut whole, &all);
    assert_eq!(read(&whole), Ok(Some(payload)));
}

#[test]
fn i3_a_page_left_out_or_exchanged_is_a_torn_write() {
    let payload = vec![0x5a; 3 * PAYLOAD_PER_PAGE];
    let pages = armed(payload.len());
    let all = writes(&pages, &payload);
    // Everything but one write, or with its last byte lost; the state of page 0, the last, is what a reader waits for.
    for missing in 0..all.len() - 1 {
        let mut pages = pages.clone();
        let rest: Vec<_> =
            all.iter().enumerate().filter(|(at, _)| *at != missing).map(|(_, write)| write.clone()).collect();
        apply(&mut pages, &rest);
        assert_eq!(read(&pages), Err(MailboxError::Torn), "without write {missing}");
    }
    let mut whole = pages;
    apply(&mut whole, &all);
    for (a, b) in [(0, 1), (1, 2)] {
        let mut exchanged = whole.clone();
        exchanged.swap(a, b);
        assert_eq!(read(&exchanged), Err(MailboxError::Torn));
    }
    assert_eq!(read(&whole[..2]), Err(MailboxError::Torn));
    assert_eq!(read(&[]), Err(MailboxError::Torn));
}

#[test]
fn pages_of_two_armings_do_not_mix() {
    let payload = vec![1; 2 * PAYLOAD_PER_PAGE];
    let mut pages = armed(payload.len());
    let writes = writes(&pages, &payload);
    let mut other = arm(&name("app:config"), b"abc", [8; 16], payload.len(), false).unwrap();
    apply(&mut pages, &writes);
    apply(&mut other, &writes);
    pages[1] = other.remove(1);
    assert_eq!(read(&pages), Err(MailboxError::Torn));
}

#[test]
fn what_was_taken_is_wiped_and_not_taken_again() {
    let mut pages = armed(100);
    let writes = writes(&pages, b"the secret");
    apply(&mut pages, &writes);
    assert_eq!(read(&pages), Ok(Some(b"the secret".to_vec())));
    wipe(&mut pages[0]);
    assert!(pages[0][offset::PAYLOAD_LEN..].iter().all(|&byte| byte == 0));
    assert_eq!(Header::parse(&pages[0]).unwrap().state, State::Taken);
    assert_eq!(read(&pages), Err(MailboxError::State("filled")));
}

#[test]
fn limits_hold_at_their_edges() {
    let arm = |token: &[u8], nonce, capacity| arm(&name("app"), token, nonce, capacity, false);
    assert_eq!(arm(&[1; MAX_TOKEN], [1; 16], MAX_CAPACITY).unwrap().len(), MAX_PAGES);
    assert_eq!(arm(b"", [1; 16], 1).unwrap().len(), 1);
    assert_eq!(arm(b"", [1; 16], PAYLOAD_PER_PAGE).unwrap().len(), 1);
    assert_eq!(arm(b"", [1; 16], PAYLOAD_PER_PAGE + 1).unwrap().len(), 2);
    assert!(arm(b"", [1; 16], 0).is_err());
    assert!(arm(b"", [1; 16], MAX_CAPACITY + 1).is_err());
    assert!(arm(&[1; MAX_TOKEN + 1], [1; 16], 1).is_err());
    assert!(arm(b"", [0; 16], 1).is_err());
    let mut pages = [[0xa5; PAGE_SIZE]; 2];
    for capacity in [PAYLOAD_PER_PAGE, 2 * PAYLOAD_PER_PAGE + 1] {
        let error = mailbox::arm(&mut pages, &name("app"), b"", [1; 16], capacity, false);
        assert_eq!(error, Err(MailboxError::Field("page count or index")));
    }
    assert_eq!(pages, [[0xa5; PAGE_SIZE]; 2], "what is refused is not written in part");
    let header = Header::parse(&armed(10)[0]).unwrap();
    assert!(fill(&header, &[0; 10], &AckKey::new(KEY)).is_ok());
    assert!(matches!(
        fill(&header, &[0; 11], &AckKey::new(KEY)),
        Err(MailboxError::TooLong { len: 11, capacity: 10, .. })
    ));
}

proptest! {
    #[test]
    fn what_is_filled_is_what_is_taken(payload in prop::collection::vec(any::<u8>(), 0..12_000), spare in 0..5_000_usize) {
        let mut pages = armed((payload.len() + spare).max(1));
        let writes = writes(&pages, &payload);
        apply(&mut pages, &writes);
        prop_assert_eq!(read(&pages), Ok(Some(payload)));
    }

    #[test]
    fn a_header_reads_back_as_it_was_armed(
        text in "[A-Za-z0-9._:-]{1,64}", token in prop::collection::vec(any::<u8>(), 0..=MAX_TOKEN),
        nonce in any::<[u8; 16]>(), capacity in 1..=MAX_CAPACITY, by_agent in any::<bool>(),
    ) {
        prop_assume!(nonce != [0; 16]);
        let pages = arm(&name(&text), &token, nonce, capacity, by_agent).unwrap();
        for (index, page) in pages.iter().enumerate() {
            let header = Header::parse(page).unwrap();
            prop_assert_eq!((header.name.as_str(), &header.token, header.nonce), (text.as_str(), &token, nonce));
            prop_assert_eq!((header.page_index, header.page_count, header.capacity), (index, pages.len(), capacity));
            prop_assert_eq!((header.by_agent, header.state), (by_agent, State::Armed));
        }
    }

    #[test]
    fn a_changed_header_is_refused(at in 0..offset::PAYLOAD_LEN, flip in 1..=255_u8) {
        prop_assume!(HEADER.iter().any(|range| range.contains(&at)));
        let mut page = armed(100).remove(0);
        page[at] ^= flip;
        prop_assert!(Header::parse(&page).is_err());
    }

    #[test]
    fn a_changed_payload_is_refused(at in 0..5_000_usize, flip in 1..=255_u8) {
        let payload = vec![3; 5_000];
        let mut pages = armed(payload.len());
        let writes = writes(&pages, &payload);
        apply(&mut pages, &writes);
        pages[at / PAYLOAD_PER_PAGE][offset::PAYLOAD + at % PAYLOAD_PER_PAGE] ^= flip;
        prop_assert_eq!(read(&pages), Err(MailboxError::Torn));
    }

    #[test]
    fn no_page_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 4096), magic in any::<bool>()) {
        let mut page: Page = bytes.try_into().unwrap();
        if magic {
            page[..16].copy_from_slice(&mailbox::MAGIC);
        }
        let _ = Header::parse(&page);
        let _ = take(&[&page]);
    }
}
