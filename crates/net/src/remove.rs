//! Removing what was made for a fork.

use std::io;

use identity::ForkId;

use crate::{
    error::{LinkError, step},
    host_table,
    link::Network,
    named_net, namespace,
    netlink::{Socket, link},
    policy::{NetName, Policy},
    ports,
    record::{self, LinkRecord},
    state::{self, Locked},
};

impl Network {
    /// Removes everything of a fork that is there. `lock` is that of its link.
    ///
    /// Every part is tried, whatever becomes of the others. The record goes last, and only if all went.
    pub(crate) fn remove_parts(&self, id: &ForkId, lock: &Locked) -> Result<(), LinkError> {
        let record = LinkRecord::read(&self.state, id);
        let known = record.as_ref().ok().and_then(Option::as_ref);
        let policy = known.and_then(|record| record.policy.as_ref());
        let shares = policy.is_some_and(|policy| policy.net.is_some() || !policy.forwards.is_empty());
        let results = [
            match known {
                Some(_) if !shares => Ok(()),
                Some(_) => self.leave_shared(id, policy.and_then(|policy| policy.net.as_ref())),
                // Without a readable record there is no saying what it had.
                None => self.leave_all_shared(id),
            },
            // First the way out: what still runs inside reaches nothing any more.
            remove_wire(&record::wire(id)).map_err(step("removing the wire")),
            namespace::unmake(&record::namespace(&self.state, id)).map_err(step("removing the network namespace")),
            match known {
                Some(record) => self.leases.give_back(&record.lease()),
                // Without a readable record the owner's name is all there is.
                None => self.give_back_all(id),
            }
            .map_err(LinkError::from),
        ];
        results.into_iter().collect::<Result<(), _>>()?;
        let doing = "removing the record";
        state::remove(&record::path(&self.state, id)).map_err(step(doing))?;
        self.leave_again(id, policy)?;
        debug_assert!(lock.is_still(&record::lock_path(&self.state, id)).unwrap_or(true), "the lock is held");
        state::remove(&record::lock_path(&self.state, id)).map_err(step(doing))
    }

    /// Gives up the ports and the net of a link that stays.
    pub(crate) fn give_up_shared(&self, record: &LinkRecord) -> Result<(), LinkError> {
        let Some(policy) = &record.policy else { return Ok(()) };
        if policy.net.is_some() {
            let doing = "leaving the named net";
            let group = link::set_group(&record.wire(), named_net::group(0));
            Socket::route().and_then(|mut socket| socket.carry_out(vec![group])).map_err(step(doing))?;
        }
        if !policy.forwards.is_empty() {
            ports::let_localhost_in(&record.wire(), false).map_err(step("removing forwarded ports"))?;
        }
        if policy.net.is_some() || !policy.forwards.is_empty() {
            self.leave_shared(&record.id, policy.net.as_ref())
        } else {
            Ok(())
        }
    }

    /// Forgets a net that was still another's when it was [left](Self::leave_shared), who left it in the same moment and found this link's record. Called when
    /// that says nothing of the net any more: so the last of them forgets it.
    pub(crate) fn leave_again(&self, id: &ForkId, policy: Option<&Policy>) -> Result<(), LinkError> {
        let Some(net) = policy.and_then(|policy| policy.net.as_ref()) else { return Ok(()) };
        let _lock = self.state.lock_shared_parts().map_err(step("leaving the named net"))?;
        self.leave_net(id, net)
    }

    fn give_back_all(&self, id: &ForkId) -> Result<(), crate::lease::LeaseError> {
        let held = self.leases.held()?;
        let mut mine = held.into_iter().filter(|(_, (owner, _))| owner == id);
        mine.try_for_each(|(address, _)| self.leases.give_back_address(address, id))
    }

    fn leave_shared(&self, id: &ForkId, net: Option<&NetName>) -> Result<(), LinkError> {
        let doing = "removing forwarded ports";
        let _lock = self.state.lock_shared_parts().map_err(step(doing))?;
        ports::release(&self.state, id).map_err(step(doing))?;
        net.map_or(Ok(()), |net| self.leave_net(id, net))
    }

    /// Gives up the ports that are in a fork's name, and every net that no other fork is in.
    fn leave_all_shared(&self, id: &ForkId) -> Result<(), LinkError> {
        let doing = "removing forwarded ports";
        let _lock = self.state.lock_shared_parts().map_err(step(doing))?;
        ports::release(&self.state, id).map_err(step(doing))?;
        let nets = named_net::names(&self.state).map_err(step("reading the named nets"))?;
        nets.iter().try_for_each(|net| self.leave_net(id, net))
    }

    /// The lock of the shared parts is held.
    fn leave_net(&self, id: &ForkId, net: &NetName) -> Result<(), LinkError> {
        let doing = "leaving the named net";
        let Some(number) = named_net::forget_unused(&self.state, net, id).map_err(step(doing))? else { return Ok(()) };
        match host_table::remove_net(number).commit() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(step(doing)(error)),
            _ => Ok(()),
        }
    }
}

/// Removes a wire, if there is one and it is ours. One of that name with another group is somebody else's.
fn remove_wire(name: &str) -> io::Result<()> {
    let mut socket = Socket::route()?;
    let Some(found) = link::find(&mut socket, name)? else { return Ok(()) };
    if !named_net::is_ours(found.group) {
        return Ok(());
    }
    match socket.carry_out(vec![link::delete(found.index)]) {
        Err(error) if error.raw_os_error() != Some(rustix::io::Errno::NODEV.raw_os_error()) => Err(error),
        _ => Ok(()),
    }
}
