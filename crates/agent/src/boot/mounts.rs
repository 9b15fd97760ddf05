//! File systems: the agent's, the workload's root, and the namespace in which the workload sees nothing else.
//!
//! ```text
//! agent's namespace                        workload's namespace
//! /            initramfs                   /              overlay (disk below, memory above)
//! /lower       the disk, read-only         /proc /sys     own mounts, /sys read-only
//! /upper       memory                      /dev           a few devices: no ports, no disk
//! /sysroot     the overlay       ──────▶   /run /tmp      memory
//! /identity    memory, written by agent    /run/offshoot  /identity, read-only
//! /boot_id     a file                      /proc/sys/kernel/random/boot_id
//! ```

use std::{fs, io, os::fd::OwnedFd, os::unix::fs::symlink, thread};

use rustix::{
    fs::{FileType, Mode, OFlags, makedev},
    mount::{MountFlags, MountPropagationFlags},
    thread::UnshareFlags,
};

use super::{BootError, step};

/// Where the agent writes the identity directory.
pub const IDENTITY: &str = "/identity";
/// The file that the workload sees as `/proc/sys/kernel/random/boot_id`.
pub const BOOT_ID: &str = "/boot_id";

const SYSROOT: &str = "/sysroot";
const KERNEL_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Mounts what the agent itself needs.
///
/// # Errors
/// If one can not be mounted.
pub fn api_file_systems() -> Result<(), BootError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "proc", "/proc", safe, "")?;
    mount("sysfs", "sysfs", "/sys", safe, "")?;
    mount("devtmpfs", "devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0755")?;
    fs::create_dir_all("/dev/pts").map_err(step("make /dev/pts"))?;
    mount("cgroup2", "cgroup2", crate::cgroup::MOUNT, safe, "")
}

/// Puts the workload's root file system together.
///
/// # Errors
/// If a part of it can not be mounted.
pub fn root_file_system() -> Result<(), BootError> {
    // The disk is shared by all forks and read-only: its journal can not be replayed.
    mount("/dev/vda", "ext4", "/lower", MountFlags::RDONLY, "noload")?;
    mount("tmpfs", "tmpfs", "/upper", MountFlags::empty(), "mode=0755")?;
    for folder in ["/upper/upper", "/upper/work"] {
        fs::create_dir(folder).map_err(step("make the overlay's folders"))?;
    }
    let layers = "lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work";
    mount("overlay", "overlay", SYSROOT, MountFlags::empty(), layers)?;

    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let inside = |path: &str| format!("{SYSROOT}{path}");
    mount("proc", "proc", &inside("/proc"), safe, "")?;
    mount("sysfs", "sysfs", &inside("/sys"), safe | MountFlags::RDONLY, "")?;
    mount("tmpfs", "tmpfs", &inside("/run"), MountFlags::NOSUID | MountFlags::NODEV, "mode=0755")?;
    mount("tmpfs", "tmpfs", &inside("/tmp"), MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")?;
    devices().map_err(step("make the workload's /dev"))?;
    mount(
        "devpts",
        "devpts",
        &inside("/dev/pts"),
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;
    mount("tmpfs", "tmpfs", &inside("/dev/shm"), MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")?;

    mount("tmpfs", "tmpfs", IDENTITY, safe, "mode=0755")?;
    for folder in ["env", "secrets"] {
        fs::create_dir(format!("{IDENTITY}/{folder}")).map_err(step("make the identity directory"))?;
    }
    bind_read_only(IDENTITY, &inside("/run/offshoot"), safe)?;
    // A template shows the kernel's boot id; a fork writes its own into the file.
    let boot_id = fs::read(KERNEL_BOOT_ID).map_err(step("read the boot id"))?;
    fs::write(BOOT_ID, boot_id).map_err(step("write the boot id's file"))?;
    bind_read_only(BOOT_ID, &inside(KERNEL_BOOT_ID), safe)
}

/// Makes the namespace in which the overlay is the root and nothing lies below it; answers with the namespace and
/// with its root directory.
///
/// # Errors
/// If it can not be made.
pub fn workload_namespace() -> Result<(OwnedFd, OwnedFd), BootError> {
    let enter = || -> io::Result<(OwnedFd, OwnedFd)> {
        // SAFETY: only this thread leaves the agent's namespace and working directory; it touches nothing that other
        // threads refer to through them, and it ends with this closure.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS)? };
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::process::chdir(SYSROOT)?;
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")?;
        let open = |path, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
        Ok((open("/proc/thread-self/ns/mnt", OFlags::RDONLY)?, open("/", OFlags::PATH | OFlags::DIRECTORY)?))
    };
    thread::Builder::new()
        .spawn(enter)
        .and_then(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
        .map_err(step("make the workload's mount namespace"))
}

fn mount(source: &str, kind: &str, target: &str, flags: MountFlags, options: &str) -> Result<(), BootError> {
    let what = format!("mount {kind} at {target}");
    fs::create_dir_all(target).map_err(step(&what))?;
    let options = std::ffi::CString::new(options).map_err(step(&what))?;
    match rustix::mount::mount(source, target, kind, flags, &*options) {
        // The kernel may have mounted it itself.
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(step(&what)(error)),
    }
}

fn bind_read_only(source: &str, target: &str, flags: MountFlags) -> Result<(), BootError> {
    let what = format!("bind {source} at {target}");
    if fs::metadata(source).map_err(step(&what))?.is_dir() {
        fs::create_dir_all(target).map_err(step(&what))?;
    }
    rustix::mount::mount_bind(source, target).map_err(step(&what))?;
    rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY | flags, c"").map_err(step(&what))
}

/// The devices that programs expect. The disk and the ports are not among them.
fn devices() -> io::Result<()> {
    let dev = format!("{SYSROOT}/dev");
    fs::create_dir_all(&dev)?;
    rustix::mount::mount("tmpfs", &dev, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755")?;
    let nodes = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    for (name, major, minor) in nodes {
        let path = format!("{dev}/{name}");
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, mode, makedev(major, minor))?;
        // The umask does not apply to this.
        rustix::fs::chmod(&path, mode)?;
    }
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ];
    links.iter().try_for_each(|(name, target)| symlink(target, format!("{dev}/{name}")))
}
