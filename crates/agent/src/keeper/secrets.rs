//! A fork's secrets while it is captured: sealed where they lie, so that what is captured does not hold them.
//!
//! ```text
//! quiesce   read ─▶ sealed for the host's key ─▶ written over, in place ─▶ the plain ones wiped
//! continue  the key comes with the document ─▶ opened ─▶ written over, in place
//! become    the files are wiped and removed as they are (see `identity_dir`)
//! ```

use std::io;

use identity::{
    Secret,
    seal::{self, KEY_LEN, SealKey, Sealed},
};
use zeroize::{Zeroize, Zeroizing};

use super::identity_dir::Directory;

const FOLDER: &str = "secrets/";

/// Secrets that are sealed.
#[derive(Debug)]
pub(super) struct SealedSecrets {
    paths: Vec<String>,
    sealed: Sealed,
}

impl SealedSecrets {
    /// How many.
    pub(super) fn count(&self) -> usize {
        self.paths.len()
    }

    /// Opens them.
    pub(super) fn open(self, directory: &Directory, key: Option<&Secret>) -> io::Result<()> {
        let key = key.ok_or_else(|| io::Error::other("the document has no key for the sealed secrets"))?;
        let mut texts = read(directory, &self.paths)?;
        seal::unseal(key, &self.sealed, &mut texts).map_err(io::Error::other)?;
        write(directory, &self.paths, &texts)
    }
}

/// Seals those among `written`, the files of the identity directory. `None` if there are none.
///
/// # Errors
/// What the kernel says; they are as they were.
pub(super) fn seal(directory: &Directory, written: &[String], key: &SealKey) -> io::Result<Option<SealedSecrets>> {
    let paths: Vec<String> = written.iter().filter(|path| path.starts_with(FOLDER)).cloned().collect();
    if paths.is_empty() {
        return Ok(None);
    }
    let plain = read(directory, &paths)?;
    let mut texts = plain.clone();
    let mut random = Zeroizing::new([0; KEY_LEN]);
    getrandom::fill(&mut *random).map_err(|error| io::Error::other(error.to_string()))?;
    let sealed = seal::seal(key, &random, &mut texts).ok_or_else(|| io::Error::other("sealing the secrets"))?;
    drop(random);
    if let Err(error) = write(directory, &paths, &texts) {
        write(directory, &paths, &plain)?;
        return Err(error);
    }
    drop(plain);
    drop(texts);
    wipe_stack();
    wipe_registers();
    Ok(Some(SealedSecrets { paths, sealed }))
}

fn read(directory: &Directory, paths: &[String]) -> io::Result<Vec<Zeroizing<Vec<u8>>>> {
    paths.iter().map(|path| directory.read(path).map(Zeroizing::new)).collect()
}

fn write(directory: &Directory, paths: &[String], texts: &[Zeroizing<Vec<u8>>]) -> io::Result<()> {
    paths.iter().zip(texts).try_for_each(|(path, text)| directory.overwrite(path, text))
}

/// What the ciphers left below this frame.
#[inline(never)]
fn wipe_stack() {
    let mut space = [0_u8; 32 * 1024];
    space.zeroize();
    std::hint::black_box(&mut space);
}

/// What copies and ciphers left in the processor's vector registers: a capture holds those of the thread that runs, and the kernel's memory those of the
/// others. All bits are set instead of cleared, since the kernel need not write registers that are as after a reset, and then the thread leaves the
/// processor for a moment, so that they are written.
#[allow(unsafe_code)]
#[inline(never)]
fn wipe_registers() {
    // SAFETY: only registers are written, and all that are written are named.
    unsafe {
        std::arch::asm!(
            "pcmpeqd xmm0, xmm0", "pcmpeqd xmm1, xmm1", "pcmpeqd xmm2, xmm2", "pcmpeqd xmm3, xmm3",
            "pcmpeqd xmm4, xmm4", "pcmpeqd xmm5, xmm5", "pcmpeqd xmm6, xmm6", "pcmpeqd xmm7, xmm7",
            "pcmpeqd xmm8, xmm8", "pcmpeqd xmm9, xmm9", "pcmpeqd xmm10, xmm10", "pcmpeqd xmm11, xmm11",
            "pcmpeqd xmm12, xmm12", "pcmpeqd xmm13, xmm13", "pcmpeqd xmm14, xmm14", "pcmpeqd xmm15, xmm15",
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nomem, nostack, preserves_flags),
        );
    }
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has these instructions; only registers are written, whose lower halves are named. Nothing that this program was compiled
        // to uses the upper ones.
        unsafe {
            std::arch::asm!(
                "vcmpps ymm0, ymm0, ymm0, 15", "vmovaps ymm1, ymm0", "vmovaps ymm2, ymm0", "vmovaps ymm3, ymm0",
                "vmovaps ymm4, ymm0", "vmovaps ymm5, ymm0", "vmovaps ymm6, ymm0", "vmovaps ymm7, ymm0",
                "vmovaps ymm8, ymm0", "vmovaps ymm9, ymm0", "vmovaps ymm10, ymm0", "vmovaps ymm11, ymm0",
                "vmovaps ymm12, ymm0", "vmovaps ymm13, ymm0", "vmovaps ymm14, ymm0", "vmovaps ymm15, ymm0",
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nomem, nostack),
            );
        }
    }
    std::thread::sleep(std::time::Duration::from_micros(1));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::keeper::identity_dir::{plan, tests::document};

    #[test]
    fn i15_sealed_secrets_are_in_no_file_until_the_key_opens_them() {
        let path = std::env::temp_dir().join(format!("offshoot-sealed-{}", std::process::id()));
        for folder in ["env", "secrets"] {
            std::fs::create_dir_all(path.join(folder)).unwrap();
        }
        let directory = Directory::open(path.to_str().unwrap()).unwrap();
        let written =
            directory.write(&[], &plan(&document("a"), &crate::payload::Payload::new()), &directory.blanks()).unwrap();
        let content = || std::fs::read(path.join("secrets/KEY")).unwrap();
        assert_eq!(content(), b"hunter2");
        let (key, other) = (Secret::new(vec![1; 32]), Secret::new(vec![2; 32]));
        let sealed = || seal(&directory, &written, &seal::public(&key).unwrap()).unwrap().unwrap();
        let first = sealed();
        assert_eq!((first.count(), content().len()), (1, 7));
        assert_ne!(content(), b"hunter2");
        first.open(&directory, Some(&key)).unwrap();
        assert_eq!(content(), b"hunter2");
        for wrong in [Some(&other), None] {
            let again = sealed();
            let closed = content();
            assert!(again.open(&directory, wrong).is_err());
            assert_eq!(content(), closed);
            std::fs::set_permissions(path.join("secrets/KEY"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
                .unwrap();
            std::fs::write(path.join("secrets/KEY"), "hunter2").unwrap();
        }
        std::fs::remove_dir_all(path).unwrap();
    }
}
