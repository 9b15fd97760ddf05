//! Starting QEMU's process with as little as it needs.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::{FdFlags, fcntl_setfd},
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit, setsid},
    thread::{Gid, Uid, UnshareFlags, set_thread_gid, set_thread_groups, set_thread_uid},
};

use serde_json::Value;

use super::{
    command::{CONTROL_CHANNELS, CommandLine},
    qmp::Qmp,
};
use crate::{Accel, AckStream, Confinement, EngineError, ProcessRef};

/// The monitor's socket in a machine's directory.
pub const MONITOR_SOCKET: &str = "monitor.sock";
/// What the guest writes to its ack port.
const ACK_PIPE: &str = "ack.pipe";
/// QEMU's own messages in a machine's directory.
pub const LOG: &str = "engine.log";
/// What the guest's kernel and agent wrote to the serial console of a template, in its machine's directory.
pub const CONSOLE: &str = "console.log";

/// Time for QEMU to start; it takes 25 ms on an idle machine, but may have to be read from a slow disk.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time for a started QEMU to answer whoever takes it over; past that, starting another is the better way.
const ADOPT_LIMIT: Duration = Duration::from_secs(2);
/// Time for a killed process to be gone; the kernel has to free its memory first.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// Most bytes a fork's process may write to any file (its log): a guest must not fill the host's disk.
const MAX_FILE: u64 = 4 << 20;

/// A started QEMU whose process dies with this value unless it is released.
#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) process: ProcessRef,
    pub(super) qmp: Qmp,
    pub(super) ack: AckStream,
    /// None if another process started it.
    child: Option<Child>,
    released: bool,
    dir: PathBuf,
}

/// Descriptors and sockets made before the command line can be written.
#[derive(Debug)]
pub(super) struct Prepared {
    dir_fd: OwnedFd,
    pub(super) monitor: UnixListener,
    ack: OwnedFd,
    ack_write: OwnedFd,
    /// For the process to hold, unused: a pipe that nobody can read would break under a guest that writes to it late, and
    /// QEMU would try again without end.
    ack_hold: OwnedFd,
    pub(super) root_image: File,
    pub(super) memory_dir: OwnedFd,
    channels: [UnixListener; CONTROL_CHANNELS],
    /// Kept open for the process, besides the ones above.
    pub(super) others: Vec<File>,
    /// The only group that the process has as another user.
    device_group: Option<Gid>,
}

impl Prepared {
    pub(super) fn new(accel: Accel, dir: &Path, root_image: &Path, memory_file: &Path) -> Result<Self, EngineError> {
        let file = |what, path: &Path, source| EngineError::File { what, path: path.into(), source };
        let dir_fd = open_dir(dir).map_err(|source| file("opening the machine's directory", dir, source))?;
        // All sockets are made here and handed over: the process needs no right to any directory. They are reached
        // through the descriptor, because a socket's path has at most 107 bytes.
        let listen = |name: &str| {
            UnixListener::bind(format!("/proc/self/fd/{}/{name}", dir_fd.as_raw_fd()))
                .map_err(|source| file("making the socket", &dir.join(name), source))
        };
        let monitor = listen(MONITOR_SOCKET)?;
        let mut channels = Vec::with_capacity(CONTROL_CHANNELS);
        for channel in 0..CONTROL_CHANNELS {
            channels.push(listen(&format!("ctl.{channel}.sock"))?);
        }
        #[allow(clippy::expect_used)]
        let channels = channels.try_into().expect("as many as were made");
        let (ack_hold, ack, ack_write) =
            make_ack_pipe(&dir_fd).map_err(|source| file("making the pipe", &dir.join(ACK_PIPE), source))?;
        let memory_parent = memory_file.parent().unwrap_or(Path::new("."));
        Ok(Self {
            dir_fd,
            monitor,
            channels,
            ack,
            ack_write,
            ack_hold,
            root_image: open(root_image)?,
            memory_dir: open_dir(memory_parent)
                .map_err(|source| file("opening the template's directory", memory_parent, source))?,
            others: Vec::new(),
            device_group: (accel == Accel::Kvm).then(device_group).flatten(),
        })
    }

    /// Makes the console's file for the process and gives its number.
    pub(super) fn console(&mut self, dir: &Path) -> Result<RawFd, EngineError> {
        let path = dir.join(CONSOLE);
        // For writing only: QEMU takes from its set the descriptor whose access mode is the one it wants.
        let console = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| EngineError::File { what: "making", path, source })?;
        let number = console.as_raw_fd();
        self.others.push(console);
        Ok(number)
    }

    /// Opens one more file for the process and gives its number.
    pub(super) fn open(&mut self, path: &Path) -> Result<RawFd, EngineError> {
        let file = open(path)?;
        let number = file.as_raw_fd();
        self.others.push(file);
        Ok(number)
    }

    pub(super) fn fds(&self) -> super::command::Fds {
        super::command::Fds {
            monitor: self.monitor.as_raw_fd(),
            ack: self.ack_write.as_raw_fd(),
            root_image: self.root_image.as_raw_fd(),
            memory_dir: self.memory_dir.as_raw_fd(),
            channels: self.channels.each_ref().map(AsRawFd::as_raw_fd),
        }
    }

    fn inherited(&self) -> Vec<RawFd> {
        let fds = self.fds();
        let mut all = vec![fds.monitor, fds.ack, self.ack_hold.as_raw_fd(), fds.root_image, fds.memory_dir];
        all.extend(fds.channels);
        all.extend(self.others.iter().map(AsRawFd::as_raw_fd));
        all
    }
}

/// What the process is for. A template's writes its memory file, and ends with the thread that builds it, whatever ends
/// that; a fork's lives on, and writes nothing but its log; a spare's becomes a fork's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Template,
    Fork,
    Spare,
}

/// Starts QEMU in `dir` and waits until it takes commands.
pub(super) fn launch(
    program: &Path,
    dir: &Path,
    line: CommandLine,
    prepared: Prepared,
    confinement: &Confinement<'_>,
    purpose: Purpose,
) -> Result<Qemu, EngineError> {
    let log_path = dir.join(LOG);
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|source| EngineError::File { what: "opening the log", path: log_path, source })?;
    let control = |source| EngineError::Control { during: "starting", source };
    let monitor = UnixStream::connect(format!("/proc/self/fd/{}/{MONITOR_SOCKET}", prepared.dir_fd.as_raw_fd()))
        .map_err(control)?;

    let mut command = Command::new(program);
    command
        .args(line.into_args())
        .current_dir(dir)
        // Nothing of the caller's environment, which may hold secrets.
        .env_clear()
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(control)?)
        .stderr(log);
    confine(&mut command, &prepared, confinement, purpose);
    let child =
        command.spawn().map_err(|source| EngineError::Spawn { program: program.display().to_string(), source })?;
    let process = ProcessRef::of(child.id()).map_err(control)?;
    let mut guard = ChildGuard(Some(child));
    // Our copies of what the process has now: as long as we held its listening sockets too, its end would not show.
    let Prepared { ack, monitor: listener, channels, ack_write, ack_hold, .. } = prepared;
    drop((listener, channels, ack_write, ack_hold));
    let ack = AckStream::new(ack).map_err(control)?;

    let qmp = match Qmp::start(monitor, START_LIMIT) {
        Ok(qmp) => qmp,
        Err(error) => {
            guard.end();
            return Err(explain(error, dir, "starting"));
        }
    };
    Ok(Qemu { process, qmp, ack, child: guard.0.take(), released: false, dir: dir.to_owned() })
}

impl Qemu {
    /// Takes over a process that another one started in `dir` and released.
    pub(super) fn adopt(dir: &Path, process: ProcessRef) -> Result<Self, EngineError> {
        let during = "taking over a spare machine";
        let control = |source| EngineError::Control { during, source };
        let dir_fd = open_dir(dir).map_err(control)?;
        let monitor =
            UnixStream::connect(format!("/proc/self/fd/{}/{MONITOR_SOCKET}", dir_fd.as_raw_fd())).map_err(control)?;
        let ack =
            rustix::fs::openat(&dir_fd, ACK_PIPE, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
                .map_err(io::Error::from)
                .and_then(AckStream::new)
                .map_err(control)?;
        let mut qmp = Qmp::start(monitor, ADOPT_LIMIT)?;
        let status = qmp.run(during, "query-status", Value::Null, ADOPT_LIMIT)?;
        // A spare has loaded its template and has never run.
        if status.get("running") != Some(&Value::Bool(false)) {
            return Err(EngineError::Refused { during, reason: "it is not paused".into() });
        }
        Ok(Self { process, qmp, ack, child: None, released: false, dir: dir.to_owned() })
    }

    /// Lets the process live on without this value.
    pub(super) fn release(mut self) -> (Option<Child>, ProcessRef) {
        self.released = true;
        (self.child.take(), self.process.clone())
    }

    /// Waits for the process to end by itself.
    pub(super) fn wait_end(&mut self, limit: Duration) -> Result<(), EngineError> {
        let during = "ending the machine";
        let gone = match self.process.pidfd() {
            Ok(None) => true,
            Ok(Some(fd)) => {
                crate::process::wait_gone(&fd, limit).map_err(|source| EngineError::Control { during, source })?
            }
            Err(source) => return Err(EngineError::Control { during, source }),
        };
        if gone { Ok(()) } else { Err(EngineError::Timeout { during, limit }) }
    }

    /// Adds the process' last words where an error only says that the connection broke.
    pub(super) fn explain(&self, error: EngineError, during: &'static str) -> EngineError {
        explain(error, &self.dir, during)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        match self.child.take() {
            Some(child) => ChildGuard(Some(child)).end(),
            None => drop(self.process.kill(KILL_LIMIT)),
        }
    }
}

#[derive(Debug)]
struct ChildGuard(Option<Child>);

impl ChildGuard {
    fn end(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The group that may use `/dev/kvm`, which QEMU opens itself, as the user it runs as. `None` if everybody may or no group.
fn device_group() -> Option<Gid> {
    let device = fs::metadata("/dev/kvm").ok()?;
    (device.mode() & 0o066 == 0o060).then(|| Gid::from_raw(device.gid()))
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        self.end();
    }
}

#[allow(unsafe_code)]
fn confine(command: &mut Command, prepared: &Prepared, confinement: &Confinement<'_>, purpose: Purpose) {
    let inherited = prepared.inherited();
    let groups: Vec<Gid> = prepared.device_group.into_iter().collect();
    let user = confinement.user;
    let namespaces = confinement.namespaces;
    let cgroups: Vec<RawFd> = confinement.cgroups.iter().map(AsRawFd::as_raw_fd).collect();
    let setup = move || -> io::Result<()> {
        setsid()?;
        for &fd in &inherited {
            // SAFETY: the descriptors are owned by the caller of `launch` until after the spawn.
            fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, FdFlags::empty())?;
        }
        // The limits first, while this process still has the right to take them on.
        for &fd in &cgroups {
            // SAFETY: as above.
            rustix::io::write(unsafe { BorrowedFd::borrow_raw(fd) }, b"0")?;
        }
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        setrlimit(Resource::Core, none)?;
        if purpose != Purpose::Template {
            setrlimit(Resource::Fsize, Rlimit { current: Some(MAX_FILE), maximum: Some(MAX_FILE) })?;
        }
        if namespaces {
            // SAFETY: a freshly forked process with one thread; no descriptor table is shared (no FILES flag).
            unsafe {
                rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)?;
            }
        }
        if let Some((uid, gid)) = user {
            // The groups first: without CAP_SETGID they could not be given up any more.
            set_thread_groups(&groups)?;
            set_thread_gid(Gid::from_raw(gid))?;
            set_thread_uid(Uid::from_raw(uid))?;
        }
        if purpose == Purpose::Template {
            // After the change of the user, which would undo it.
            set_parent_process_death_signal(Some(Signal::KILL))?;
        }
        rustix::thread::set_no_new_privs(true)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls: it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(setup);
    }
}

fn explain(error: EngineError, dir: &Path, during: &'static str) -> EngineError {
    match error {
        EngineError::Control { .. } => EngineError::Died { during, last_words: last_words(&dir.join(LOG)) },
        other => other,
    }
}

/// The last lines of a log, without what could disturb a terminal.
fn last_words(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(600)))?;
        let mut text = Vec::new();
        file.take(600).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    let text: String = String::from_utf8_lossy(&text)
        .chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect();
    if text.trim().is_empty() { "(nothing)".into() } else { text.trim().into() }
}

fn open(path: &Path) -> Result<File, EngineError> {
    File::open(path).map_err(|source| EngineError::File { what: "opening", path: path.into(), source })
}

/// A pipe with a name, so that another process can take the reading over: an end for both, one for reading, one for
/// writing. The first makes that opening the others waits for nobody.
fn make_ack_pipe(dir: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd, OwnedFd)> {
    rustix::fs::mknodat(dir, ACK_PIPE, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let open = |flags| rustix::fs::openat(dir, ACK_PIPE, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
    Ok((open(OFlags::RDWR)?, open(OFlags::RDONLY)?, open(OFlags::WRONLY)?))
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}
