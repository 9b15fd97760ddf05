//! A machine's own directory: the sockets, the pipe and the logs in it, which the host makes and the process inherits.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
};

use rustix::fs::{FileType, Mode, OFlags};

use crate::{AckStream, EngineError};

/// Number of control channels, hence of host processes that can talk to one fork at a time.
pub const CONTROL_CHANNELS: usize = 8;
/// The control socket of a machine's process, in its directory.
pub const MONITOR_SOCKET: &str = "monitor.sock";
/// What the guest writes to its ack port.
const ACK_PIPE: &str = "ack.pipe";
/// Messages of a machine's process, in its directory.
pub const LOG: &str = "engine.log";
/// What the guest's kernel and agent wrote to the serial console of a template, in its machine's directory.
pub const CONSOLE: &str = "console.log";

/// The kernel's command line.
///
/// `tsc=reliable`, `no_timer_check` and `rcu_expedited` shorten the boot under emulation; `psi=0 nowatchdog` keep work
/// out of a fork's first milliseconds; `lsm=` leaves out the hooks of policies that nobody loads; `reboot=t panic=-1` turn
/// a dead guest into an ended process.
pub(crate) const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet reboot=t panic=-1 tsc=reliable no_timer_check mitigations=off \
    random.trust_cpu=on cryptomgr.notests 8250.nr_uarts=1 audit=0 rcupdate.rcu_expedited=1 nowatchdog psi=0 lsm=landlock,yama";

/// What is made in a machine's directory before its process starts.
#[derive(Debug)]
pub(crate) struct MachineDir {
    dir: OwnedFd,
    pub(crate) monitor: UnixListener,
    pub(crate) ack: OwnedFd,
    pub(crate) ack_write: OwnedFd,
    /// For the process to hold, unused: a pipe that nobody can read would break under a guest that writes to it late.
    pub(crate) ack_hold: OwnedFd,
    pub(crate) channels: [UnixListener; CONTROL_CHANNELS],
}

impl MachineDir {
    pub(crate) fn new(dir: &Path) -> Result<Self, EngineError> {
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
        Ok(Self { dir: dir_fd, monitor, ack, ack_write, ack_hold, channels })
    }

    /// Connects to the control socket; the process need not be there yet.
    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        connect(&self.dir)
    }

    /// Descriptors that the process inherits.
    pub(crate) fn inherited(&self) -> Vec<RawFd> {
        let mut all = vec![self.monitor.as_raw_fd(), self.ack_write.as_raw_fd(), self.ack_hold.as_raw_fd()];
        all.extend(self.channels.iter().map(AsRawFd::as_raw_fd));
        all
    }

    /// The host's end of the ack port. The rest is closed here: as long as we held the process' listening sockets too,
    /// its end would not show.
    pub(crate) fn into_ack(self) -> io::Result<AckStream> {
        AckStream::new(self.ack)
    }
}

/// The control socket and the ack port of a machine that another process started in `dir`.
pub(crate) fn reconnect(dir: &Path) -> io::Result<(UnixStream, AckStream)> {
    let dir = open_dir(dir)?;
    let monitor = connect(&dir)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let ack = rustix::fs::openat(&dir, ACK_PIPE, flags, Mode::empty())?;
    Ok((monitor, AckStream::new(ack)?))
}

fn connect(dir: &OwnedFd) -> io::Result<UnixStream> {
    UnixStream::connect(format!("/proc/self/fd/{}/{MONITOR_SOCKET}", dir.as_raw_fd()))
}

/// Opens the log for the process' standard streams.
pub(crate) fn open_log(dir: &Path) -> Result<File, EngineError> {
    let path = dir.join(LOG);
    OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(|source| EngineError::File {
        what: "opening the log",
        path,
        source,
    })
}

/// Makes the console's file. For writing only: QEMU takes from its set the descriptor whose access mode is the one it wants.
pub(crate) fn make_console(dir: &Path) -> Result<File, EngineError> {
    let path = dir.join(CONSOLE);
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| EngineError::File { what: "making", path, source })
}

/// Makes a template's memory file, with the caller's rights, so that the machine's process needs none to the directory,
/// and hands it over to the process' user.
pub(crate) fn make_memory_file(path: &Path, bytes: u64, user: Option<(u32, u32)>) -> Result<File, EngineError> {
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|file| file.set_len(bytes).map(|()| file))
        .map_err(|source| EngineError::File { what: "making", path: path.into(), source })?;
    if let Some((uid, gid)) = user {
        std::os::unix::fs::fchown(&memory, Some(uid), Some(gid)).map_err(|source| EngineError::File {
            what: "handing over",
            path: path.into(),
            source,
        })?;
    }
    Ok(memory)
}

/// Makes a template's state file.
pub(crate) fn make_state_file(path: &Path) -> Result<File, EngineError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| EngineError::File { what: "making", path: path.into(), source })
}

/// Opens a file for reading.
pub(crate) fn open(path: &Path) -> Result<File, EngineError> {
    File::open(path).map_err(|source| EngineError::File { what: "opening", path: path.into(), source })
}

/// Says why a connection broke: the last lines of the log, without what could disturb a terminal.
pub(crate) fn explain(error: EngineError, dir: &Path, during: &'static str) -> EngineError {
    match error {
        EngineError::Control { .. } => EngineError::Died { during, last_words: last_words(&dir.join(LOG)) },
        other => other,
    }
}

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

/// A pipe with a name, so that another process can take the reading over: an end for both, one for reading, one for
/// writing. The first makes that opening the others waits for nobody.
fn make_ack_pipe(dir: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd, OwnedFd)> {
    rustix::fs::mknodat(dir, ACK_PIPE, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let open = |flags| rustix::fs::openat(dir, ACK_PIPE, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
    Ok((open(OFlags::RDWR)?, open(OFlags::RDONLY)?, open(OFlags::WRONLY)?))
}

/// A directory, to name files in it.
pub(crate) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}
