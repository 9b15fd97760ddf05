//! Which network forks have, on the host's side: what may be asked for, what is noted of it, and how it is found again.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use engine::ProcessRef;
use identity::ForkId;
use net::{DEFAULT_PAUSE, LinkError, Network, Policy, UserProcess};
use serde::{Deserialize, Serialize};

pub use net::Mode;

use crate::{
    home::Home,
    record::{self, ForkRecord},
};

/// How long a fork's network ack is awaited when the caller does not say, from the moment its identity was acknowledged.
pub const DEFAULT_NETWORK_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time a caller may ask for: as long as the guest goes on sending it.
pub const MAX_NETWORK_TIMEOUT: Duration = Duration::from_secs(30);

/// Time, after a network's deadline, for what was found to be noted: opening a link takes milliseconds, on a busy host more.
const SETTLING: Duration = Duration::from_secs(5);
/// Time for a killed program to be gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What becomes of a fork whose network is not acknowledged in time, where nobody waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// It is destroyed.
    #[default]
    Kill,
    /// It lives on, with its network closed.
    Keep,
}

/// What a caller asks of a fork's network.
#[derive(Debug, Clone, Default)]
pub struct NetworkRequest {
    /// What the card leads to; without it, [`Mode::default_here`] if the template has a card.
    pub mode: Option<Mode>,
    /// What may pass.
    pub policy: Policy,
    /// DNS servers; without it, the host's.
    pub dns: Option<Vec<IpAddr>>,
    /// How long the ack is awaited; zero is [`DEFAULT_NETWORK_TIMEOUT`].
    pub timeout: Duration,
    /// Whether the fork counts as made before its network is acknowledged.
    pub later: Option<Later>,
}

/// A fork counts as made before its network is acknowledged.
#[derive(Debug, Clone)]
pub struct Later {
    /// What becomes of it if that does not happen in time.
    pub on_failure: OnFailure,
    /// The program that waits for it, in a process of its own: `PROGRAM observe-network`, which calls
    /// [`observe`](crate::handoff::network::observer::observe) with what it reads.
    pub program: PathBuf,
}

impl NetworkRequest {
    /// How long the ack is awaited.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        if self.timeout.is_zero() { DEFAULT_NETWORK_TIMEOUT } else { self.timeout }
    }
}

/// How far a fork's network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkState {
    /// It is acknowledged, and open.
    Acknowledged,
    /// It is not acknowledged yet; somebody waits for it. Nothing passes.
    Waiting,
    /// It was not acknowledged in time. Nothing passes.
    Failed,
}

/// How a fork's network came to be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// On its ack port: the network `user` has no other way.
    Channel,
    /// By the fork's own datagram.
    Datagram,
    /// As one of these, after the host had its network configured again over the control channel.
    Reconfigured,
    /// By its datagram, after commands in the guest.
    Commands,
}

/// How long a network is waited for after its fork was made. It is noted with the fork, so that it holds whatever becomes of the one who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// Until then, in milliseconds since the host's boot.
    pub deadline_ms: u64,
    /// What becomes of the fork if it is not acknowledged by then.
    pub on_failure: OnFailure,
}

impl Wait {
    /// From now on.
    pub(crate) fn of(limit: Duration, on_failure: OnFailure) -> Self {
        Self { deadline_ms: millis(net::since_boot() + limit), on_failure }
    }

    /// How much of it is left.
    pub(crate) fn left(self) -> Duration {
        Duration::from_millis(self.deadline_ms).saturating_sub(net::since_boot())
    }

    /// Whether an ack that is taken now may still open the link: it may have come in time while its fork was helped, or while this process had no
    /// processor, but nobody who looks has said yet that it did not.
    pub(crate) fn may_open(self) -> bool {
        net::since_boot() < Duration::from_millis(self.deadline_ms) + SETTLING / 5
    }

    /// Whether whoever waited would have said by now what it found.
    fn is_over(self) -> bool {
        net::since_boot() >= Duration::from_millis(self.deadline_ms) + SETTLING
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What is known of a fork's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// What the card leads to.
    pub mode: Mode,
    /// The card's address.
    pub mac: String,
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// IPv4 gateway.
    pub gateway: Option<Ipv4Addr>,
    /// DNS servers.
    pub dns: Vec<IpAddr>,
    /// What may pass.
    pub policy: Policy,
    /// How far it is.
    pub state: NetworkState,
    /// How it came to be acknowledged.
    pub way: Option<Way>,
    /// From the resume to the fork's own datagram, in microseconds.
    pub acked_micros: Option<u64>,
    /// What went wrong on the way there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub troubles: Vec<String>,
    /// How long it is waited for beside the fork, and what comes then; none if the fork was made when it was acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Wait>,
    /// The program that it is connected by, in mode `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<UserProcess>,
}

/// What became of a network that was not acknowledged yet when its fork was made. It is a file of its own: the record of a fork does not
/// change.
const OUTCOME: &str = "network.json";

/// What whoever waited for a fork's network found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// How far it is.
    pub state: NetworkState,
    /// How it came to be acknowledged.
    pub way: Option<Way>,
    /// What went wrong on the way there.
    pub troubles: Vec<String>,
}

impl Outcome {
    /// Notes it in a fork's directory.
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        record::write_json(dir, OUTCOME, self)
    }
}

/// A fork's network as it is now: its record, and what was found since that was written. `dir` is the fork's.
#[must_use]
pub fn now(record: &ForkRecord, dir: &Path) -> Option<NetworkReport> {
    let mut report = record.network.clone()?;
    if report.state != NetworkState::Waiting {
        return Some(report);
    }
    // Looked at first: what is found until then is noted by then.
    let over = report.wait.is_some_and(Wait::is_over);
    match record::read_json(&dir.join(OUTCOME)) {
        Ok(Outcome { state, way, troubles }) => {
            (report.state, report.way) = (state, way);
            report.troubles.extend(troubles);
        }
        Err(_) if over => {
            report.state = NetworkState::Failed;
            report.troubles.push("who waited for it ended before it was acknowledged".into());
        }
        Err(_) => {}
    }
    Some(report)
}

/// Whether a fork is to be ended because its network was not acknowledged in time. Whoever waited for it does so, unless it has ended itself.
pub(crate) fn is_to_be_ended(record: &ForkRecord, dir: &Path) -> bool {
    let kills = |wait: Wait| wait.on_failure == OnFailure::Kill;
    // Of nearly all forks the record says already that they are not.
    record.network.as_ref().and_then(|network| network.wait).is_some_and(kills)
        && now(record, dir).is_some_and(|network| network.state == NetworkState::Failed)
}

/// The network of this host, for forks of this home.
///
/// # Errors
/// [`LinkError`].
pub fn open(home: &Home) -> Result<Network, LinkError> {
    Ok(Network::open(&home.network, home.pool, DEFAULT_PAUSE)?.for_home(&home.state))
}

/// The same, if there ever was one: looking for it makes nothing.
pub(crate) fn existing(home: &Home) -> Result<Option<Network>, LinkError> {
    if home.network.is_dir() { open(home).map(Some) } else { Ok(None) }
}

/// Removes what a fork had. That it had nothing is fine.
pub(crate) fn remove(home: &Home, id: &ForkId) -> io::Result<()> {
    let remove = || existing(home)?.map_or(Ok(()), |network| network.remove(id));
    remove().map_err(io::Error::other)
}

/// Ends the network of a fork whose machine is gone.
pub(crate) fn end(home: &Home, record: &ForkRecord) -> io::Result<()> {
    match &record.network {
        Some(NetworkReport { mode: Mode::Tap, .. }) => remove(home, &record.id),
        // It ends with the machine; it may not have noticed yet.
        Some(NetworkReport { process: Some(process), .. }) => end_user(process),
        _ => Ok(()),
    }
}

/// Ends the program of a fork in mode `user`; that it has ended is fine.
pub(crate) fn end_user(process: &UserProcess) -> io::Result<()> {
    match ProcessRef::of(process.pid) {
        Ok(found) if found.start_time == process.start_time => found.kill(END_LIMIT),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A fork whose network is waited for, for so many milliseconds more (or less) than until now.
    pub(crate) fn waited_for(left_ms: i64, on_failure: OnFailure) -> ForkRecord {
        let now = i64::try_from(net::since_boot().as_millis()).unwrap();
        let wait = json!({ "deadline_ms": (now + left_ms).max(0), "on_failure": on_failure });
        serde_json::from_value(json!({
            "format": 1, "id": "a".repeat(20), "name": "web", "hostname": "web", "template": "t", "template_id": "t",
            "engine": { "name": "qemu", "version": "9", "accel": "tcg" },
            "process": ProcessRef::of(std::process::id()).unwrap(),
            "created_ms": 0, "machine_id": "", "boot_id": "", "labels": {}, "env": [], "secrets": [], "files": [], "mailboxes": [],
            "network": {
                "mode": "tap", "mac": "02:6f:00:00:00:01", "ipv4": null, "ipv6": null, "gateway": null, "dns": [],
                "policy": Policy::default(), "state": "waiting", "way": null, "acked_micros": null, "wait": wait,
            },
            "limits": {}, "cgroups": [], "acked_micros": 0, "host_steps": [], "guest_steps": [],
        }))
        .unwrap()
    }

    #[test]
    fn i7_a_network_whose_observer_is_gone_has_failed_after_the_deadline_and_the_policy_holds() {
        let dir = tempfile::tempdir().unwrap();
        let settling = i64::try_from(SETTLING.as_millis()).unwrap();
        let state = |record: &ForkRecord| now(record, dir.path()).unwrap().state;
        for on_failure in [OnFailure::Kill, OnFailure::Keep] {
            let waiting = waited_for(20_000, on_failure);
            assert_eq!((state(&waiting), is_to_be_ended(&waiting, dir.path())), (NetworkState::Waiting, false));
            // It may be noting right now what it found at the last moment.
            let late = waited_for(-1, on_failure);
            assert_eq!(state(&late), NetworkState::Waiting);
            let may_open = |record: &ForkRecord| record.network.as_ref().unwrap().wait.unwrap().may_open();
            assert!(may_open(&waiting) && may_open(&late) && !may_open(&waited_for(-settling / 2, on_failure)));
            let over = waited_for(-settling - 1, on_failure);
            assert_eq!(state(&over), NetworkState::Failed);
            assert_eq!(is_to_be_ended(&over, dir.path()), on_failure == OnFailure::Kill);
            assert!(now(&over, dir.path()).unwrap().troubles[0].contains("who waited for it"));
        }
        // What was found counts, however late it is asked for.
        let over = waited_for(-settling - 1, OnFailure::Kill);
        let outcome = |state| Outcome { state, way: None, troubles: Vec::new() };
        outcome(NetworkState::Acknowledged).write(dir.path()).unwrap();
        assert_eq!((state(&over), is_to_be_ended(&over, dir.path())), (NetworkState::Acknowledged, false));
        outcome(NetworkState::Failed).write(dir.path()).unwrap();
        assert!(is_to_be_ended(&waited_for(20_000, OnFailure::Kill), dir.path()), "it failed before its time was up");
    }
}
