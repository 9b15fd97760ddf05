//! The audit of a template at its capture: what its frozen processes have that all forks would share, or that no fork has (docs/audit.md).
//!
//! ```text
//! processes ─┬─ exposed ──── secrets   environments and command lines
//!            ├─ connections            sockets with an end outside, or with an address that goes
//!            ├─ random                 generators that nobody reseeds
//!            └─ files                  open files that an identity replaces
//! ```
//!
//! Everything that is read here is the workload's to choose: it is bounded, and so is the time. A process can make reading its memory take forever
//! (`userfaultfd`), so that is done by a thread of its own; if it does not come back, there is no capture.
#![forbid(unsafe_code)]

mod connections;
mod exposed;
mod files;
mod findings;
mod processes;
mod random;
mod secrets;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::PathBuf,
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

pub(crate) use self::findings::{Finding, Findings, Kind};
use self::{
    connections::Ending,
    processes::{Place, Process},
    random::Told,
};
use crate::service::OnFork;

/// What an audit looks at.
#[derive(Debug)]
pub(super) struct Audit {
    /// The workload's cgroup, frozen.
    pub(super) group: PathBuf,
    /// What the recipe wants done for its services.
    pub(super) on_fork: BTreeMap<String, OnFork>,
    /// Processes that have memory which is wiped when they are copied.
    pub(super) notice_copies: BTreeSet<u32>,
    /// Addresses whose connections the capture does not end; `None` where it ends none.
    pub(super) staying: Option<BTreeSet<IpAddr>>,
}

impl Audit {
    /// Looks at everything, until the deadline: what was not looked at then is a finding.
    ///
    /// # Errors
    /// `TimedOut` if a process can not be read at all.
    pub(super) fn run(self, deadline: Instant) -> io::Result<Findings> {
        let (done, result) = channel();
        thread::Builder::new().name("audit".into()).spawn(move || {
            let _ = done.send(self.look(deadline));
        })?;
        // A little later than it stops by itself.
        let limit = deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(2);
        result.recv_timeout(limit).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                io::Error::new(io::ErrorKind::TimedOut, "a process of the workload lets nobody read its memory")
            }
            RecvTimeoutError::Disconnected => io::Error::other("the audit broke off"),
        })
    }

    fn look(&self, deadline: Instant) -> Findings {
        let mut findings = Findings::default();
        let (processes, mut complete) = processes::all(&self.group);
        let mut owners = BTreeMap::new();
        for (index, process) in processes.iter().enumerate() {
            if Instant::now() >= deadline {
                complete = false;
                break;
            }
            let open = process.descriptors();
            for &inode in &open.sockets {
                owners.entry(inode).or_insert(index);
            }
            self.look_at(process, &open, &mut findings);
        }
        let ending = Ending { namespace: fs::read_link("/proc/self/ns/net").ok(), staying: self.staying.clone() };
        connections::look(&processes, &owners, &ending, |process| self.is_restarted(process), &mut findings);
        if !complete {
            findings.about_no_process(
                Kind::AuditIncomplete,
                "not all processes of the template could be looked at: there are too many, or there was not enough time",
                "build it with fewer processes, or on a machine with less to do",
            );
        }
        findings
    }

    fn look_at(&self, process: &Process, open: &processes::Descriptors, findings: &mut Findings) {
        // In the template's memory they are whatever becomes of the process.
        exposed::look(process, findings);
        if self.is_restarted(process) {
            return;
        }
        let mapped = process.mapped();
        files::look(process, open, &mapped, findings);
        let Some(told) = self.told(process) else { return };
        let program = process.program().unwrap_or_default();
        files::look_for_ssh(process, &program, told == Told::Signal, findings);
        let notices = self.notice_copies.contains(&process.pid);
        random::look(process, &mapped, &program, told, notices, findings);
    }

    fn is_restarted(&self, process: &Process) -> bool {
        matches!(&process.place, Place::Service(name) if matches!(self.on_fork.get(name), Some(OnFork::Restart)))
    }

    /// What a process is told in a fork, if that leaves its randomness as it is. The runtime's bridge sees to it, and a hook is there to.
    fn told(&self, process: &Process) -> Option<Told> {
        match &process.place {
            Place::Runtime => None,
            Place::Elsewhere => Some(Told::Nothing),
            Place::Service(name) => match self.on_fork.get(name) {
                Some(OnFork::Restart | OnFork::Hook { .. } | OnFork::Event) => None,
                Some(OnFork::Signal(..)) => Some(Told::Signal),
                Some(OnFork::Keep) | None => Some(Told::Nothing),
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A process of a service with what an audit finds, in a folder like a cgroup.
    struct Workload {
        group: PathBuf,
        child: std::process::Child,
    }

    impl Workload {
        fn start(test: &str, command: &mut Command) -> Self {
            let group = std::env::temp_dir().join(format!("offshoot-audit-{test}-{}", std::process::id()));
            let service = group.join("service-web");
            fs::create_dir_all(&service).unwrap();
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            // It has executed its program, and what it has to do is done, once it has written something.
            io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            fs::write(service.join("cgroup.procs"), format!("{}\n", child.id())).unwrap();
            Self { group, child }
        }

        fn audit(&self, on_fork: OnFork) -> Vec<Finding> {
            let audit = Audit {
                group: self.group.clone(),
                on_fork: BTreeMap::from([("web".to_owned(), on_fork)]),
                notice_copies: BTreeSet::new(),
                staying: None,
            };
            audit.run(Instant::now() + Duration::from_secs(20)).unwrap().finish().0
        }
    }

    impl Drop for Workload {
        fn drop(&mut self) {
            let _ = (self.child.kill(), self.child.wait(), fs::remove_dir_all(&self.group));
        }
    }

    #[test]
    fn i17_a_process_is_named_with_what_it_has_and_no_value_is() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exec 7</etc/hostname; echo; read line", "sh", "--password=hunter2"]);
        command.env_clear().env("API_TOKEN", "hunter2").env("PATH", "/bin");
        let workload = Workload::start("named", &mut command);
        let found = workload.audit(OnFork::Keep);
        let kinds: Vec<_> = found.iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [Kind::SecretInEnvironment, Kind::SecretInArguments, Kind::IdentityFileOpen], "{found:?}");
        for finding in &found {
            let owner = finding.process.as_ref().unwrap();
            assert_eq!(
                (owner.pid, owner.name.as_str(), owner.service.as_deref()),
                (workload.child.id(), "sh", Some("web"))
            );
            assert!(!format!("{finding:?}").contains("hunter2") && !finding.cure.is_empty());
        }
        // What is restarted is rid of its files, and not of its secrets.
        let kinds: Vec<_> = workload.audit(OnFork::Restart).into_iter().map(|finding| finding.kind).collect();
        assert_eq!(kinds, [Kind::SecretInEnvironment, Kind::SecretInArguments]);
    }

    #[test]
    fn i17_a_process_with_nothing_of_that_has_no_finding() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo; read line"]).env_clear().env("PATH", "/bin");
        let workload = Workload::start("clean", &mut command);
        assert_eq!(workload.audit(OnFork::Keep), []);
    }

    #[test]
    fn i17_what_was_not_looked_at_is_a_finding() {
        let audit = Audit {
            group: "/no/such/group".into(),
            on_fork: BTreeMap::new(),
            notice_copies: BTreeSet::new(),
            staying: None,
        };
        assert!(audit.look(Instant::now()).finish().0.is_empty(), "there was nothing to look at");
        let mut command = Command::new("/bin/sh");
        let workload = Workload::start("late", command.args(["-c", "echo; read line"]).env_clear());
        let audit = Audit { group: workload.group.clone(), ..audit };
        let found = audit.look(Instant::now()).finish().0;
        assert_eq!(found.iter().map(|finding| finding.kind).collect::<Vec<_>>(), [Kind::AuditIncomplete]);
    }
}
