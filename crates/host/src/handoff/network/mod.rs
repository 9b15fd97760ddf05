//! The handoff of who a fork is on the wire.
//!
//! ```text
//! prepare: what its card is connected to
//! letters: the network section goes with the identity
//! after_resume:
//!   "network-pending" on the ack port ─► ReconfigureNetwork over the control channel; in vain: the fork is destroyed
//!   "applied" on the ack port         ─► packets pass
//! ```
//!
//! By [tap](tap) the fork also has to answer over the wire itself.

mod commands;
pub mod observer;
mod tap;
mod user;

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use identity::{ForkId, Inet, Network as Section, NetworkError as SectionError, Tag};
use net::{ACK_PORT, Addresses, GATEWAY_MAC, LinkError, MTU, UserAddresses, UserError};
use thiserror::Error;

pub(crate) use self::{
    tap::{TAP, TapHandoff},
    user::UserHandoff,
};
use super::Arrival;
use crate::{
    guest::{GuestChannel, GuestError},
    network::Mode,
};

/// Time for the guest to configure its network again.
const RECONFIGURE_LIMIT: Duration = Duration::from_secs(5);
/// How often a fork that could not apply its network is asked to do it again.
const RECONFIGURE_TRIES: usize = 3;

/// Why a fork's network is not as it was asked for.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The template was made without a card.
    #[error(
        "template {0} has no network card, so its forks can have no network; build it again with this offshoot, or leave --network out"
    )]
    NoCard(Tag),
    /// Something that a fork without a network can not have.
    #[error("{option} has no meaning with --network {mode}")]
    NoMeaning {
        /// What was asked for.
        option: &'static str,
        /// The network it was asked with.
        mode: Mode,
    },
    /// One port of the host for several forks.
    #[error(
        "a port of the host leads to one fork only; make the {0} forks one by one, each with a --publish of its own"
    )]
    OnePortManyForks(usize),
    /// The host's side, by tap.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The host's side, without privileges.
    #[error(transparent)]
    User(#[from] UserError),
    /// What would be told to the guest is not valid.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// No ack, whichever way was tried.
    #[error(
        "the fork's network was not acknowledged within {} ms after its identity{}", limit.as_millis(), troubles_text(troubles)
    )]
    NoAck {
        /// The deadline.
        limit: Duration,
        /// What was tried and what became of it.
        troubles: Vec<String>,
    },
    /// The guest could not do it, and could not be helped.
    #[error("the fork could not configure its network: {0}")]
    Refused(String),
}

fn troubles_text(troubles: &[String]) -> String {
    if troubles.is_empty() { String::new() } else { format!(" ({})", troubles.join("; ")) }
}

/// What was tried for a fork's network, for reports.
#[derive(Debug, Default)]
struct Troubles(Vec<String>);

impl Troubles {
    fn note(&mut self, why: &str, what: &str, done: &Result<(), GuestError>) {
        let end = done.as_ref().map_or_else(|error| format!("failed: {error}"), |()| "done".into());
        self.0.push(format!("{why}; {what}: {end}"));
    }

    /// Has the fork configure its network again, until `deadline` at the latest.
    fn reconfigure(&mut self, dir: &Path, id: &ForkId, section: &Section, why: &str, deadline: Instant) -> bool {
        let done = in_guest(deadline, async {
            let mut guest = GuestChannel::connect(dir, RECONFIGURE_LIMIT).await?;
            guest.reconfigure_network(id, section.to_bytes(), RECONFIGURE_LIMIT).await
        });
        let done = done.map(drop);
        self.note(why, "ReconfigureNetwork", &done);
        done.is_ok()
    }

    /// Has a fork that waits for its network configure it again, a few times, until `deadline` at the latest.
    fn help(
        &mut self,
        arrival: &Arrival<'_>,
        section: &Section,
        why: &str,
        deadline: Instant,
    ) -> Result<(), NetworkError> {
        for _ in 0..RECONFIGURE_TRIES {
            if self.reconfigure(arrival.dir, arrival.id, section, why, deadline) {
                return Ok(());
            }
        }
        Err(NetworkError::Refused(self.0.join("; ")))
    }
}

/// Runs what talks to a guest, on a thread that has no runtime, and gives it up at `deadline`: each step of it has a limit of its own, and a guest
/// that answers none of them would make many of these.
fn in_guest<T>(deadline: Instant, future: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
    let limit = deadline.saturating_duration_since(Instant::now());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let limited = async { tokio::time::timeout(limit, future).await.unwrap_or(Err(GuestError::Timeout(limit))) };
    let done = runtime.block_on(limited);
    // What it left undone is not waited for.
    runtime.shutdown_background();
    done
}

/// What a fork by tap is told.
pub(crate) fn tap_section(addresses: &Addresses, dns: &[IpAddr]) -> Result<Section, NetworkError> {
    let addresses = UserAddresses {
        mac: addresses.mac,
        gateway_mac: GATEWAY_MAC,
        v4: Some((addresses.v4, addresses.gateway_v4)),
        v6: addresses.v6.zip(addresses.gateway_v6),
    };
    let ack = addresses.v4.map(|(_, gateway)| (gateway, ACK_PORT).into());
    section(&addresses, dns, ack)
}

/// What a fork is told.
pub(crate) fn section(
    addresses: &UserAddresses,
    dns: &[IpAddr],
    ack: Option<SocketAddr>,
) -> Result<Section, NetworkError> {
    let section = Section {
        mac: addresses.mac,
        mtu: MTU,
        ipv4: addresses.v4.map(|(address, gateway)| Inet { address, prefix: 32, gateway: Some(gateway) }),
        ipv6: addresses.v6.map(|(address, gateway)| Inet { address, prefix: 128, gateway: Some(gateway) }),
        gateway_mac: Some(addresses.gateway_mac),
        dns: dns.to_vec(),
        search: Vec::new(),
        ack,
    };
    section.check()?;
    Ok(section)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn f9_a_guest_that_does_not_answer_holds_nobody_longer_than_the_deadline() {
        let started = Instant::now();
        let limit = Duration::from_millis(100);
        let silent = std::future::pending::<Result<(), GuestError>>();
        assert!(matches!(in_guest(started + limit, silent), Err(GuestError::Timeout(_))));
        // Its channels are there, and all are taken.
        let dir = tempfile::tempdir().unwrap();
        let id = ForkId::parse(&"a".repeat(20)).unwrap();
        let section = section(&UserAddresses::of(&id), &[], None).unwrap();
        let held: Vec<_> = std::iter::from_fn(|| crate::guest::free_channel(dir.path()).unwrap()).collect();
        let mut troubles = Troubles::default();
        for _ in 0..RECONFIGURE_TRIES {
            assert!(!troubles.reconfigure(dir.path(), &id, &section, "a test", started + 2 * limit));
        }
        assert!(commands::run(dir.path(), &section, started + 3 * limit).is_err());
        assert!(started.elapsed() < RECONFIGURE_LIMIT, "{:?}: {troubles:?}", started.elapsed());
        drop(held);
    }
}
