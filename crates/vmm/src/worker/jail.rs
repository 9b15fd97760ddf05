//! The jail: what a worker gives up before it reads a byte of a guest or a template.
//!
//! Its pid namespace is not in here: a process can not enter one itself, so the host starts it there.

use std::{env, io};

use rustix::{
    fs::CWD,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{Resource, Rlimit, Signal, chdir, pivot_root, set_parent_process_death_signal, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags, capability_is_in_bounding_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};
use thiserror::Error;

use super::{
    launch::{Launch, Purpose},
    seccomp::{self, Role, SeccompError},
};

/// Most bytes that a fork may write to any file, its log: a guest must not fill the host's disk.
const MAX_FILE: u64 = 4 << 20;
/// Most descriptors: some 60 are used by a machine with 8 vCPUs and every channel in use.
const MAX_DESCRIPTORS: u64 = 256;
/// Most threads of a worker's own user: vCPUs, device thread, main thread, and room.
const MAX_THREADS: u64 = 64;
/// Address space beside the guest's memory: stacks and heaps of threads are mostly reserved, not used.
const ADDRESS_SPACE: u64 = 4 << 30;

/// Why the jail could not be entered. The process must end.
#[derive(Debug, Error)]
pub enum JailError {
    /// A step failed.
    #[error("the jail could not be entered: {step}")]
    Step {
        /// Which.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The system call filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

fn step<T>(step: &'static str, result: Result<T, impl Into<io::Error>>) -> Result<T, JailError> {
    result.map_err(|error| JailError::Step { step, source: error.into() })
}

/// Gives everything up. The process must have one thread, and must hold every descriptor that it will ever need.
///
/// # Errors
/// [`JailError`].
pub(super) fn enter(launch: &Launch) -> Result<(), JailError> {
    limit(launch)?;
    if launch.namespaces {
        leave_file_system()?;
    }
    if let Some((uid, gid)) = launch.user {
        // The groups first: without the capability they could not be given up any more.
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        step("drop the bounding set", drop_bounding_set())?;
        step("leave all groups", set_thread_groups(&[]))?;
        step("change the group", set_thread_res_gid(gid, gid, gid))?;
        step("change the user", set_thread_res_uid(uid, uid, uid))?;
    }
    step("drop capabilities", set_capabilities(None, NO_CAPABILITIES))?;
    if launch.purpose == Purpose::Template {
        // After the change of the user, which undoes it. Whoever died before this line is noticed by its connection.
        step("end with the builder", set_parent_process_death_signal(Some(Signal::KILL)))?;
    }
    step("take no new privileges", set_no_new_privs(true))?;
    seccomp::arm();
    seccomp::enter(Role::Start)?;
    Ok(())
}

const NO_CAPABILITIES: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

fn limit(launch: &Launch) -> Result<(), JailError> {
    let most = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
    let set = |resource, limit| step("set its limits", setrlimit(resource, most(limit)));
    set(Resource::Core, 0)?;
    set(Resource::Nofile, MAX_DESCRIPTORS)?;
    set(Resource::Memlock, 0)?;
    set(Resource::As, launch.machine.memory_bytes.saturating_add(ADDRESS_SPACE))?;
    if launch.purpose != Purpose::Template {
        set(Resource::Fsize, MAX_FILE)?;
    }
    if launch.user.is_some() {
        // The count is of a user's threads, so that it means something only for a user that nobody else is.
        set(Resource::Nproc, MAX_THREADS)?;
    }
    Ok(())
}

/// Puts an empty, read-only file system in the place of the host's, in namespaces without network, other processes'
/// memory segments, or the host's name.
fn leave_file_system() -> Result<(), JailError> {
    let here = step("find the working directory", env::current_dir())?;
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: one thread; the descriptor table is not unshared (no FILES flag).
    step("take on namespaces", unsafe { rustix::thread::unshare_unsafe(flags) })?;
    // Nothing that is mounted here may reach the host.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    step("separate the mounts", mount_change("/", private))?;
    let bare = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    step("mount an empty file system", mount("jail", &here, "tmpfs", bare, c"size=4k,nr_inodes=1,mode=555"))?;
    step("enter the empty file system", chdir(&here))?;
    // The old root comes to lie on the new one, and is taken away.
    step("change the root", pivot_root(".", "."))?;
    step("leave the old root", unmount(".", UnmountFlags::DETACH))?;
    step("enter the new root", chdir("/"))?;
    // A directory that was left open would be a way back; there is none, and this is how it would be seen.
    let is_empty = rustix::fs::openat(
        CWD,
        ".",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .and_then(rustix::fs::Dir::new)
    .map(|dir| dir.flatten().all(|entry| matches!(entry.file_name().to_bytes(), b"." | b"..")));
    match step("look at the new root", is_empty)? {
        true => Ok(()),
        false => step("look at the new root", Err(io::Error::other("it is not empty"))),
    }
}

/// So that no program could give them back. There is no call for all of them at once.
fn drop_bounding_set() -> io::Result<()> {
    for capability in CapabilitySet::all().iter() {
        if capability_is_in_bounding_set(capability).is_ok_and(|is| is) {
            remove_capability_from_bounding_set(capability)?;
        }
    }
    Ok(())
}
