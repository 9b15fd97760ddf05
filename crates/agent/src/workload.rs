//! How everything that is not the agent is started: in the workload's mount namespace and a cgroup of its own, as its own
//! session, with a known environment and nothing else inherited.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use identity::Limits;
use rustix::process::{Pid, PidfdFlags, Signal};
use thiserror::Error;

use crate::{
    cgroup::Cgroup,
    reaper::{Exit, ExitCell, Reaper},
    user::{self, User},
};

/// What to run.
#[derive(Debug, Clone)]
pub enum Program {
    /// A command; the first word is looked up in the environment's `PATH` in the workload.
    Command(Vec<String>),
    /// A tool that is built into the agent, run with one argument as `offshoot-agent --tool NAME ARG`.
    Tool(&'static str, String),
}

/// What the process has as stdin, stdout and stderr.
#[derive(Debug)]
pub enum Console {
    /// Three descriptors; `None` is `/dev/null`.
    Pipes([Option<OwnedFd>; 3]),
    /// One terminal (the end of the pty that processes use), which also becomes the session's controlling terminal.
    Terminal(OwnedFd),
}

/// A process to start.
#[derive(Debug)]
pub struct Start {
    /// Name of the process' cgroup: `<kind>-<name>`, e.g. `service-web`; `[a-z0-9-]{1,64}`.
    pub group: String,
    /// What to run.
    pub program: Program,
    /// The whole environment, but for `HOME`: without one it is the user's. [`crate::state::AgentState::environment`] is where it starts from.
    pub env: BTreeMap<String, String>,
    /// Working directory; empty is `/`.
    pub workdir: String,
    /// User name or `uid[:gid]`; empty is root.
    pub user: String,
    /// Its input and output.
    pub console: Console,
    /// A descriptor that it inherits under its number.
    pub inherited: Option<OwnedFd>,
    /// Where its cgroup is.
    pub place: Among,
    /// Limits of that cgroup, besides those of the workload.
    pub limits: Limits,
}

/// Among whom a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Among {
    /// The workload: it is counted, limited and frozen with it.
    Workload,
    /// Beside the workload, while that is frozen. Whoever starts it there ends it before the thaw.
    Hooks,
}

/// Why a process was not started.
#[derive(Debug, Error)]
pub enum StartError {
    /// The workload is frozen for a capture, or a fork's identity is being applied.
    #[error("the workload is frozen; wait until the sandbox runs")]
    Frozen,
    /// There is nothing to run.
    #[error("the command is empty")]
    Empty,
    /// An argument, variable or path that no process can be given.
    #[error("the {0} has a NUL byte or is malformed")]
    Malformed(&'static str),
    /// The user is not known in the workload.
    #[error("user {0:?} is not in the workload's /etc/passwd; give a name from there or uid[:gid]")]
    User(String),
    /// The cgroup could not be made.
    #[error("cgroup {name} could not be made: {source}")]
    Cgroup {
        /// The group.
        name: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A limit that was asked for can not be given: it is not run without.
    #[error("the limits of cgroup {name} could not be set: {source}")]
    Limits {
        /// The group.
        name: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The program could not be run.
    #[error("{program} could not be started: {source}")]
    Exec {
        /// The first word of the command.
        program: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Starts processes in the workload.
#[derive(Debug)]
pub struct Workload {
    place: Option<Place>,
    reaper: Reaper,
    /// Closed (false) while the workload is frozen: a child that froze before its exec would leave its starter waiting.
    open: RwLock<bool>,
}

/// Where the workload lives. Without it (in tests) processes are started like those of any program.
#[derive(Debug)]
pub struct Place {
    /// The workload's mount namespace.
    pub mounts: OwnedFd,
    /// Its root directory, for paths that must stay inside it (`openat2` with `RESOLVE_IN_ROOT`).
    pub root: OwnedFd,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// The cgroup of [`Among::Hooks`].
    pub hooks: Cgroup,
    /// The agent's own program, opened before the workload had a say.
    pub program: OwnedFd,
}

/// A process of the workload.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    cgroup: Option<Cgroup>,
    exit: Arc<ExitCell>,
}

impl Workload {
    /// What starts processes in `place`.
    #[must_use]
    pub fn new(place: Place, reaper: Reaper) -> Self {
        Self { place: Some(place), reaper, open: RwLock::new(true) }
    }

    /// What starts processes without namespace and cgroup: for tests outside a guest. They share one reaper: it takes in
    /// every child of the program.
    ///
    /// # Errors
    /// If the reaper's thread can not be started.
    pub fn bare() -> io::Result<Self> {
        static REAPER: Mutex<Option<Reaper>> = Mutex::new(None);
        let mut shared = REAPER.lock().unwrap_or_else(PoisonError::into_inner);
        let reaper = match &*shared {
            Some(reaper) => reaper.clone(),
            None => shared.insert(Reaper::start()?).clone(),
        };
        Ok(Self { place: None, reaper, open: RwLock::new(true) })
    }

    /// Where the workload lives; `None` only for [`Self::bare`].
    #[must_use]
    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// Starts a process. It blocks until the program was executed, or could not be.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(&self, mut start: Start) -> Result<Process, StartError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if !*open && start.place == Among::Workload {
            return Err(StartError::Frozen);
        }
        let user = self.user(&start.user)?;
        if let Some(home) = user.home() {
            start.env.entry("HOME".to_owned()).or_insert_with(|| home.to_owned());
        }
        let (mut command, name) = self.command(&start.program)?;
        let group = match &self.place {
            Some(place) => Some(
                place
                    .of(start.place)
                    .child(&start.group)
                    .map_err(|source| StartError::Cgroup { name: start.group.clone(), source })?,
            ),
            None => None,
        };
        if start.limits != Limits::default() {
            let limited = match (&self.place, &group) {
                (Some(place), Some(group)) => place
                    .of(start.place)
                    .let_limit(start.limits)
                    .and_then(|()| group.set_limits(Limits::default(), start.limits).map(drop)),
                _ => Err(io::Error::new(io::ErrorKind::Unsupported, "there are no cgroups here")),
            };
            limited.map_err(|source| StartError::Limits { name: start.group.clone(), source })?;
        }
        let procs = match &group {
            Some(group) => Some(
                File::options()
                    .write(true)
                    .open(group.path().join("cgroup.procs"))
                    .map_err(|source| StartError::Cgroup { name: start.group.clone(), source })?,
            ),
            None => None,
        };
        if start.env.iter().any(|(name, value)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')) {
            return Err(StartError::Malformed("environment"));
        }
        command.env_clear().envs(&start.env);
        let terminal = matches!(start.console, Console::Terminal(_));
        let exec = |source| StartError::Exec { program: name.clone(), source };
        match start.console {
            Console::Pipes([stdin, stdout, stderr]) => {
                let stdio = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
                command.stdin(stdio(stdin)).stdout(stdio(stdout)).stderr(stdio(stderr));
            }
            Console::Terminal(fd) => {
                command.stdin(fd.try_clone().map_err(exec)?).stdout(fd.try_clone().map_err(exec)?).stderr(fd);
            }
        }
        let workdir = if start.workdir.is_empty() { "/" } else { &start.workdir };
        let child = Child {
            procs: procs.as_ref().map(AsRawFd::as_raw_fd),
            mounts: self.place.as_ref().map(|place| place.mounts.as_raw_fd()),
            terminal,
            workdir: CString::new(workdir).map_err(|_| StartError::Malformed("working directory"))?,
            user,
            inherited: start.inherited.as_ref().map(AsRawFd::as_raw_fd),
        };
        // SAFETY: `Child::prepare` runs between fork and exec in a process whose other threads are gone. It only makes
        // system calls, allocates nothing and takes no lock; the descriptors it uses live until `spawn` has returned.
        unsafe { command.pre_exec(move || child.prepare()) };

        let starting = self.reaper.starting();
        let child = command.spawn().map_err(exec)?;
        // Nothing is reaped before `register`, so the pid is this child's, be it a zombie already.
        let pid = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let exit = starting.register(pid.as_raw_nonzero().get());
        let pidfd = pidfd.map_err(|error| exec(error.into()))?;
        Ok(Process { pid, pidfd, cgroup: group, exit })
    }

    /// From now on nothing is started; waits for starts that are under way.
    pub(crate) fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Processes may be started again.
    pub(crate) fn open(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn user(&self, name: &str) -> Result<User, StartError> {
        let root = match &self.place {
            Some(place) => Some(&place.root),
            // Outside a guest nobody can become another user.
            None if name.is_empty() => return Ok(User::unchanged()),
            None => None,
        };
        user::resolve(root, name).ok_or_else(|| StartError::User(name.to_owned()))
    }

    fn command(&self, program: &Program) -> Result<(Command, String), StartError> {
        match program {
            Program::Command(argv) => {
                let (name, args) = argv.split_first().ok_or(StartError::Empty)?;
                if argv.iter().any(|word| word.contains('\0')) {
                    return Err(StartError::Malformed("command"));
                }
                if name.is_empty() {
                    return Err(StartError::Empty);
                }
                let mut command = Command::new(name);
                command.args(args);
                Ok((command, name.clone()))
            }
            Program::Tool(name, arg) => {
                if arg.contains('\0') {
                    return Err(StartError::Malformed("argument"));
                }
                // The child has a copy of the descriptor until its exec.
                let path = match &self.place {
                    Some(place) => format!("/proc/self/fd/{}", place.program.as_raw_fd()),
                    None => "/proc/self/exe".to_owned(),
                };
                let mut command = Command::new(path);
                command.arg0("offshoot-agent").args(["--tool", name, arg]);
                Ok((command, format!("the tool {name}")))
            }
        }
    }
}

/// What a child does to itself before it executes its program.
struct Child {
    procs: Option<RawFd>,
    mounts: Option<RawFd>,
    terminal: bool,
    workdir: CString,
    user: User,
    inherited: Option<RawFd>,
}

impl Place {
    fn of(&self, among: Among) -> &Cgroup {
        match among {
            Among::Workload => &self.cgroup,
            Among::Hooks => &self.hooks,
        }
    }
}

impl Child {
    fn prepare(&self) -> io::Result<()> {
        // First the cgroup: whatever the process does from here on is counted, limited, and frozen with the rest.
        if let Some(procs) = self.procs {
            // SAFETY: the parent keeps the descriptor open until the exec.
            let procs = unsafe { BorrowedFd::borrow_raw(procs) };
            rustix::io::write(procs, b"0")?;
        }
        if let Some(mounts) = self.mounts {
            // SAFETY: as above.
            let mounts = unsafe { BorrowedFd::borrow_raw(mounts) };
            // Root and working directory become the namespace's root.
            rustix::thread::move_into_link_name_space(mounts, Some(rustix::thread::LinkNameSpaceType::Mount))?;
        }
        if let Some(inherited) = self.inherited {
            // SAFETY: as above. Only this child's copy outlives the exec.
            let inherited = unsafe { BorrowedFd::borrow_raw(inherited) };
            rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?;
        }
        rustix::process::setsid()?;
        if self.terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        // The agent has none, so that it makes files as it says.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        self.user.become_it()?;
        // As the user: a directory he may not enter is not entered.
        rustix::process::chdir(&*self.workdir)?;
        unblock_signals()
    }
}

/// The agent blocks some signals for itself; a program expects none to be blocked. (The standard library resets SIGPIPE
/// only.)
fn unblock_signals() -> io::Result<()> {
    // SAFETY: an all-zero sigset_t is the empty set; sigprocmask only reads it.
    let result = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Process {
    /// The process' id, which is also its session's and process group's.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// A descriptor of the process; it becomes readable when the process ends.
    #[must_use]
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// The process' cgroup; `None` only outside a guest.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.exit.get()
    }

    /// Waits, blocking, until it ends.
    #[must_use]
    pub fn wait(&self) -> Exit {
        // Without a deadline the wait ends only with an exit.
        self.exit.wait(None).unwrap_or(Exit::Code(255))
    }

    /// Waits, blocking, until it ends or the deadline passes.
    #[must_use]
    pub fn wait_until(&self, deadline: Instant) -> Option<Exit> {
        self.exit.wait(Some(deadline))
    }

    /// Waits until it ends. May be dropped at any time.
    pub async fn exited(&self) -> Exit {
        self.exit.exited().await
    }

    /// Sends a signal to the process' group: the shell and what it runs in the foreground.
    ///
    /// # Errors
    /// If there is no such process any more.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.exit().is_some() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        match rustix::process::kill_process_group(self.pid, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(rustix::process::pidfd_send_signal(&self.pidfd, signal)?),
            result => Ok(result?),
        }
    }

    /// Ends the process and everything it started, wherever that went, and removes its cgroup.
    ///
    /// # Errors
    /// If something is still there after two seconds.
    pub fn kill_tree(&self) -> io::Result<()> {
        match &self.cgroup {
            Some(cgroup) => {
                cgroup.kill(Instant::now() + Duration::from_secs(2))?;
                cgroup.remove()
            }
            None => match self.signal(Signal::KILL) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                result => result,
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An empty group goes with its process; one that still has processes stays, and is limited with the workload.
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.remove();
        }
    }
}
