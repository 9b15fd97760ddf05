//! The manifest of a template from elsewhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use store::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let text = serde_json::to_vec(&manifest).expect("every field has a JSON form");
        assert_eq!(Manifest::parse(&text).expect("our own manifest"), manifest);
    }
});
