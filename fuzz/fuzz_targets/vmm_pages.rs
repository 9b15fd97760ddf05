//! The list of pages that a fork is to have ready.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::prefetch::{MAX_BYTES, PageList, Use};

fuzz_target!(|bytes: &[u8]| {
    for bytes in [bytes, &[b"OFSHPGS1", bytes].concat()] {
        if let Ok(list) = PageList::decode(bytes) {
            assert!(bytes.len() <= MAX_BYTES);
            assert_eq!(list.encode(), bytes);
            assert_eq!(PageList::new(list.parts(Use::Copied), list.parts(Use::Read)), list);
        }
    }
});
