//! A directory that foreign archives are unpacked into, and nothing outside it.
//!
//! Every path is resolved by the kernel as if the tree were the root directory (`RESOLVE_IN_ROOT`), so symbolic links lead where
//! they would lead in the guest and never out of the tree. Names with `..` are refused all the same: no honest archive
//! has them.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::RootError;
use crate::image::cache::CacheError;

/// More than any root file system we can boot: a stop for archives that unpack without end.
const MAX_BYTES: u64 = 64 << 30;
const MAX_ENTRIES: u64 = 4_000_000;
const MAX_PATH: usize = 4096;
const MAX_DEPTH: usize = 256;

/// What an entry is besides its content.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since the epoch.
    pub(super) mtime: i64,
    /// The value of `security.capability`, which `ping` and others have instead of a set-user-id bit.
    pub(super) capability: Option<Vec<u8>>,
}

impl Meta {
    /// Root's, with no date.
    pub(super) fn root(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: 0, capability: None }
    }
}

/// The content of an entry.
pub(super) enum Content<'a> {
    Directory,
    File(&'a mut dyn Read),
    Symlink(&'a Path),
    /// To another path of the tree.
    Hardlink(&'a Path),
    Fifo,
    Device {
        block: bool,
        major: u32,
        minor: u32,
    },
}

#[derive(Debug)]
pub(super) struct Tree {
    path: PathBuf,
    root: OwnedFd,
    /// Only root can give files away.
    owners: bool,
    /// Directories get their modes at the end: until then we must be able to write into them.
    directories: Vec<(PathBuf, Meta)>,
    bytes: u64,
    entries: u64,
    skipped: u64,
}

impl Tree {
    pub(super) fn create(path: &Path) -> Result<Self, RootError> {
        let root = fs::create_dir(path).and_then(|()| Ok(OwnedFd::from(File::open(path)?)));
        let root = root.map_err(CacheError::at("made", path))?;
        Ok(Self {
            path: path.to_owned(),
            root,
            owners: rustix::process::geteuid().is_root(),
            directories: vec![(PathBuf::new(), Meta::root(0o755))],
            bytes: 0,
            entries: 0,
            skipped: 0,
        })
    }

    /// Puts an entry into the tree. What is there gives way, except that a directory stays one and keeps what is in it.
    pub(super) fn add(&mut self, path: &Path, meta: Meta, content: Content<'_>) -> Result<(), RootError> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(RootError::TooLarge);
        }
        let path = clean(path)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            // The root directory itself.
            if matches!(content, Content::Directory) {
                self.directories.push((path, meta));
            }
            return Ok(());
        };
        let parent = self.directory(path.parent().unwrap_or(Path::new("")))?;
        let shown = self.path.join(&path);
        let fail = |errno: Errno| RootError::from(CacheError::at("unpacked", &shown)(errno.into()));
        if matches!(content, Content::Directory) {
            let kind = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW)
                .map(|stat| FileType::from_raw_mode(stat.st_mode));
            if kind != Ok(FileType::Directory) {
                remove(&parent, &name).map_err(CacheError::at("unpacked", &path))?;
                rustix::fs::mkdirat(&parent, &name, Mode::RWXU).map_err(fail)?;
            }
            self.directories.push((path, meta));
            return Ok(());
        }
        // Found before the old entry goes: a link to itself is then an error, not an empty file.
        let target = match &content {
            Content::Hardlink(target) => {
                let target = clean(target)?;
                let at = self.directory(target.parent().unwrap_or(Path::new("")))?;
                if target == path {
                    return Ok(());
                }
                Some((at, target.file_name().map(OsStr::to_owned).unwrap_or_default()))
            }
            _ => None,
        };
        remove(&parent, &name).map_err(CacheError::at("unpacked", &path))?;
        match content {
            Content::Directory => {}
            Content::File(reader) => return self.file(&parent, &name, &path, &meta, reader),
            Content::Symlink(target) => rustix::fs::symlinkat(target, &parent, &name).map_err(fail)?,
            Content::Hardlink(shown) => {
                let Some((at, old)) = target else { return Ok(()) };
                return rustix::fs::linkat(at, old, &parent, &name, AtFlags::empty()).map_err(|errno| match errno {
                    Errno::NOENT => RootError::Hostile {
                        path: path.clone(),
                        why: format!("a hard link to {}, which is not there", shown.display()),
                    },
                    other => fail(other),
                });
            }
            Content::Fifo => {
                let mode = Mode::from_raw_mode(meta.mode & 0o7777);
                rustix::fs::mknodat(&parent, &name, FileType::Fifo, mode, 0).map_err(fail)?;
            }
            Content::Device { block, major, minor } => {
                let kind = if block { FileType::BlockDevice } else { FileType::CharacterDevice };
                let made = self.owners && {
                    let mode = Mode::from_raw_mode(meta.mode & 0o7777);
                    rustix::fs::mknodat(&parent, &name, kind, mode, rustix::fs::makedev(major, minor)).is_ok()
                };
                // The guest has a /dev of its own, so a device of the image is never missed.
                if !made {
                    self.skipped += 1;
                    return Ok(());
                }
            }
        }
        if self.owners {
            let (uid, gid) = owner(&meta);
            rustix::fs::chownat(&parent, &name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        }
        let times = times(&meta);
        rustix::fs::utimensat(&parent, &name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)
    }

    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
        meta: &Meta,
        reader: &mut dyn Read,
    ) -> Result<(), RootError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let shown = self.path.join(path);
        let fail = |errno: Errno| RootError::from(CacheError::at("unpacked", &shown)(errno.into()));
        let file = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let mut file = File::from(file);
        let mut buffer = vec![0; 128 << 10];
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(RootError::Archive(error)),
            };
            self.bytes += read as u64;
            if self.bytes > MAX_BYTES {
                return Err(RootError::TooLarge);
            }
            file.write_all(&buffer[..read]).map_err(CacheError::at("unpacked", &shown))?;
        }
        if self.owners {
            let (uid, gid) = owner(meta);
            rustix::fs::fchown(&file, uid, gid).map_err(fail)?;
        }
        // After the owner, whose change clears the set-user-id bit.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(meta.mode & 0o7777)).map_err(fail)?;
        if let (true, Some(value)) = (self.owners, &meta.capability) {
            rustix::fs::fsetxattr(&file, "security.capability", value, XattrFlags::empty()).map_err(fail)?;
        }
        rustix::fs::futimens(&file, &times(meta)).map_err(fail)
    }

    /// Makes a directory unless something usable as one is there.
    pub(super) fn ensure_directory(&mut self, path: &str, mode: u32) -> Result<(), RootError> {
        let path = clean(Path::new(path))?;
        if self.open(&path).is_ok() {
            return Ok(());
        }
        self.directory(&path)?;
        self.directories.push((path, Meta::root(mode)));
        Ok(())
    }

    /// Removes what is at a path, if anything; symbolic links in the path are followed inside the tree, the last is not.
    pub(super) fn remove(&mut self, path: &Path) -> Result<(), RootError> {
        let path = clean(path)?;
        let Some(name) = path.file_name() else {
            return self.clear(Path::new(""));
        };
        let Ok(parent) = self.open(path.parent().unwrap_or(Path::new(""))) else { return Ok(()) };
        Ok(remove(&parent, name).map_err(CacheError::at("unpacked", &path))?)
    }

    /// Empties a directory, if there is one.
    pub(super) fn clear(&mut self, path: &Path) -> Result<(), RootError> {
        let path = clean(path)?;
        let Ok(directory) = self.open(&path) else { return Ok(()) };
        let fail = CacheError::at("unpacked", &path);
        let clear = || -> io::Result<()> {
            for entry in fs::read_dir(proc_path(&directory))? {
                remove(&directory, &entry?.file_name())?;
            }
            Ok(())
        };
        Ok(clear().map_err(fail)?)
    }

    /// Gives the directories their modes and owners. Returns how many device nodes were left out.
    pub(super) fn finish(self) -> Result<u64, RootError> {
        // A directory said twice ends as it was said last; a deep one is closed before the one above it.
        let mut last = std::collections::BTreeMap::new();
        for (path, meta) in self.directories {
            last.insert(path, meta);
        }
        for (path, meta) in last.iter().rev() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(directory) = resolve(&self.root, path, flags) else { continue };
            let set = || -> rustix::io::Result<()> {
                if self.owners {
                    let (uid, gid) = owner(meta);
                    rustix::fs::fchown(&directory, uid, gid)?;
                }
                rustix::fs::fchmod(&directory, Mode::from_raw_mode(meta.mode & 0o7777))?;
                rustix::fs::futimens(&directory, &times(meta))
            };
            set().map_err(|errno| CacheError::at("unpacked", &self.path.join(path))(errno.into()))?;
        }
        Ok(self.skipped)
    }

    fn open(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        resolve(&self.root, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC)
    }

    /// The directory at a clean path, made with all above it if absent.
    fn directory(&mut self, path: &Path) -> Result<OwnedFd, RootError> {
        match self.open(path) {
            Ok(directory) => return Ok(directory),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(self.no_directory(path, errno)),
        }
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(self.no_directory(path, Errno::NOENT));
        };
        let parent = self.directory(above)?;
        rustix::fs::mkdirat(&parent, name, Mode::RWXU).map_err(|errno| self.no_directory(path, errno))?;
        self.directories.push((path.to_owned(), Meta::root(0o755)));
        self.open(path).map_err(|errno| self.no_directory(path, errno))
    }

    fn no_directory(&self, path: &Path, errno: Errno) -> RootError {
        match errno {
            // EEXIST: a symbolic link to nothing.
            Errno::NOTDIR | Errno::LOOP | Errno::EXIST => RootError::Hostile {
                path: path.to_owned(),
                why: "it is used as a directory but is a file or a link that leads nowhere".to_owned(),
            },
            other => CacheError::at("unpacked", &self.path.join(path))(other.into()).into(),
        }
    }
}

fn resolve(root: &OwnedFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

fn owner(meta: &Meta) -> (Option<Uid>, Option<Gid>) {
    // All ones means "leave it" to chown.
    let valid = |id: u32| if id == u32::MAX { 0 } else { id };
    (Some(Uid::from_raw(valid(meta.uid))), Some(Gid::from_raw(valid(meta.gid))))
}

fn times(meta: &Meta) -> Timestamps {
    let time = Timespec { tv_sec: meta.mtime.clamp(0, i64::from(i32::MAX)), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

/// A directory we hold, by a path that cannot lead elsewhere.
fn proc_path(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()))
}

fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => fs::remove_dir_all(proc_path(parent).join(name)),
        Err(errno) => Err(errno.into()),
    }
}

/// A path of an archive, relative to its root. An absolute one means the same as a relative one.
pub(super) fn clean(path: &Path) -> Result<PathBuf, RootError> {
    let refuse = |why: &str| Err(RootError::Hostile { path: path.to_owned(), why: why.to_owned() });
    if path.as_os_str().len() > MAX_PATH || path.components().count() > MAX_DEPTH {
        return refuse("its path is too long");
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return refuse("its path has a zero byte");
    }
    let mut clean = OsString::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                if !clean.is_empty() {
                    clean.push("/");
                }
                clean.push(name);
            }
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return refuse("its path leads out of the archive"),
        }
    }
    Ok(clean.into())
}
