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
    wipe_stack();
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
