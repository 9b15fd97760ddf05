//! Waiting for the network of a fork that is published already, in a process of its own.
//!
//! It is started before the fork is published and told the fork's key then, through a pipe: if the fork is not made, the pipe ends and so does
//! it. It waits no longer than it was told to, which the fork's record says as well: should it end before, the network has failed when that time is
//! up, and the next command that needs the fork, or `cleanup`, does what is to be done then. What it found is in the fork's directory; a fork that is killed
//! meanwhile ends it.

use std::{
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use identity::{AckKey, ForkId, MailboxName, Network as Section};
use net::AckSocket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    NetworkError, Troubles, commands,
    tap::{NEXT_WAY, answer},
    tap_section,
};
use crate::{
    acks::Waiter,
    forks,
    home::Home,
    network::{self, NetworkState, OnFailure, Outcome, Wait, Way},
    operation::Operation,
    record::{self, ForkRecord},
};

/// The verb of the program that observes.
pub const VERB: &str = "observe-network";
/// What it may know of its starter's environment, which may hold secrets.
const VARIABLES: [&str; 10] = [
    "HOME",
    "OFFSHOOT_DATA_DIR",
    "OFFSHOOT_STATE_DIR",
    "OFFSHOOT_CACHE_DIR",
    "OFFSHOOT_NETWORK_DIR",
    "OFFSHOOT_NETWORK_POOL",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "XDG_CACHE_HOME",
    "PATH",
];
/// Longest task, in bytes.
const MAX_TASK: u64 = 4096;
/// How often it is looked whether the fork is still there.
const LOOK: Duration = Duration::from_secs(1);

/// What an observer is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    id: ForkId,
    /// The identity mailbox's key.
    key: AckKey,
    wait: Wait,
}

impl Task {
    pub(super) fn new(id: &ForkId, key: &AckKey, wait: Wait) -> Self {
        Self { id: id.clone(), key: key.clone(), wait }
    }

    /// Reads a task; none if the fork was not made after all.
    ///
    /// # Errors
    /// It can not be read, or is none.
    pub fn read(from: impl Read) -> io::Result<Option<Self>> {
        let mut text = Zeroizing::new(Vec::new());
        from.take(MAX_TASK).read_to_end(&mut text)?;
        if text.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_slice(&text)?)) }
    }
}

/// An observer that waits for its task.
#[derive(Debug)]
pub(super) struct Observer {
    child: Child,
    task: Task,
}

impl Observer {
    pub(super) fn start(program: &Path, task: Task) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.arg(VERB).env_clear().current_dir("/");
        command.envs(VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // Out of this terminal's reach: the keys that interrupt a command are not meant for it.
        command.process_group(0);
        Ok(Self { child: command.spawn()?, task })
    }

    /// Gives it its task. That it is gone already is seen by the fork's state, which stays as it is.
    pub(super) fn go_on(mut self) {
        let Some(mut pipe) = self.child.stdin.take() else { return };
        if let Ok(text) = serde_json::to_vec(&self.task).map(Zeroizing::new) {
            let _ = pipe.write_all(&text);
        }
        drop(pipe);
        engine::process::leave(self.child);
    }
}

/// Waits for a fork's network, and does what is to be done then.
///
/// # Errors
/// [`NetworkError`] if nothing could be found out; the fork's state says then what was known before.
pub fn observe(home: &Home, task: &Task) -> Result<(), NetworkError> {
    let failed = |source| net::LinkError::Step { doing: "waiting for acknowledgements", source };
    let network = network::open(home)?;
    // Nobody may be kept from ending the fork, so the link is held no longer than it takes to get the socket.
    let link = network.adopt(&task.id)?;
    let (socket, addresses) = (link.ack_socket(), link.record().addresses);
    let _ = link.keep();
    let Ok(Some(fork)) = record::find(home, task.id.as_str()) else { return Ok(()) };
    let dns = fork.network.as_ref().map(|network| network.dns.clone()).unwrap_or_default();
    let (socket, section) = (socket?, tap_section(&addresses, &dns)?);
    let mut observation = Observation::new(home, &fork, &socket, &section, task);
    let outcome = match observation.wait().map_err(failed)? {
        End::Gone => {
            note_end(&forks::dir(home, &fork), observation.troubles.0);
            return Ok(());
        }
        // The host may have slept meanwhile.
        End::Acked(_) if !task.wait.may_open() => (NetworkState::Failed, None),
        End::Acked(way) => match network.adopt(&task.id).and_then(|link| link.open(policy(&fork))) {
            Ok(link) => {
                let _ = link.keep();
                (NetworkState::Acknowledged, Some(way))
            }
            Err(error) => {
                observation.troubles.0.push(format!("the link could not be opened: {error}"));
                (NetworkState::Failed, Some(way))
            }
        },
        End::Late => (NetworkState::Failed, None),
    };
    let outcome = Outcome { state: outcome.0, way: outcome.1, troubles: observation.troubles.0 };
    let noted = outcome.write(&forks::dir(home, &fork));
    if outcome.state == NetworkState::Failed && task.wait.on_failure == OnFailure::Kill {
        // What can not be ended is found by `cleanup`.
        let _ = forks::kill(home, &fork);
        return Ok(());
    }
    Ok(noted.map_err(failed)?)
}

/// Of a fork whose machine has ended the network has failed. One that somebody is ending has no record for long.
fn note_end(dir: &Path, mut troubles: Vec<String>) {
    let Ok(Some(_operation)) = Operation::begin(dir, false) else { return };
    if record::read(dir).is_ok() {
        troubles.push("the fork's machine ended before it was acknowledged".into());
        // What can not be noted is known when the time is up.
        let _ = Outcome { state: NetworkState::Failed, way: None, troubles }.write(dir);
    }
}

fn policy(fork: &ForkRecord) -> net::Policy {
    fork.network.as_ref().map(|network| network.policy.clone()).unwrap_or_default()
}

enum End {
    /// The fork's machine has ended.
    Gone,
    Acked(Way),
    Late,
}

struct Observation<'a> {
    home: &'a Home,
    fork: &'a ForkRecord,
    socket: &'a AckSocket,
    section: &'a Section,
    waiter: Waiter,
    key: AckKey,
    limit: Wait,
    troubles: Troubles,
}

impl<'a> Observation<'a> {
    fn new(home: &'a Home, fork: &'a ForkRecord, socket: &'a AckSocket, section: &'a Section, task: &Task) -> Self {
        let key = task.key.clone();
        let keys = [(MailboxName::identity(), key.clone())].into();
        Self {
            home,
            fork,
            socket,
            section,
            waiter: Waiter::new(fork.id.clone(), keys),
            key,
            limit: task.wait,
            troubles: Troubles::default(),
        }
    }

    fn wait(&mut self) -> io::Result<End> {
        let mut ways = [Way::Reconfigured, Way::Commands].into_iter();
        let (mut way, mut next) = (Way::Datagram, Instant::now() + NEXT_WAY);
        loop {
            for datagram in self.socket.take()? {
                let Some(ack) = self.waiter.check(&datagram.bytes) else { continue };
                if let Some(answer) = answer(&ack, &datagram.bytes, Some(&self.key)) {
                    let _ = self.socket.confirm(&datagram, answer.as_bytes());
                    return Ok(End::Acked(way));
                }
            }
            if !self.fork.process.is_alive() {
                return Ok(End::Gone);
            }
            if self.limit.left().is_zero() {
                return Ok(End::Late);
            }
            if Instant::now() >= next {
                if let Some(another) = ways.next() {
                    way = another;
                    self.help(way);
                }
                next = Instant::now() + NEXT_WAY;
            }
            let left = self.limit.left().min(next.saturating_duration_since(Instant::now())).min(LOOK);
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn help(&mut self, way: Way) {
        let (dir, why) = (forks::dir(self.home, self.fork), "no ack came over the network");
        let deadline = Instant::now() + self.limit.left();
        match way {
            Way::Commands => self.troubles.note(why, "ip", &commands::run(&dir, self.section, deadline)),
            _ => drop(self.troubles.reconfigure(&dir, &self.fork.id, self.section, why, deadline)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_task_survives_its_pipe_and_shows_nothing() {
        let (id, key) = (ForkId::parse(&"a".repeat(20)).unwrap(), AckKey::new([0xab; 32]));
        let task = Task::new(&id, &key, Wait::of(Duration::from_secs(3), OnFailure::Keep));
        assert!(!format!("{task:?}").contains("abab"));
        let text = serde_json::to_vec(&task).unwrap();
        let read = Task::read(text.as_slice()).unwrap().unwrap();
        assert_eq!((read.key.expose(), read.wait), (key.expose(), task.wait));
        assert!(Task::read(&b""[..]).unwrap().is_none(), "the fork was not made");
        for bad in [&b"{"[..], b"{}", &text[..text.len() - 1]] {
            assert!(Task::read(bad).is_err());
        }
    }

    #[test]
    fn a_machine_that_ended_is_noted_unless_somebody_is_ending_the_fork() {
        let dir = tempfile::tempdir().unwrap();
        let outcome = || record::read_json::<Outcome>(&dir.path().join("network.json"));
        note_end(&dir.path().join("gone"), Vec::new());
        note_end(dir.path(), Vec::new());
        assert!(outcome().is_err(), "there is no record");
        record::write_json(dir.path(), record::RECORD, &network::tests::waited_for(1, OnFailure::Kill)).unwrap();
        let ending = Operation::begin(dir.path(), false).unwrap();
        note_end(dir.path(), Vec::new());
        assert!(outcome().is_err(), "somebody is ending it");
        drop(ending);
        note_end(dir.path(), vec!["first".into()]);
        let outcome = outcome().unwrap();
        assert_eq!((outcome.state, outcome.troubles.len()), (NetworkState::Failed, 2));
    }
}
