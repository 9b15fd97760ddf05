//! What there is, for `doctor` and `cleanup`.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, time::Duration};

use identity::ForkId;

use crate::{
    error::{LinkError, step},
    host_table,
    link::Network,
    named_net,
    netlink::{Socket, link},
    record::{self, LinkRecord},
    state,
};

/// A lease is written a moment before the record of its link. One that is younger than this may be waiting for it.
const SETTLED: Duration = Duration::from_secs(60);

/// Everything of ours, each by its exact name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The forks that have a record. All parts of a link have one.
    pub links: BTreeSet<ForkId>,
    /// Those among them that were made for another home that is there: not ours to judge.
    pub foreign: BTreeSet<ForkId>,
    /// Those among them, or about to be among them, that a process works on right now.
    pub in_work: BTreeSet<ForkId>,
    /// The namespaces in the state directory.
    pub namespaces: BTreeSet<ForkId>,
    /// The wires in the host's namespace that have a group of ours.
    pub wires: BTreeSet<String>,
    /// Held addresses, and by whom.
    pub leases: Vec<(Ipv4Addr, ForkId)>,
    /// How many addresses the pool has.
    pub capacity: u64,
    /// Whether the host's table is there.
    pub table: bool,
    unsettled: BTreeSet<ForkId>,
}

/// What no owner needs any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// What is left of a fork's link, its lease included.
    Link(ForkId),
    /// The host's table, when there is no link any more.
    Table,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(id) => write!(f, "the network link of fork {id}"),
            Self::Table => f.write_str("the host's packet rules (nft table inet offshoot)"),
        }
    }
}

impl Network {
    /// Lists what there is. It changes nothing.
    ///
    /// # Errors
    /// A directory can not be read; the kernel refuses to list links.
    pub fn inventory(&self) -> Result<Inventory, LinkError> {
        let doing = "listing the networks of forks";
        let table = host_table::is_there().map_err(step(doing))?;
        let mut found = Inventory { table, capacity: self.pool.capacity(), ..Inventory::default() };
        found.links = record::all(&self.state).map_err(step(doing))?.into_iter().collect();
        found.foreign = found.links.iter().filter(|id| self.is_foreign(id)).cloned().collect();
        let namespaces = state::entries(&self.state.namespaces()).map_err(step(doing))?;
        found.namespaces = namespaces.iter().filter_map(|name| ForkId::parse(name).ok()).collect();
        let mut socket = Socket::route().map_err(step(doing))?;
        let links = link::all(&mut socket).map_err(step(doing))?;
        found.wires = links.into_iter().filter(|link| named_net::is_ours(link.group)).map(|link| link.name).collect();
        let now = state::since_boot();
        for (address, (owner, since)) in self.leases.held()? {
            if now.saturating_sub(since) < SETTLED {
                found.unsettled.insert(owner.clone());
            }
            found.leases.push((address, owner));
        }
        let locked = state::locked_files().map_err(step(doing))?;
        let in_work = |id: &ForkId| {
            state::inode(&record::lock_path(&self.state, id)).is_some_and(|inode| locked.contains(&inode))
        };
        found.in_work = found.known().into_iter().filter(in_work).collect();
        Ok(found)
    }

    fn is_foreign(&self, id: &ForkId) -> bool {
        match LinkRecord::read(&self.state, id) {
            Ok(Some(record)) => record.home != self.home && record.home.exists(),
            // Removed meanwhile; or torn, which a record that is replaced by a rename is for nobody who lives.
            Ok(None) | Err(_) => false,
        }
    }

    /// Removes a leftover.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn remove_leftover(&self, leftover: &Leftover) -> Result<(), LinkError> {
        match leftover {
            Leftover::Link(id) => self.remove(id),
            Leftover::Table => {
                let _lock = self.state.lock_shared_parts().map_err(step("removing the packet rules"))?;
                if !record::all(&self.state).map_err(step("removing the packet rules"))?.is_empty() {
                    return Ok(());
                }
                host_table::remove().map_err(step("removing the packet rules"))
            }
        }
    }
}

impl Inventory {
    /// The forks that anything of ours names.
    fn known(&self) -> BTreeSet<ForkId> {
        let leases = self.leases.iter().map(|(_, owner)| owner);
        self.links.iter().chain(&self.namespaces).chain(leases).cloned().collect()
    }

    /// Whether the host's table is gone, and there is a link that needs it: one that is none of these leftovers, and that nobody is making
    /// right now.
    #[must_use]
    pub fn lacks_rules(&self, leftovers: &BTreeSet<Leftover>) -> bool {
        let needs = |id: &&ForkId| !self.in_work.contains(*id) && !leftovers.contains(&Leftover::Link((*id).clone()));
        !self.table && self.links.iter().any(|id| needs(&id))
    }

    /// What belongs to none of `owners`, and is not in work: links, and leases whose link was never recorded. Wires without a record are not
    /// among them: whoever made them, this state directory did not.
    #[must_use]
    pub fn leftovers(&self, owners: &BTreeSet<ForkId>) -> BTreeSet<Leftover> {
        let unneeded = |id: &ForkId| !owners.contains(id) && !self.in_work.contains(id) && !self.foreign.contains(id);
        // A lease alone may be that of a link which is just being recorded.
        let alone =
            |id: &ForkId| !self.links.contains(id) && !self.namespaces.contains(id) && self.unsettled.contains(id);
        let known = self.known();
        let mut leftovers: BTreeSet<_> =
            known.iter().filter(|id| unneeded(id) && !alone(id)).cloned().map(Leftover::Link).collect();
        if self.table && known.len() == leftovers.len() {
            leftovers.insert(Leftover::Table);
        }
        leftovers
    }
}
