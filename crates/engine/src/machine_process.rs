//! A machine's process: started with as little as it needs, ended with the value that stands for it.

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit, setsid},
    thread::{Gid, Uid, UnshareFlags, set_thread_gid, set_thread_groups, set_thread_uid},
};

use crate::{AckStream, Confinement, EngineError, ProcessRef, machine_dir};

/// Time for a killed process to be gone; the kernel has to free its memory first.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// Most bytes a fork's process may write to any file (its log): a guest must not fill the host's disk.
const MAX_FILE: u64 = 4 << 20;

/// What a process is for. A template's writes its memory file, and ends with the thread that builds it, whatever ends
/// that; a fork's lives on, and writes nothing but its log; a spare's becomes a fork's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Template,
    Fork,
    Spare,
}

/// Who changes user and namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Jail {
    /// We, before the program starts: it is not ours. The group is the only one that it keeps besides its own.
    Before(Option<Gid>),
    /// The program itself, once it has started. It gets the one thing that it can not take: a pid namespace.
    Itself,
}

/// A machine's process, which ends with this value unless it is released.
#[derive(Debug)]
pub(crate) struct MachineProcess {
    pub(crate) process: ProcessRef,
    pub(crate) ack: AckStream,
    /// None if another process started it.
    child: Option<Child>,
    released: bool,
    dir: PathBuf,
}

/// A child that nothing is known of yet but that it must not be left behind.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) process: ProcessRef,
    child: Option<Child>,
}

/// Starts a program in `dir`, with the log as its output, without any of the caller's environment, which may hold secrets.
pub(crate) fn spawn(
    mut command: Command,
    dir: &Path,
    inherited: Vec<RawFd>,
    confinement: &Confinement<'_>,
    purpose: Purpose,
    jail: Jail,
) -> Result<Spawned, EngineError> {
    let control = |source| EngineError::Control { during: "starting", source };
    let log = machine_dir::open_log(dir)?;
    let program = command.get_program().to_string_lossy().into_owned();
    command.current_dir(dir).env_clear().stdin(Stdio::null()).stdout(log.try_clone().map_err(control)?).stderr(log);
    prepare(&mut command, inherited, confinement, purpose, jail);
    let namespace = match jail {
        Jail::Itself if confinement.namespaces => Some(PidNamespace::enter().map_err(control)?),
        _ => None,
    };
    let spawned = command.spawn().map_err(|source| EngineError::Spawn { program, source });
    // Whether there is a child or not: the next one must not be born into this one's namespace.
    let left = namespace.map_or(Ok(()), PidNamespace::leave);
    let child = spawned?;
    match left.and_then(|()| ProcessRef::of(child.id())) {
        Ok(process) => Ok(Spawned { process, child: Some(child) }),
        Err(source) => {
            end(Some(child));
            Err(control(source))
        }
    }
}

/// The calling thread's children are born into a pid namespace of their own as long as this is held; the first is its
/// init, so that nothing of it is left when it ends. Only this thread is concerned, which must start no thread meanwhile.
struct PidNamespace(std::fs::File);

impl PidNamespace {
    #[allow(unsafe_code)]
    fn enter() -> io::Result<Self> {
        let own = std::fs::File::open("/proc/thread-self/ns/pid")?;
        // SAFETY: concerns the processes that this thread starts, and no descriptor table (no FILES flag).
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID)? };
        Ok(Self(own))
    }

    fn leave(self) -> io::Result<()> {
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        use std::os::fd::AsFd;
        Ok(move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::ProcessID))?)
    }
}

#[allow(unsafe_code)]
fn prepare(command: &mut Command, inherited: Vec<RawFd>, confinement: &Confinement<'_>, purpose: Purpose, jail: Jail) {
    let user = confinement.user;
    let namespaces = confinement.namespaces;
    let ours = matches!(jail, Jail::Before(_));
    let groups: Vec<Gid> = if let Jail::Before(group) = jail { group.into_iter().collect() } else { Vec::new() };
    let cgroups: Vec<RawFd> = confinement.cgroups.iter().map(AsRawFd::as_raw_fd).collect();
    let setup = move || -> io::Result<()> {
        setsid()?;
        for &fd in &inherited {
            // SAFETY: the descriptors are owned by the caller of `spawn` until after the spawn.
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
        if namespaces && ours {
            // SAFETY: a freshly forked process with one thread; no descriptor table is shared (no FILES flag).
            unsafe {
                rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)?;
            }
        }
        if let Some((uid, gid)) = user.filter(|_| ours) {
            // The groups first: without CAP_SETGID they could not be given up any more.
            set_thread_groups(&groups)?;
            set_thread_gid(Gid::from_raw(gid))?;
            set_thread_uid(Uid::from_raw(uid))?;
        }
        if purpose == Purpose::Template {
            // After the change of the user, which would undo it.
            set_parent_process_death_signal(Some(Signal::KILL))?;
        }
        if ours {
            rustix::thread::set_no_new_privs(true)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls: it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(setup);
    }
}

impl Spawned {
    /// Keeps it, with the host's end of its ack port.
    pub(crate) fn with(mut self, ack: AckStream, dir: &Path) -> MachineProcess {
        MachineProcess {
            process: self.process.clone(),
            ack,
            child: self.child.take(),
            released: false,
            dir: dir.to_owned(),
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        end(self.child.take());
    }
}

fn end(child: Option<Child>) {
    if let Some(mut child) = child {
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl MachineProcess {
    /// A process that another one started in `dir` and released.
    pub(crate) fn adopt(process: ProcessRef, ack: AckStream, dir: &Path) -> Self {
        Self { process, ack, child: None, released: false, dir: dir.to_owned() }
    }

    /// Lets the process live on without this value.
    pub(crate) fn release(mut self) -> (Option<Child>, ProcessRef) {
        self.released = true;
        (self.child.take(), self.process.clone())
    }

    /// Waits for the process to end by itself.
    pub(crate) fn wait_end(&mut self, limit: Duration) -> Result<(), EngineError> {
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
    pub(crate) fn explain(&self, error: EngineError, during: &'static str) -> EngineError {
        machine_dir::explain(error, &self.dir, during)
    }
}

impl Drop for MachineProcess {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        match self.child.take() {
            Some(child) => end(Some(child)),
            // Not spared for being somebody else's: it is nobody's now.
            None => drop(self.process.kill(KILL_LIMIT)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    fn sleep_in(dir: &Path, namespaces: bool, purpose: Purpose) -> Spawned {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let confinement = Confinement { user: None, namespaces, cgroups: &[] };
        spawn(command, dir, Vec::new(), &confinement, purpose, Jail::Itself).unwrap()
    }

    fn pid_namespace(pid: &str) -> PathBuf {
        fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap()
    }

    #[test]
    fn a_process_that_jails_itself_is_born_alone_and_the_caller_is_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::process::geteuid().is_root();
        let children = || fs::read_link("/proc/thread-self/ns/pid_for_children").unwrap();
        let before = children();
        let inside = sleep_in(dir.path(), root, Purpose::Fork);
        assert_eq!(children(), before);
        let missing = spawn(
            Command::new("/nowhere/at/all"),
            dir.path(),
            Vec::new(),
            &Confinement { user: None, namespaces: root, cgroups: &[] },
            Purpose::Fork,
            Jail::Itself,
        );
        assert!(matches!(missing, Err(EngineError::Spawn { .. })));
        assert_eq!(children(), before, "after a failure too");
        let outside = sleep_in(dir.path(), false, Purpose::Fork);
        let own = pid_namespace("self");
        assert_eq!(pid_namespace(&inside.process.pid.to_string()) != own, root);
        assert_eq!(pid_namespace(&outside.process.pid.to_string()), own);
    }

    #[test]
    fn a_template_ends_with_the_thread_that_builds_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::process::geteuid().is_root();
        let path = dir.path().to_owned();
        let start = move |purpose| {
            let spawned = sleep_in(&path, root, purpose);
            let process = spawned.process.clone();
            // As after a crash: nobody is there to end it.
            std::mem::forget(spawned);
            process
        };
        let builder = start.clone();
        let template = std::thread::spawn(move || builder(Purpose::Template)).join().unwrap();
        let fork = std::thread::spawn(move || start(Purpose::Fork)).join().unwrap();
        if let Some(fd) = template.pidfd().unwrap() {
            assert!(crate::process::wait_gone(&fd, Duration::from_secs(10)).unwrap());
        }
        assert!(fork.is_alive());
        fork.kill(Duration::from_secs(10)).unwrap();
    }
}
