//! Random state that is copied with its process and that nobody reseeds in a fork, found by the libraries and interpreters that a process runs.
//!
//! What is linked into a program leaves no name, but for Go, which marks its programs. Libraries that keep nothing between draws (libsodium as Debian has it, the C
//! library's `getrandom`) or that notice the copy are not in the tables.

use std::{fs::File, os::unix::fs::FileExt};

use super::{
    findings::{Findings, Kind},
    processes::{Mapped, Process, base},
};

/// Libraries, by the beginning of their files' names.
const LIBRARIES: [(&str, &str); 12] = [
    ("libgcrypt.so.", "libgcrypt"),
    ("libgnutls.so.", "GnuTLS"),
    ("libmbedcrypto.so.", "Mbed TLS"),
    ("libfreebl", "NSS (libfreebl)"),
    ("libpython", "Python's random"),
    ("libnode.so.", "Node.js' Math.random"),
    ("libjvm.so", "the JVM's SecureRandom and Random"),
    ("libruby", "Ruby's Random"),
    ("libperl.so.", "Perl's rand"),
    ("libphp", "PHP's mt_rand"),
    ("libcoreclr.so", ".NET's Random"),
    ("libR.so", "R's generators"),
];

/// Interpreters that are one program, by its name without a version.
const INTERPRETERS: [(&str, &str); 10] = [
    ("python", "Python's random"),
    ("pypy", "Python's random"),
    ("node", "Node.js' Math.random"),
    ("nodejs", "Node.js' Math.random"),
    ("deno", "Deno's Math.random"),
    ("bun", "Bun's Math.random"),
    ("ruby", "Ruby's Random"),
    ("perl", "Perl's rand"),
    ("php", "PHP's mt_rand"),
    ("php-fpm", "PHP's mt_rand"),
];

const GO: &str = "Go's math/rand";

/// What the recipe does for a process in a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Nothing.
    Nothing,
    /// A signal, which may reseed it or not.
    Signal,
}

/// Looks at one process, whose program has this name. `notices`: it has memory that is wiped when it is copied.
pub(super) fn look(
    process: &Process,
    mapped: &[Mapped],
    program: &str,
    told: Told,
    notices: bool,
    findings: &mut Findings,
) {
    let mut held = generators(mapped, program, notices);
    if process.open_program().is_ok_and(|program| is_go(&program)) {
        held.push(GO);
    }
    if held.is_empty() {
        return;
    }
    let held = held.join(", ");
    let (reason, cure) = match told {
        Told::Nothing => (
            format!(
                "runs what keeps random state in its memory ({held}): what was seeded before the capture goes on the same in all forks"
            ),
            "use on_fork = \"restart\", or a hook that reseeds it, or draw from getrandom(2) or /dev/urandom",
        ),
        Told::Signal => (
            format!(
                "runs what keeps random state in its memory ({held}), and whether the signal makes it reseed can not be known: what was seeded before the capture would go on the same in all forks"
            ),
            "use on_fork = \"restart\", or \"hook\" with a command that reseeds it, or draw from getrandom(2) or /dev/urandom",
        ),
    };
    findings.of(process, Kind::UnseededRandom, reason, cure);
}

fn generators(mapped: &[Mapped], program: &str, notices: bool) -> Vec<&'static str> {
    let mut held: Vec<&'static str> = Vec::new();
    let mut add = |what| {
        if !held.contains(&what) {
            held.push(what);
        }
    };
    if let Some((_, what)) = INTERPRETERS.iter().find(|(name, _)| *name == without_version(program)) {
        add(what);
    }
    // libsystemd is linked with libgcrypt and uses it to seal journals only, which is journald's affair. (Chromium has it by libdbus.)
    let by_systemd = mapped.iter().any(|mapped| base(&mapped.path).starts_with("libsystemd.so."));
    for file in mapped.iter().map(|mapped| base(&mapped.path)) {
        if by_systemd && file.starts_with("libgcrypt.so.") {
            continue;
        }
        if is_openssl(file) {
            add("OpenSSL (libcrypto)");
        } else if file.starts_with("libcrypto.so") && !notices {
            // BoringSSL, AWS-LC and LibreSSL, by whatever name, notice the copy, if the kernel lets them.
            add("libcrypto");
        }
        // A module of a language is none of its runtime: libpython3.11.so.1.0, not libpython_helper.so.
        let library = |(name, _): &&(&str, &str)| {
            file.strip_prefix(name).is_some_and(|rest| file.contains(".so") && !rest.starts_with(['_', '-']))
        };
        if let Some((_, what)) = LIBRARIES.iter().find(library) {
            add(what);
        }
    }
    held
}

/// `libcrypto.so.3`, `.1.1`: OpenSSL's versions; LibreSSL's are above 40, and BoringSSL has none.
fn is_openssl(file: &str) -> bool {
    let major = file.strip_prefix("libcrypto.so.").map(|version| version.split('.').next().unwrap_or_default());
    major.and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major < 40)
}

/// `python3.11` is `python`, `php-fpm8.2` is `php-fpm`.
fn without_version(program: &str) -> &str {
    program.trim_end_matches(|character: char| character.is_ascii_digit() || character == '.')
}

/// Whether an ELF file has the note in which Go's linker writes its build id (cmd/internal/buildid: name `Go`, type 4). It survives stripping.
fn is_go(program: &File) -> bool {
    const PT_NOTE: u32 = 4;
    const BUILD_ID: u32 = 4;
    let mut head = [0; 64];
    // Elf64_Ehdr: e_phoff at 32, e_phentsize at 54, e_phnum at 56. Little-endian, 64 bits.
    if program.read_exact_at(&mut head, 0).is_err() || !head.starts_with(b"\x7fELF\x02\x01") {
        return false;
    }
    let (Some(at), Some(size), Some(count)) = (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56)) else {
        return false;
    };
    (0..count.min(64)).any(|index| {
        // Elf64_Phdr: p_type at 0, p_offset at 8, p_filesz at 32.
        let mut header = [0; 56];
        let place = at.checked_add(u64::from(index) * u64::from(size));
        if place.is_none_or(|place| program.read_exact_at(&mut header, place).is_err()) {
            return false;
        }
        let (Some(PT_NOTE), Some(offset), Some(len)) = (u32_at(&header, 0), u64_at(&header, 8), u64_at(&header, 32))
        else {
            return false;
        };
        let mut notes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(4096)];
        program.read_exact_at(&mut notes, offset).is_ok() && has_note(&notes, b"Go\0\0", BUILD_ID)
    })
}

/// Whether there is a note of this name and type: sizes of name and content, the type, and both, padded to four bytes.
fn has_note(mut notes: &[u8], name: &[u8], kind: u32) -> bool {
    while let (Some(name_len), Some(len), Some(this)) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8)) {
        if this == kind && name_len as usize == name.len() && notes.get(12..12 + name.len()) == Some(name) {
            return true;
        }
        let padded = |len: u32| u64::from(len).next_multiple_of(4);
        let next = usize::try_from(12 + padded(name_len) + padded(len)).unwrap_or(usize::MAX);
        notes = notes.get(next..).unwrap_or_default();
    }
    false
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    fn held(files: &[&str], program: &str, notices: bool) -> Vec<&'static str> {
        let mapped: Vec<_> = files.iter().map(|file| Mapped { path: format!("/usr/lib/{file}") }).collect();
        generators(&mapped, program, notices)
    }

    #[test]
    fn i17_generators_are_known_by_what_is_mapped() {
        assert_eq!(held(&["libc.so.6", "libcrypto.so.3"], "nginx", false), ["OpenSSL (libcrypto)"]);
        assert_eq!(
            held(&["libcrypto.so.1.1", "libcrypto.so.1.1"], "x", true),
            ["OpenSSL (libcrypto)"],
            "it does not notice"
        );
        assert_eq!(held(&["libcrypto.so.52"], "x", false), ["libcrypto"]);
        assert!(held(&["libcrypto.so.52"], "x", true).is_empty(), "LibreSSL notices the copy");
        assert!(held(&["libcrypto.so"], "x", true).is_empty(), "BoringSSL too");
        assert_eq!(held(&["libpython3.11.so.1.0"], "uwsgi", false), ["Python's random"]);
        assert_eq!(held(&["libgcrypt.so.20.4.1", "libfreeblpriv3.so"], "x", false), ["libgcrypt", "NSS (libfreebl)"]);
        assert!(
            held(&["libgcrypt.so.20.4.1", "libsystemd.so.0.35.0"], "x", false).is_empty(),
            "libsystemd brings it along"
        );
        for (program, what) in
            [("python3.11", "Python's random"), ("node", "Node.js' Math.random"), ("php-fpm8.2", "PHP's mt_rand")]
        {
            assert_eq!(held(&[], program, true), [what]);
        }
        for file in [
            "libc.so.6",
            "libsodium.so.23",
            "libpython_helper.so",
            "libruby-parser.so",
            "libpython3.11.a",
            "libcrypto.txt",
        ] {
            assert!(held(&[file], "busybox", false).is_empty(), "{file}");
        }
        for program in ["", "busybox", "sh", "pythonista", "nodemon", "3.11"] {
            assert!(held(&[], program, false).is_empty(), "{program}");
        }
    }

    /// An ELF file with one note at 120.
    fn elf(name: &[u8; 4], kind: u32) -> Vec<u8> {
        let mut file = vec![0; 256];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&56_u16.to_le_bytes());
        file[56..58].copy_from_slice(&1_u16.to_le_bytes());
        file[64..68].copy_from_slice(&4_u32.to_le_bytes());
        file[72..80].copy_from_slice(&120_u64.to_le_bytes());
        file[96..104].copy_from_slice(&64_u64.to_le_bytes());
        // Another note before it, of three bytes.
        file[120..124].copy_from_slice(&4_u32.to_le_bytes());
        file[124..128].copy_from_slice(&3_u32.to_le_bytes());
        file[132..136].copy_from_slice(b"GNU\0");
        file[140..144].copy_from_slice(&4_u32.to_le_bytes());
        file[148..152].copy_from_slice(&kind.to_le_bytes());
        file[152..156].copy_from_slice(name);
        file
    }

    #[test]
    fn i17_go_programs_are_known_by_their_build_id_and_hostile_files_are_no_matter() {
        let path = std::env::temp_dir().join(format!("offshoot-audit-go-{}", std::process::id()));
        let go = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            is_go(&File::open(&path).unwrap())
        };
        let good = elf(b"Go\0\0", 4);
        assert!(go(&good));
        assert!(!go(&elf(b"GNU\0", 4)) && !go(&elf(b"Go\0\0", 3)));
        for end in [0, 3, 63, 64, 100, 130, 150] {
            assert!(!go(&good[..end]), "{end}");
        }
        for at in 0..good.len() {
            let mut bent = good.clone();
            bent[at] = 0xff;
            let _ = go(&bent);
        }
        fs::remove_file(path).unwrap();
    }
}
