//! A root file system from a tar archive, plain or compressed with gzip or zstd.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
    path::Path,
};

use tar::{Archive, Entry, EntryType};

use super::{
    RootError,
    tree::{Content, Meta, Tree},
};
use crate::image::cache::CacheError;

/// Whom to tell how many bytes of the file are read.
pub(super) type Read64<'a> = dyn FnMut(u64) + 'a;

/// Unpacks a whole archive into the tree.
pub(super) fn unpack(path: &Path, tree: &mut Tree, progress: &mut Read64<'_>) -> Result<(), RootError> {
    let file = File::open(path).map_err(CacheError::at("read", path))?;
    let mut archive = Archive::new(plain(file, progress)?);
    let mut any = false;
    for entry in archive.entries().map_err(RootError::Archive)? {
        put(&mut entry.map_err(RootError::Archive)?, tree)?;
        any = true;
    }
    if any { Ok(()) } else { Err(RootError::Empty(path.to_owned())) }
}

/// The archive behind its compression, told by its first bytes.
pub(super) fn plain<'a>(mut file: File, progress: &'a mut Read64<'_>) -> Result<Box<dyn Read + 'a>, RootError> {
    let mut magic = [0; 6];
    let mut known = 0;
    while known < magic.len() {
        match file.read(&mut magic[known..]) {
            Ok(0) => break,
            Ok(read) => known += read,
            Err(error) => return Err(RootError::Archive(error)),
        }
    }
    file.rewind().map_err(RootError::Archive)?;
    let reader = BufReader::with_capacity(256 << 10, Counted { file, read: 0, progress });
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(reader)
                .map_err(|error| RootError::Archive(io::Error::other(error.to_string())))?;
            Box::new(decoder)
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(RootError::Compression("xz", "unxz")),
        [b'B', b'Z', b'h', ..] => return Err(RootError::Compression("bzip2", "bunzip2")),
        _ => Box::new(reader),
    })
}

struct Counted<'a, 'b> {
    file: File,
    read: u64,
    progress: &'a mut Read64<'b>,
}

impl Read for Counted<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read += read as u64;
        (self.progress)(self.read);
        Ok(read)
    }
}

/// Puts one entry of an archive into the tree.
pub(super) fn put<R: Read>(entry: &mut Entry<'_, R>, tree: &mut Tree) -> Result<(), RootError> {
    let path = entry.path().map_err(RootError::Archive)?.into_owned();
    let header = entry.header();
    let number = |value: io::Result<u64>| value.ok().and_then(|value| u32::try_from(value).ok());
    let mut meta = Meta {
        mode: header.mode().map_err(RootError::Archive)?,
        uid: number(header.uid()).unwrap_or(0),
        gid: number(header.gid()).unwrap_or(0),
        mtime: header.mtime().ok().and_then(|time| i64::try_from(time).ok()).unwrap_or(0),
        capability: None,
    };
    let kind = header.entry_type();
    let device = (header.device_major(), header.device_minor());
    for extension in entry.pax_extensions().map_err(RootError::Archive)?.into_iter().flatten().flatten() {
        let text = || extension.value().ok().and_then(|value| value.parse().ok());
        match extension.key_bytes() {
            b"SCHILY.xattr.security.capability" if extension.value_bytes().len() <= 64 => {
                meta.capability = Some(extension.value_bytes().to_owned());
            }
            b"uid" => meta.uid = text().unwrap_or(meta.uid),
            b"gid" => meta.gid = text().unwrap_or(meta.gid),
            _ => {}
        }
    }
    let link = entry.link_name().map_err(RootError::Archive)?.map(std::borrow::Cow::into_owned);
    let no_target = || RootError::Hostile { path: path.clone(), why: "a link with no target".to_owned() };
    match kind {
        EntryType::Directory => tree.add(&path, meta, Content::Directory),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            tree.add(&path, meta, Content::File(entry))
        }
        EntryType::Symlink => tree.add(&path, meta, Content::Symlink(&link.ok_or_else(no_target)?)),
        EntryType::Link => tree.add(&path, meta, Content::Hardlink(&link.ok_or_else(no_target)?)),
        EntryType::Fifo => tree.add(&path, meta, Content::Fifo),
        EntryType::Char | EntryType::Block => {
            let (Ok(major), Ok(minor)) = device else {
                return Err(RootError::Hostile { path, why: "a device with no number".to_owned() });
            };
            let (major, minor) = (major.unwrap_or(0), minor.unwrap_or(0));
            tree.add(&path, meta, Content::Device { block: kind == EntryType::Block, major, minor })
        }
        // Volume labels, and the headers the reader has already applied.
        _ => Ok(()),
    }
}
