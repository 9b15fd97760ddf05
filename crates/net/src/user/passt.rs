//! The program passt: where it is, how it is told what to do, how it is started and what comes back.
//!
//! It forks into the background when it is ready, which tells that; its first process then ends with 0. The second one's pid
//! it writes where `--pid` says. Both that and its log are files in memory (memfd), named as its standard input and output: passt
//! reaches no directory of ours (it may run as another user, and AppArmor's profile for it allows few), and nothing is left behind.

use std::{
    env,
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::{FdFlags, fcntl_setfd},
    process::{Pid, PidfdFlags, Resource, Rlimit, geteuid, pidfd_open, setrlimit},
    thread::{Gid, Uid, set_thread_gid, set_thread_groups, set_thread_uid},
};

use super::{RunAs, UserAddresses, UserError, step};
use crate::{
    address::MTU,
    policy::{Forward, Protocol},
};

/// How long passt may take until it is ready. It takes some 20 ms.
const LIMIT: Duration = Duration::from_secs(10);

/// The user and group nobody.
const NOBODY: u32 = 65_534;

/// Most bytes of the log, which passt keeps to by removing the oldest lines. It asks for at least 40960.
const LOG_SIZE: &str = "65536";

/// Longest part of the log that is quoted in an error, in bytes.
const QUOTE: usize = 1024;

/// Where the program is: on the search path, or where packages put it if there is none.
pub(crate) fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
    find_on(&path)
}

fn find_on(path: &OsString) -> Option<PathBuf> {
    let is_program = |path: &PathBuf| {
        path.is_absolute() && path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(path).map(|dir| dir.join("passt")).find(is_program)
}

/// All that passt is told. Every value comes from a type that holds nothing but numbers.
fn arguments(socket: i32, addresses: &UserAddresses, forwards: &[Forward]) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
    add(&["--quiet", "--pid", "/proc/self/fd/0", "--log-file", "/proc/self/fd/1", "--log-size", LOG_SIZE]);
    add(&["--fd", &socket.to_string(), "--mtu", &MTU.to_string(), "--mac-addr", &addresses.gateway_mac.to_string()]);
    // The guest has all that from its identity.
    add(&["--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra", "--dns", "none", "--search", "none"]);
    // The gateway's address is not to be the host's loopback.
    add(&["--no-map-gw"]);
    match addresses {
        UserAddresses { v4: Some(_), v6: None, .. } => add(&["--ipv4-only"]),
        UserAddresses { v4: None, v6: Some(_), .. } => add(&["--ipv6-only"]),
        _ => {}
    }
    if let Some((guest, gateway)) = addresses.v4 {
        add(&["--address", &guest.to_string(), "--netmask", "24", "--gateway", &gateway.to_string()]);
    }
    if let Some((guest, gateway)) = addresses.v6 {
        add(&["--address", &guest.to_string(), "--gateway", &gateway.to_string()]);
    }
    // What passt would take from a card of the host's it is told above, but it insists on one.
    if !super::has_default_route_v4() && addresses.v6.is_none() {
        add(&["--interface", "lo"]);
    }
    for (protocol, option) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        let mut any = false;
        for forward in forwards.iter().filter(|forward| forward.protocol == protocol) {
            add(&[option, &format!("{}:{}", forward.host, forward.guest)]);
            any = true;
        }
        if !any {
            // Not the default: that of UDP is to follow TCP.
            add(&[option, "none"]);
        }
    }
    arguments
}

/// Starts passt and waits until it is ready; its pid.
pub(super) fn start(
    program: &Path,
    socket: BorrowedFd<'_>,
    addresses: &UserAddresses,
    forwards: &[Forward],
    run_as: RunAs,
) -> Result<u32, UserError> {
    let doing = "starting passt";
    let file = |name: &str| memfd_create(name, MemfdFlags::CLOEXEC).map_err(|error| step(doing)(error.into()));
    let (pid, log, errors) = (file("pid")?, file("log")?, file("errors")?);
    let copy = |file: &OwnedFd| file.try_clone().map(Stdio::from).map_err(step(doing));

    let mut command = Command::new(program);
    command.args(arguments(socket.as_raw_fd(), addresses, forwards)).env_clear().current_dir("/");
    command.stdin(copy(&pid)?).stdout(copy(&log)?).stderr(copy(&errors)?);
    prepare(&mut command, socket, run_as);
    let mut child = command.spawn().map_err(step(doing))?;
    let ready = wait(&mut child).map_err(step("waiting for passt"))?;
    if !ready {
        let said = [read(&log), read(&errors)].concat();
        return Err(refused(&said, forwards));
    }
    read(&pid).trim().parse().map_err(|_| UserError::Refused { said: "it did not say its pid".to_owned() })
}

fn prepare(command: &mut Command, socket: BorrowedFd<'_>, run_as: RunAs) {
    let socket = socket.as_raw_fd();
    let user = run_as.user.or_else(|| geteuid().is_root().then_some((NOBODY, NOBODY)));
    let setup = move || -> io::Result<()> {
        // Whatever the caller has open, and was given by its own caller. What std waits on is so already.
        // SAFETY: sets a flag of descriptors of this freshly forked process; none is closed before the program starts.
        if unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is owned by the caller of `start` until after the spawn.
        fcntl_setfd(unsafe { BorrowedFd::borrow_raw(socket) }, FdFlags::empty())?;
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
        if let Some((uid, gid)) = user {
            // The groups first: without CAP_SETGID they could not be given up any more.
            set_thread_groups(&[])?;
            set_thread_gid(Gid::from_raw(gid))?;
            set_thread_uid(Uid::from_raw(uid))?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls: it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(setup);
    }
}

/// Waits for the first process to end; whether it says that the second is ready. It is killed when it takes too long.
fn wait(child: &mut Child) -> io::Result<bool> {
    let ended = await_end(child);
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
    }
    let status = child.wait()?;
    if ended? { Ok(status.success()) } else { Err(io::ErrorKind::TimedOut.into()) }
}

fn await_end(child: &Child) -> io::Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec::try_from(LIMIT).map_err(io::Error::other)?;
    loop {
        match poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn read(file: &OwnedFd) -> String {
    let Ok(file) = file.try_clone() else { return String::new() };
    let mut bytes = vec![0; 64 * 1024];
    let length = File::from(file).read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

/// Why passt did not start, as far as that can be told without its words: those are for people.
fn refused(said: &str, forwards: &[Forward]) -> UserError {
    let first = crate::namespace::setting("ipv4/ip_unprivileged_port_start").ok().and_then(|first| first.parse().ok());
    let first = first.unwrap_or(1024);
    if let Some(forward) = forwards.iter().find(|forward| forward.host < first) {
        return UserError::LowPort { port: forward.host, first };
    }
    let words: Vec<_> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut said = words.join("; ");
    let cut = said.len().saturating_sub(QUOTE);
    said = said.chars().skip(cut).collect();
    UserError::Refused { said: if said.is_empty() { "it did not say why".to_owned() } else { said } }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_search_path_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("passt");
        std::fs::write(&program, "").unwrap();
        assert_eq!(find_on(&dir.path().into()), None, "it can not be run");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(find_on(&dir.path().into()), Some(program));
        assert_eq!(find_on(&"".into()), None);
        assert_eq!(find_on(&".".into()), None);
    }
}
