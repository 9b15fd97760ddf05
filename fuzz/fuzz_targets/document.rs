//! An identity document, and a network section alone.
#![no_main]

use identity::{Document, Network};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(document) = Document::from_bytes(bytes) {
        assert!(document.to_bytes().expose() == bytes, "a document has one form");
    }
    if let Ok(document) = Document::from_json(bytes) {
        let again = Document::from_json(document.to_json().expose()).expect("our own document");
        assert!(again.to_json() == document.to_json());
    }
    if let Ok(network) = Network::from_bytes(bytes) {
        assert!(network.to_bytes() == bytes, "a section has one form");
    }
});
