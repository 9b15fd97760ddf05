//! A tar stream that a guest packed, as `cp` unpacks it. Whatever is in it, nothing is written outside of the target.
#![no_main]

use std::{fs, sync::LazyLock};

use host::guest::unpack;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Builder::new_current_thread().build().expect("a runtime"));

/// Entries: name, kind, name of what a link leads to, content.
type Input<'a> = (&'a [u8], Vec<(&'a [u8], u8, &'a [u8], &'a [u8])>);

/// One entry with a checksum that is right, so that what is behind it is reached.
fn entry(archive: &mut Vec<u8>, (name, kind, link, content): (&[u8], u8, &[u8], &[u8])) {
    let mut header = [0_u8; 512];
    let mut put = |at: usize, most: usize, bytes: &[u8]| {
        header[at..].iter_mut().zip(bytes.iter().take(most)).for_each(|(to, from)| *to = *from);
    };
    put(0, 100, name);
    put(100, 8, b"0000777\0");
    put(124, 12, format!("{:011o}", content.len()).as_bytes());
    put(136, 12, b"00000000000");
    put(148, 8, b"        ");
    put(156, 1, &[b"012345"[usize::from(kind % 6)]]);
    put(157, 100, link);
    put(257, 8, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    archive.extend_from_slice(&header);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

fuzz_target!(|input: Input<'_>| {
    let (raw, entries) = input;
    let mut archive = Vec::new();
    entries.into_iter().take(8).for_each(|given| entry(&mut archive, given));
    archive.extend_from_slice(raw);
    let place = tempfile::tempdir().expect("a directory");
    let (target, beside) = (place.path().join("target"), place.path().join("beside"));
    fs::create_dir(&target).expect("a directory");
    fs::write(&beside, "as it was").expect("a file");
    let _ = RUNTIME.block_on(unpack(&archive[..], &target));
    assert_eq!(fs::read_to_string(&beside).expect("it is there"), "as it was");
    assert_eq!(fs::read_dir(place.path()).expect("a directory").count(), 2);
});
