//! Network namespaces: made, named by a mount, entered, unmade.
//!
//! A thread is in one network namespace. Whatever has to happen in another one happens in a thread of its own, which ends there: so
//! no thread of the caller's is ever left in the wrong place, whatever fails.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    thread,
};

use rustix::{
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// The calling thread's namespace, whatever the thread does later.
const OWN: &str = "/proc/thread-self/ns/net";

/// Runs `work` in a thread of its own.
///
/// # Errors
/// There can be no more threads, or `work`'s own.
pub(crate) fn on_own_thread<T: Send, E: From<io::Error> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    #[cfg(test)]
    let failing = crate::fault::tests::failing();
    #[cfg(test)]
    let work = move || {
        crate::fault::tests::fail_at(failing);
        work()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes a namespace, mounts it at `path`, and runs `work` in it.
///
/// If making it fails nothing is left at `path`; if `work` fails the namespace is.
pub(crate) fn make<T: Send, E: From<io::Error> + Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    on_own_thread(|| {
        // SAFETY: what must not be unshared is the table of file descriptors; a network namespace has no part in memory safety.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)?;
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        // Private, so that no other mount namespace gets a copy that would keep it alive.
        let named = mount_bind(OWN, path).and_then(|()| mount_change(path, MountPropagationFlags::PRIVATE));
        if let Err(error) = named {
            let _ = unmake(path);
            return Err(io::Error::from(error).into());
        }
        work()
    })
}

/// Runs `work` in the namespace that is mounted at `path`.
pub(crate) fn within<T: Send, E: From<io::Error> + Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let namespace = File::open(path)?;
    on_own_thread(|| {
        // An empty file, whose mount is gone, is refused: it is no namespace.
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).map_err(io::Error::from)?;
        work()
    })
}

/// The calling thread's namespace.
pub(crate) fn own() -> io::Result<OwnedFd> {
    Ok(File::open(OWN)?.into())
}

/// Removes the name of a namespace; the kernel removes the namespace when nothing uses it any more. That there is none is fine.
pub(crate) fn unmake(path: &Path) -> io::Result<()> {
    // Where there is nothing, no right is needed to say so.
    if !path.try_exists()? {
        return Ok(());
    }
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // INVAL: no mount is here, only the file.
        Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    crate::state::remove(path)
}

/// Writes a kernel setting of the thread's network namespace (`/proc/sys/net`, which shows the reader its own namespace's).
pub(crate) fn set(setting: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new("/proc/sys/net").join(setting), value)
}

/// Reads a kernel setting of the thread's network namespace.
pub(crate) fn setting(setting: &str) -> io::Result<String> {
    Ok(fs::read_to_string(Path::new("/proc/sys/net").join(setting))?.trim().to_owned())
}
