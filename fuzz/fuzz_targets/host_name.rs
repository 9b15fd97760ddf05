//! The host that a request names, and the suffix below which names are routed.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use route::{Suffix, Target};

static SUFFIX: LazyLock<Suffix> = LazyLock::new(|| "fork.test".parse().expect("a domain"));

fuzz_target!(|text: &str| {
    if let Ok(Target { fork, port }) = Target::parse(text, &SUFFIX) {
        assert!(text.to_ascii_lowercase().contains(fork.as_str()) && port != Some(0));
        let plain = match port {
            Some(port) => format!("{port}-{fork}.{}", *SUFFIX),
            None => format!("{fork}.{}", *SUFFIX),
        };
        assert_eq!(Target::parse(&plain, &SUFFIX).expect("our own name"), Target { fork, port });
    }
    if let Ok(suffix) = text.parse::<Suffix>() {
        assert_eq!(suffix.as_str().parse::<Suffix>().expect("our own suffix"), suffix);
    }
});
