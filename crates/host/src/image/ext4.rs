//! A directory tree as a read-only ext4 image, made by `mke2fs -d` with no mount and no root.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Path,
};

use thiserror::Error;

use super::{
    cache::CacheError,
    program::{Program, ProgramError},
};

const BLOCK: u64 = 4096;
/// Room for what the tree does not show: group descriptors, bitmaps, directory blocks. The file is sparse, so room is free.
const SLACK: u64 = 32 << 20;

/// Why there is no image.
#[derive(Debug, Error)]
pub enum Ext4Error {
    /// mke2fs (or unshare, with which an ordinary user runs it).
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The tree or the image.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// What a tree needs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Need {
    bytes: u64,
    inodes: u64,
}

/// Makes `image` from `tree`. `id` becomes its UUID, so that equal trees make images of one name. As an ordinary user
/// everything in it belongs to root: the tree itself can only be ours.
///
/// # Errors
/// [`Ext4Error`].
pub(crate) fn make(tree: &Path, image: &Path, id: [u8; 16]) -> Result<(), Ext4Error> {
    let mut need = Need::default();
    measure(tree, &mut need, &mut BTreeSet::new())?;
    let inodes = need.inodes + need.inodes / 8 + 64;
    let bytes = need.bytes + need.bytes / 16 + inodes * 256 + SLACK;
    let file = File::create(image).map_err(CacheError::at("made", image))?;
    file.set_len(bytes.next_multiple_of(1 << 20)).map_err(CacheError::at("written", image))?;
    drop(file);

    let uuid = uuid(id);
    let root = rustix::process::geteuid().is_root();
    let (name, package) = if root { ("mke2fs", "e2fsprogs") } else { ("unshare", "util-linux") };
    let mke2fs = Program::new(name, package).with(|command| {
        if !root {
            let mke2fs = super::program::find("mke2fs").unwrap_or_else(|| "mke2fs".into());
            command.args(["--user", "--map-root-user", "--"]).arg(mke2fs);
        }
        command
            // No journal: nothing is ever written. No checksums: each fork would run that code first, cold, in its
            // emulated guest, for a file that the host made and nobody changes.
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-I", "256", "-L", "offshoot-root"])
            .args(["-O", "^has_journal,^resize_inode,^metadata_csum"])
            .args(["-U", &uuid, "-N", &inodes.to_string()])
            .args(["-E", &format!("root_owner=0:0,hash_seed={uuid},lazy_itable_init=1,nodiscard")])
            .arg("-d")
            .arg(tree)
            .arg(image)
            .env("E2FSPROGS_FAKE_TIME", "1")
            .env("MKE2FS_SYNC", "0");
    });
    match mke2fs.output() {
        Ok(_) => Ok(()),
        Err(ProgramError::Missing { program, .. }) => Err(ProgramError::Missing { program, package }.into()),
        Err(error) => Err(out_of_room(image).map_or_else(|| error.into(), Ext4Error::from)),
    }
}

/// A program cannot tell us that the disk is full; the disk can.
pub(super) fn out_of_room(near: &Path) -> Option<CacheError> {
    let stat = rustix::fs::statvfs(near.parent()?).ok()?;
    (stat.f_bavail.saturating_mul(stat.f_frsize) < 8 << 20 || stat.f_files > 0 && stat.f_favail == 0)
        .then(|| CacheError::Full { path: near.to_owned() })
}

fn measure(path: &Path, need: &mut Need, linked: &mut BTreeSet<(u64, u64)>) -> Result<(), CacheError> {
    let meta = fs::symlink_metadata(path).map_err(CacheError::at("read", path))?;
    if meta.is_dir() || meta.nlink() == 1 || linked.insert((meta.dev(), meta.ino())) {
        need.inodes += 1;
        // An extent tree's own block for big files is within the 1/16 added later.
        need.bytes += meta.len().next_multiple_of(BLOCK).max(BLOCK);
    }
    if meta.is_dir() {
        for entry in fs::read_dir(path).map_err(CacheError::at("read", path))? {
            measure(&entry.map_err(CacheError::at("read", path))?.path(), need, linked)?;
        }
    }
    Ok(())
}

fn uuid(mut id: [u8; 16]) -> String {
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 5000]).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let mut need = Need::default();
        measure(dir.path(), &mut need, &mut BTreeSet::new()).unwrap();
        assert_eq!(need.inodes, 2);
        assert_eq!(need.bytes, 8192 + fs::metadata(dir.path()).unwrap().len().next_multiple_of(4096).max(4096));
    }

    #[test]
    fn an_identifier_is_a_uuid() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-8fff-bfff-ffffffffffff");
    }
}
