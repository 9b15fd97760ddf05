//! The smallest root file system that has a shell: the host's static busybox and links to it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    RootError,
    tree::{Content, Meta, Tree},
};
use crate::image::{
    cache::CacheError,
    initramfs,
    program::{self, Program, ProgramError},
};

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";
/// Far more than busybox has.
const MAX_LINKS: usize = 2000;

/// The host's busybox, if it runs with nothing else beside it.
pub(super) fn find() -> Result<PathBuf, RootError> {
    let missing = || ProgramError::Missing { program: "a static busybox".to_owned(), package: "busybox-static" };
    let path = program::find("busybox").ok_or_else(missing)?;
    if initramfs::is_static(&path).unwrap_or(false) { Ok(path) } else { Err(missing().into()) }
}

pub(super) fn fill(busybox: &Path, tree: &mut Tree) -> Result<(), RootError> {
    let mut program = File::open(busybox).map_err(CacheError::at("read", busybox))?;
    tree.add(Path::new("bin/busybox"), Meta::root(0o755), Content::File(&mut program as &mut dyn Read))?;
    let list = Program::new("busybox", "busybox-static").with(|command| {
        command.arg("--list-full");
    });
    let list = list.output()?;
    for link in String::from_utf8_lossy(&list).lines().filter(|link| *link != "bin/busybox").take(MAX_LINKS) {
        // The list of some builds has "linuxrc", which is of no use here.
        if link.contains('/') {
            tree.add(Path::new(link), Meta::root(0o777), Content::Symlink(Path::new("/bin/busybox")))?;
        }
    }
    for (path, text) in [("etc/passwd", PASSWD), ("etc/group", GROUP), ("etc/hosts", HOSTS)] {
        tree.add(Path::new(path), Meta::root(0o644), Content::File(&mut text.as_bytes()))?;
    }
    tree.ensure_directory("root", 0o700)
}
