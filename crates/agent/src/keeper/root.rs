//! Writing files below a directory that a hostile workload has shaped: no symbolic link leads out of it, and a reader sees
//! the old content or the new, never a part.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, ResolveFlags};

static TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// Largest file that is read from the workload.
const MAX_READ: usize = 64 * 1024;

/// A directory whose paths stay inside it.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// Paths below `directory` (an `O_PATH` descriptor will do).
    #[must_use]
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Writes a whole file: to a temporary name beside it, then renamed. Folders that are not there are made.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn write(&self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let (folder, name) = split(path)?;
        let folder = self.folder(folder)?;
        let temporary = format!(".offshoot-{}", TEMPORARY.fetch_add(1, Ordering::Relaxed));
        // One of that name can only be left over from an attempt before.
        let _ = rustix::fs::unlinkat(&folder, &*temporary, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&folder, &*temporary, flags, Mode::from_raw_mode(mode))?;
        let finish = || -> io::Result<()> {
            write_all(&file, content)?;
            // The agent's umask is 0, so that this is only for bits that open ignores.
            if mode & !0o777 != 0 {
                rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
            }
            Ok(rustix::fs::renameat(&folder, &*temporary, &folder, name)?)
        };
        finish().inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&folder, &*temporary, AtFlags::empty());
        })
    }

    /// Opens an empty regular file for [`fill`], made anew in place of the old one so that it is writable and not a link.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open_blank(&self, path: &str, mode: u32) -> io::Result<OwnedFd> {
        self.write(path, mode, b"")?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&self.0, relative(path), flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        reserve(&file);
        Ok(file)
    }

    /// Writes over the first bytes of a file, in place.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn overwrite(&self, path: &str, content: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&self.0, relative(path), flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        write_all(&file, content)
    }

    /// Creates a file in this directory itself, which has none of that name; nobody sees a part, because nobody runs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(&self, name: &str, mode: u32, content: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.0, name, flags, Mode::from_raw_mode(mode))?;
        write_all(&file, content)?;
        Ok(file)
    }

    /// Reads a file, at most 64 KiB of it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat2(&self.0, relative(path), flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let mut content = vec![0; MAX_READ];
        let mut len = 0;
        while len < content.len() {
            match rustix::io::read(&file, &mut content[len..])? {
                0 => break,
                read => len += read,
            }
        }
        content.truncate(len);
        Ok(content)
    }

    /// Whether there is a regular file (not a link to one) at `path`.
    #[must_use]
    pub fn is_file(&self, path: &str) -> bool {
        let look = || -> io::Result<bool> {
            let (folder, name) = split(path)?;
            let folder = self.open_folder(folder)?;
            let stat = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
        };
        look().unwrap_or(false)
    }

    /// Overwrites a regular file with zeroes and removes it. A file that is not there is removed already.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wipe(&self, path: &str) -> io::Result<()> {
        let (folder, name) = split(path)?;
        let folder = match self.open_folder(folder) {
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            folder => folder?,
        };
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if let Ok(file) = rustix::fs::openat(&folder, name, flags, Mode::empty()) {
            let len = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0).min(MAX_READ);
            rustix::io::pwrite(&file, &vec![0; len], 0)?;
        }
        match rustix::fs::unlinkat(&folder, name, AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Names in a folder; none if it is not there.
    #[must_use]
    pub fn list(&self, folder: &str) -> Vec<String> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.0, relative(folder), flags, Mode::empty(), ResolveFlags::IN_ROOT)
            .and_then(|folder| rustix::fs::Dir::read_from(&folder))
            .map(|entries| {
                entries
                    .filter_map(Result::ok)
                    .filter_map(|entry| entry.file_name().to_str().map(str::to_owned).ok())
                    .collect()
            })
            .unwrap_or_default()
    }

    fn folder(&self, path: &str) -> io::Result<OwnedFd> {
        match self.open_folder(path) {
            Err(rustix::io::Errno::NOENT) => {}
            result => return Ok(result?),
        }
        let (parent, name) = split(path)?;
        let parent = self.folder(parent)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.open_folder(path)?)
    }

    fn open_folder(&self, path: &str) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.0, relative(path), flags, Mode::empty(), ResolveFlags::IN_ROOT)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Allocates the memory that [`fill`] will write to, which would take longer than the writing. Best effort.
pub fn reserve(file: &OwnedFd) {
    let _ = rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, 4096);
}

/// Gives an open, empty file its content. Only for while the workload is frozen: nobody can read a part.
///
/// # Errors
/// What the kernel says.
pub fn fill(file: &OwnedFd, content: &[u8]) -> io::Result<()> {
    if rustix::io::pwrite(file, content, 0)? == content.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn write_all(file: &OwnedFd, content: &[u8]) -> io::Result<()> {
    let mut rest = content;
    while !rest.is_empty() {
        let written = rustix::io::write(file, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// Folder and last component of a path.
fn split(path: &str) -> io::Result<(&str, &str)> {
    let path = path.trim_end_matches('/');
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    if matches!(name, "" | "." | "..") { Err(io::ErrorKind::InvalidFilename.into()) } else { Ok((folder, name)) }
}

/// `openat2` takes the empty path for none; the root itself is `.`.
fn relative(path: &str) -> &str {
    match path.trim_start_matches('/') {
        "" => ".",
        path => path,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    struct Folder(std::path::PathBuf);
    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn root(test: &str) -> (Folder, Root) {
        let path = std::env::temp_dir().join(format!("offshoot-root-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("inside")).unwrap();
        fs::write(path.join("outside"), "untouched").unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let root = rustix::fs::open(path.join("inside"), flags, Mode::empty()).unwrap();
        (Folder(path), Root::new(root))
    }

    #[test]
    fn a_file_is_written_whole_with_its_folders_and_mode() {
        use std::os::unix::fs::PermissionsExt as _;
        let (folder, root) = root("write");
        root.write("/a/b/c", 0o400, b"one").unwrap();
        root.write("/a/b/c", 0o400, b"two").unwrap();
        let path = folder.0.join("inside/a/b/c");
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o400);
        assert_eq!(root.list("/a/b").iter().filter(|name| !name.starts_with('.')).collect::<Vec<_>>(), ["c"]);
        root.wipe("/a/b/c").unwrap();
        root.wipe("/a/b/c").unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_link_does_not_lead_out() {
        let (folder, root) = root("link");
        let inside = folder.0.join("inside");
        std::os::unix::fs::symlink("../outside", inside.join("file")).unwrap();
        std::os::unix::fs::symlink("/../..", inside.join("up")).unwrap();
        assert!(!root.is_file("file"));
        assert!(root.read("file").is_err());
        root.write("/file", 0o644, b"x").unwrap();
        root.write("/up/outside", 0o644, b"y").unwrap();
        assert_eq!(fs::read(folder.0.join("outside")).unwrap(), b"untouched");
        assert_eq!(fs::read(inside.join("file")).unwrap(), b"x");
        assert_eq!(fs::read(inside.join("outside")).unwrap(), b"y");
    }
}
