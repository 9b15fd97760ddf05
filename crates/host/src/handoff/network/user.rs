//! Without privileges: a program of the caller's that the card is connected to, and that is started when the fork says that it is itself.
//! What the guest sends before that stays in a socket.

use std::{os::fd::OwnedFd, time::Instant};

use identity::{MailboxName, Network as Section};
use net::{Dns, Reach, RunAs, UserAddresses, UserLink, UserProcess};

use super::{NetworkError, Troubles, section};
use crate::{
    fork::ForkError,
    handoff::{Arrival, Draft, End, Handoff},
    network::{Mode, NetworkReport, NetworkRequest, NetworkState, Way, end_user},
    record::ForkRecord,
};

/// A fork's network by passt.
#[derive(Debug)]
pub(crate) struct UserHandoff<'a> {
    request: &'a NetworkRequest,
    link: Option<UserLink>,
    machine: Option<OwnedFd>,
    addresses: Option<UserAddresses>,
    section: Option<Section>,
    process: Option<UserProcess>,
    way: Way,
    acked_micros: Option<u64>,
    troubles: Troubles,
}

impl<'a> UserHandoff<'a> {
    pub(crate) fn new(request: &'a NetworkRequest) -> Self {
        Self {
            request,
            link: None,
            machine: None,
            addresses: None,
            section: None,
            process: None,
            way: Way::Channel,
            acked_micros: None,
            troubles: Troubles::default(),
        }
    }
}

impl<'a> Handoff<'a> for UserHandoff<'a> {
    fn name(&self) -> &'static str {
        "network"
    }

    fn prepare(&mut self, draft: &mut Draft) -> Result<(), ForkError> {
        let addresses = UserAddresses::of(&draft.id);
        let (v4, v6) = (addresses.v4.is_some(), addresses.v6.is_some());
        let reach = Reach { mode: Mode::User, egress: &self.request.policy.egress, v4, v6 };
        let dns = Dns::of(reach, self.request.dns.as_deref().unwrap_or_default());
        self.troubles.0.extend(dns.warning());
        let section = section(&addresses, &dns.servers, None)?;
        let (link, machine) = UserLink::new(addresses).map_err(NetworkError::from)?;
        (self.link, self.machine, self.addresses) = (Some(link), Some(machine), Some(addresses));
        draft.network = Some(section.clone());
        self.section = Some(section);
        Ok(())
    }

    fn end(&mut self) -> Result<Option<End>, ForkError> {
        Ok(self.machine.take().map(End::Stream))
    }

    fn after_resume(&mut self, arrival: &mut Arrival<'_>) -> Result<(), ForkError> {
        let resumed = Instant::now();
        while arrival.waiter.received(&MailboxName::identity()).is_none() {
            if let (Some(reason), Some(section)) = (arrival.waiter.take_network_pending(), &self.section) {
                self.way = Way::Reconfigured;
                self.troubles.help(arrival, section, &reason, Instant::now() + self.request.timeout())?;
            }
            arrival.waiter.wait(arrival.stream, None, None)?;
        }
        self.acked_micros = u64::try_from(resumed.elapsed().as_micros()).ok();
        if let Some(link) = self.link.take() {
            let process = link.start(&self.request.policy, RunAs::default()).map_err(NetworkError::from)?;
            self.process = Some(process);
            arrival.connected = Some(Instant::now());
        }
        Ok(())
    }

    fn keep(&mut self, record: &mut ForkRecord) {
        let Some(addresses) = self.addresses.take() else { return };
        record.network = Some(NetworkReport {
            mode: Mode::User,
            mac: addresses.mac.to_string(),
            ipv4: addresses.v4.map(|(address, _)| address),
            ipv6: addresses.v6.map(|(address, _)| address),
            gateway: addresses.v4.map(|(_, gateway)| gateway),
            dns: self.section.take().map(|section| section.dns).unwrap_or_default(),
            policy: self.request.policy.clone(),
            state: NetworkState::Acknowledged,
            way: Some(self.way),
            acked_micros: self.acked_micros,
            troubles: std::mem::take(&mut self.troubles.0),
            wait: None,
            process: self.process,
        });
    }

    fn close(&mut self) {
        // The machine's end is gone by now, and with it the process' reason to be.
        if let Some(process) = self.process.take() {
            let _ = end_user(&process);
        }
    }
}
