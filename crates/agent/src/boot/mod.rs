//! From the kernel's hand-over to an agent that can answer: file systems, modules, the disk, the workload's own view of it.

pub mod device;
pub mod modules;
pub mod mounts;
pub mod power;
pub mod quiet;

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use crate::{
    Freeze,
    cgroup::{self, Cgroup},
    console,
    keeper::{self, Keeper},
    mailboxes,
    reaper::Reaper,
    state::AgentState,
    workload::{Place, Workload},
};

/// Name of the port that carries the acks.
pub const ACK_PORT: &str = "offshoot.ack";

/// The host name of a template; a fork is given its own.
const TEMPLATE_HOSTNAME: &str = "template";

/// Devices appear within milliseconds of their driver's module; under emulation on a busy machine it can take longer.
const DEVICE_DEADLINE: Duration = Duration::from_secs(20);

/// Why the guest did not start.
#[derive(Debug, Error)]
#[error("{step}: {source}")]
pub struct BootError {
    /// Which step.
    pub step: String,
    /// The kernel's reason.
    pub source: io::Error,
}

/// Names the step that an error belongs to.
pub(crate) fn step<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> BootError + '_ {
    move |error| BootError { step: step.to_owned(), source: error.into() }
}

/// Boots the guest. What only makes it quieter is tried and, if it fails, noted in the kernel's log.
///
/// # Errors
/// [`BootError`].
pub fn boot(freeze: Freeze) -> Result<Arc<AgentState>, BootError> {
    mounts::api_file_systems()?;
    console::open();
    power::obey_signals().map_err(step("start the thread that takes signals"))?;
    // Opened before the modules are loaded, so that no device can appear unseen.
    let mut devices = device::Watch::new().map_err(step("listen for devices"))?;
    modules::load_all("/modules")?;
    quiet::settle();
    loopback_up().map_err(step("bring the loopback interface up"))?;

    let deadline = Instant::now() + DEVICE_DEADLINE;
    devices.wait_for(deadline, || device::exists("/dev/vda")).map_err(step("wait for the disk /dev/vda"))?;
    let ack_port =
        devices.wait_for(deadline, || device::open_port(ACK_PORT)).map_err(step("wait for the port offshoot.ack"))?;

    mounts::root_file_system()?;
    // From here on files get the modes that are asked for.
    rustix::process::umask(Mode::empty());
    rustix::system::sethostname(TEMPLATE_HOSTNAME.as_bytes()).map_err(step("set the template's host name"))?;
    let (mounts, root) = mounts::workload_namespace()?;
    let place = Place { mounts, root, cgroup: workload_cgroup()?, hooks: hooks_cgroup()?, program: own_program()? };
    let reaper = Reaper::start().map_err(step("start the reaper"))?;
    let keeper = Keeper::new(ack_port, &place).map_err(step("prepare the keeper"))?;
    let state = AgentState::new(Workload::new(place, reaper), keeper, freeze);
    keeper::start(&state).map_err(step("start the keeper"))?;
    mailboxes::socket::start(&state).map_err(step("start the mailbox socket"))?;
    Ok(state)
}

fn workload_cgroup() -> Result<Cgroup, BootError> {
    let root = Cgroup::create(cgroup::MOUNT).map_err(step("open the root cgroup"))?;
    let available = root.read("cgroup.controllers").unwrap_or_default();
    for controller in ["cpu", "memory", "pids"] {
        let enabled = available.split(' ').any(|name| name == controller)
            && root.write("cgroup.subtree_control", &format!("+{controller}")).is_ok();
        if !enabled {
            console::warn(&format!("this kernel has no cgroup controller {controller}: that limit can not be given"));
        }
    }
    // The first CPU limit in a kernel patches the kernel's code, which is slow under emulation; so it is not left to a fork.
    if let Ok(ready) = root.child("cpu-limits-ready") {
        let _ = ready.write("cpu.max", "100000 100000");
    }
    root.child("workload").map_err(step("make the workload's cgroup"))
}

fn hooks_cgroup() -> Result<Cgroup, BootError> {
    Cgroup::create(cgroup::MOUNT).and_then(|root| root.child("hooks")).map_err(step("make the hooks' cgroup"))
}

fn own_program() -> Result<OwnedFd, BootError> {
    rustix::fs::open("/proc/self/exe", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("open the agent's own program"))
}

fn loopback_up() -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all zeroes is a valid ifreq; both requests read and write nothing but that structure, and the name in it
    // ends with a zero byte. The flags are the member of the union that these requests use.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
        #[allow(clippy::cast_possible_truncation)] // IFF_UP is 1.
        let up = libc::IFF_UP as libc::c_short;
        request.ifr_ifru.ifru_flags |= up;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
