//! A root file system from a directory of the host.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::{
    RootError,
    tree::{Content, Meta, Tree},
};
use crate::image::cache::CacheError;

const MAX_DEPTH: usize = 256;

/// One thing in the directory, by its path relative to it.
struct Found {
    path: PathBuf,
    meta: Metadata,
}

/// Everything in `root` in a fixed order, without what is mounted there (a chroot in use has `/proc`).
fn list(root: &Path) -> Result<Vec<Found>, CacheError> {
    fn walk(root: &Path, below: &Path, device: u64, found: &mut Vec<Found>) -> Result<(), CacheError> {
        let directory = root.join(below);
        let fail = |error| CacheError::at("read", &directory)(error);
        if below.components().count() > MAX_DEPTH {
            return Err(fail(io::Error::other("too deep")));
        }
        let entries: Result<Vec<_>, _> = fs::read_dir(&directory).map_err(fail)?.collect();
        let mut entries = entries.map_err(fail)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = below.join(entry.file_name());
            let meta = entry.metadata().map_err(CacheError::at("read", &entry.path()))?;
            let descend = meta.is_dir() && meta.dev() == device;
            found.push(Found { path: path.clone(), meta });
            if descend {
                walk(root, &path, device, found)?;
            }
        }
        Ok(())
    }
    let meta = fs::metadata(root).map_err(CacheError::at("read", root))?;
    let mut found = Vec::new();
    walk(root, Path::new(""), meta.dev(), &mut found)?;
    Ok(found)
}

/// A hash of all that `copy` would copy.
pub(super) fn hash(root: &Path, owners: bool) -> Result<blake3::Hash, RootError> {
    let mut hash = blake3::Hasher::new();
    for Found { path, meta } in list(root)? {
        hash.update(path.as_os_str().as_encoded_bytes()).update(&[0]);
        hash.update(&meta.mode().to_le_bytes()).update(&meta.mtime().to_le_bytes());
        if owners {
            hash.update(&meta.uid().to_le_bytes()).update(&meta.gid().to_le_bytes());
        }
        let full = root.join(&path);
        if meta.is_file() {
            let mut content = blake3::Hasher::new();
            content.update_reader(open(&full)?).map_err(CacheError::at("read", &full))?;
            hash.update(content.finalize().as_bytes());
        } else if meta.is_symlink() {
            let target = fs::read_link(&full).map_err(CacheError::at("read", &full))?;
            hash.update(target.as_os_str().as_encoded_bytes()).update(&[0]);
        }
    }
    Ok(hash.finalize())
}

/// Copies it all into the tree: sockets are left out, they mean nothing in a guest.
pub(super) fn copy(root: &Path, tree: &mut Tree) -> Result<(), RootError> {
    let mut linked: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let mut any = false;
    for Found { path, meta } in list(root)? {
        any = true;
        let full = root.join(&path);
        let own = Meta {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime(),
            capability: capability(&full, &meta),
        };
        let kind = meta.file_type();
        if meta.is_dir() {
            tree.add(&path, own, Content::Directory)?;
        } else if meta.is_symlink() {
            let target = fs::read_link(&full).map_err(CacheError::at("read", &full))?;
            tree.add(&path, own, Content::Symlink(&target))?;
        } else if let (true, Some(first)) = (meta.nlink() > 1, linked.get(&(meta.dev(), meta.ino()))) {
            tree.add(&path, own, Content::Hardlink(first))?;
        } else if meta.is_file() {
            tree.add(&path, own, Content::File(&mut open(&full)? as &mut dyn Read))?;
            linked.insert((meta.dev(), meta.ino()), path);
        } else if kind.is_fifo() {
            tree.add(&path, own, Content::Fifo)?;
        } else if kind.is_char_device() || kind.is_block_device() {
            let device = meta.rdev();
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            tree.add(&path, own, Content::Device { block: kind.is_block_device(), major, minor })?;
        }
    }
    if any { Ok(()) } else { Err(RootError::Empty(root.to_owned())) }
}

fn open(path: &Path) -> Result<File, CacheError> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(CacheError::at("read", path))
}

fn capability(path: &Path, meta: &Metadata) -> Option<Vec<u8>> {
    let mut value = vec![0; 64];
    // Absent from nearly every file, and not to be had from some file systems: no error either way.
    let length = rustix::fs::lgetxattr(path, "security.capability", &mut value[..]).ok().filter(|_| meta.is_file())?;
    value.truncate(length);
    Some(value)
}
