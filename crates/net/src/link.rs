//! A fork's link: made closed, opened with a policy, kept or undone.

use std::{
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use identity::ForkId;

use crate::{
    ack::AckSocket,
    address::{GATEWAY_MAC, Pool, mac_of_wire},
    error::{LinkError, missing_capability, step},
    fault, host_table,
    lease::Leases,
    named_net, namespace,
    netlink::{Socket, link},
    nft::Transaction,
    policy::Policy,
    ports,
    record::{self, LinkRecord},
    rules::{self, TAP, WIRE},
    state::{Locked, State},
    tap::{self, TapOptions},
};

/// What all links of a host share. There is to be one state directory per network namespace that is the host's.
///
/// Every call works in the network namespace of the thread that makes it.
#[derive(Debug, Clone)]
pub struct Network {
    pub(crate) state: State,
    pub(crate) leases: Leases,
    pub(crate) home: PathBuf,
    pub(crate) pool: Pool,
    forward_v6: bool,
}

/// A link through which nothing passes but the acknowledgement. It is removed on drop, unless it is [kept](Self::keep).
#[derive(Debug)]
pub struct ClosedLink {
    parts: Parts,
    record: LinkRecord,
}

/// A link with its policy in force. It is removed on drop, unless it is [kept](Self::keep).
#[derive(Debug)]
pub struct OpenLink {
    parts: Parts,
    record: LinkRecord,
}

/// What was made so far. All names follow from the fork's id, so one undo fits every state; it is there before the first part.
#[derive(Debug)]
struct Parts {
    network: Network,
    id: ForkId,
    lock: Option<Locked>,
}

impl Parts {
    /// Leaves everything as it is.
    fn leave(mut self) {
        self.lock = None;
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            // What can not be removed stays recorded, and `cleanup` finds it.
            let _ = self.network.remove_parts(&self.id, &lock);
        }
    }
}

fn file<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> LinkError + use<'a> {
    move |source| LinkError::File { doing, path: path.to_owned(), source }
}

impl Network {
    /// The network whose state is below `root` (made if absent), with addresses from `pool`, each of which rests for `pause` between two forks.
    /// Where the host has no IPv6, its forks have none.
    ///
    /// # Errors
    /// The directory can not be made.
    pub fn open(root: &Path, pool: Pool, pause: Duration) -> Result<Self, LinkError> {
        let state = State::open(root).map_err(file("making the directory", root))?;
        let leases = Leases::open(root, pause)?;
        let has_v6 = namespace::setting("ipv6/conf/default/disable_ipv6").is_ok_and(|value| value == "0");
        let pool = if has_v6 { pool } else { pool.without_v6() };
        Ok(Self { state, leases, home: PathBuf::new(), pool, forward_v6: false })
    }

    /// For the forks that the directory `home` knows of. Several may share one network; what each has made is its own to remove.
    #[must_use]
    pub fn for_home(mut self, home: &Path) -> Self {
        home.clone_into(&mut self.home);
        self
    }

    /// Also lets the host forward IPv6 (`net.ipv6.conf.all.forwarding`), if it does not yet. A host that does takes no more addresses
    /// from routers' announcements, so this is not the default; without it forks reach each other and the host's ports over IPv6 only if
    /// the host forwards already.
    #[must_use]
    pub fn forwarding_v6(mut self) -> Self {
        self.forward_v6 = true;
        self
    }

    /// Makes a closed link for a fork: namespace, tap, wire, addresses, and the rules that keep it closed. It can be made ahead of the
    /// fork: what [`ClosedLink::open`] does is all that depends on the fork's request.
    ///
    /// # Errors
    /// [`LinkError`]; then nothing is left.
    pub fn prepare(&self, id: &ForkId, tap: TapOptions) -> Result<ClosedLink, LinkError> {
        if let Some(capability) = missing_capability() {
            return Err(LinkError::Denied { doing: "making a network link", capability, source: None });
        }
        let parts = self.parts(id, Duration::ZERO)?;
        if record::path(&self.state, id).exists() {
            // It is not ours to undo.
            parts.leave();
            return Err(LinkError::Exists(id.clone()));
        }
        let lease = self.leases.lease(&self.pool, id)?;
        fault::point("net.lease").map_err(step("leasing an address"))?;
        let addresses = lease.record().addresses;
        let record = LinkRecord { id: id.clone(), addresses, tap, home: self.home.clone(), policy: None };
        record.write(&self.state).map_err(file("writing", &record::path(&self.state, id)))?;
        let _ = lease.keep();
        fault::point("net.record").map_err(step("recording the link"))?;
        self.ensure_table()?;
        fault::point("net.table").map_err(step("making the host's table"))?;
        self.make(&record)?;
        Ok(ClosedLink { parts, record })
    }

    /// Takes up a closed link that was kept, in whichever process that was.
    ///
    /// # Errors
    /// There is none, it is open, or another process works on it and goes on doing so.
    pub fn adopt(&self, id: &ForkId) -> Result<ClosedLink, LinkError> {
        let (parts, record) = self.take_up(id)?;
        if record.policy.is_none() {
            Ok(ClosedLink { parts, record })
        } else {
            parts.leave();
            Err(LinkError::Exists(id.clone()))
        }
    }

    /// Takes up an open link that was kept, in whichever process that was.
    ///
    /// # Errors
    /// There is none, it is closed, or another process works on it and goes on doing so.
    pub fn adopt_open(&self, id: &ForkId) -> Result<OpenLink, LinkError> {
        let (parts, record) = self.take_up(id)?;
        if record.policy.is_some() {
            Ok(OpenLink { parts, record })
        } else {
            parts.leave();
            Err(LinkError::Closed(id.clone()))
        }
    }

    fn take_up(&self, id: &ForkId) -> Result<(Parts, LinkRecord), LinkError> {
        let parts = self.parts(id, record::PATIENCE)?;
        match self.read(id) {
            Ok(record) => Ok((parts, record)),
            Err(LinkError::Absent(id)) => {
                let _ = crate::state::remove(&record::lock_path(&self.state, &id));
                parts.leave();
                Err(LinkError::Absent(id))
            }
            Err(error) => {
                parts.leave();
                Err(error)
            }
        }
    }

    /// The record of a fork's link.
    ///
    /// # Errors
    /// [`LinkError::Absent`] if it has none; it can not be read.
    pub fn read(&self, id: &ForkId) -> Result<LinkRecord, LinkError> {
        let record = LinkRecord::read(&self.state, id).map_err(file("reading", &record::path(&self.state, id)))?;
        record.ok_or_else(|| LinkError::Absent(id.clone()))
    }

    /// Opens the tap of a link that was kept, open or closed, for a machine that takes the place of one that has ended.
    ///
    /// # Errors
    /// There is none ([`LinkError::Absent`]), it is open already (`ResourceBusy`), or gone.
    pub fn tap(&self, id: &ForkId) -> Result<OwnedFd, LinkError> {
        let record = self.read(id)?;
        let doing = "opening the tap";
        namespace::within(&record.namespace(&self.state), || {
            tap::attach_patiently(TAP, record.tap).map_err(step(doing))
        })
    }

    /// Removes all that was made for a fork, by its exact names, and gives its address back. That there is nothing, or only a
    /// part, is fine.
    ///
    /// # Errors
    /// [`LinkError::Busy`]; a part can not be removed, then the others are and the record stays.
    pub fn remove(&self, id: &ForkId) -> Result<(), LinkError> {
        let mut parts = self.parts(id, record::PATIENCE)?;
        match parts.lock.take() {
            Some(lock) => self.remove_parts(id, &lock),
            None => Ok(()),
        }
    }

    fn parts(&self, id: &ForkId, patience: Duration) -> Result<Parts, LinkError> {
        let lock =
            record::lock(&self.state, id, patience).map_err(file("locking", &record::lock_path(&self.state, id)))?;
        let lock = lock.ok_or_else(|| LinkError::Busy(id.clone()))?;
        Ok(Parts { network: self.clone(), id: id.clone(), lock: Some(lock) })
    }

    /// Writes the host's packet rules again if they are gone and there is a link that needs them; true if they were. Whatever opens a link
    /// does so too.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn restore_rules(&self) -> Result<bool, LinkError> {
        let doing = "looking for the packet rules";
        if record::all(&self.state).map_err(step(doing))?.is_empty() || host_table::is_there().map_err(step(doing))? {
            return Ok(false);
        }
        self.ensure_table().map(|()| true)
    }

    fn ensure_table(&self) -> Result<(), LinkError> {
        if host_table::is_there().map_err(step("looking for the packet rules"))? {
            return Ok(());
        }
        let _lock = self.lock_shared()?;
        host_table::ensure(&self.state, self.forward_v6)
    }

    fn lock_shared(&self) -> Result<Locked, LinkError> {
        self.state.lock_shared_parts().map_err(step("waiting for other forks' changes"))
    }

    /// Makes the parts. The caller's guard undoes them.
    fn make(&self, record: &LinkRecord) -> Result<(), LinkError> {
        let addresses = &record.addresses;
        let guest = [Some(IpAddr::V4(addresses.v4)), addresses.v6.map(IpAddr::V6)].into_iter().flatten();
        let gateways =
            [Some(IpAddr::V4(addresses.gateway_v4)), addresses.gateway_v6.map(IpAddr::V6)].into_iter().flatten();
        // Opened here: it stays in the host's namespace.
        let mut host = Socket::route().map_err(step("opening a netlink socket"))?;
        namespace::make(&record.namespace(&self.state), || {
            fault::point("net.namespace").map_err(step("making the network namespace"))?;
            set_up_routing(addresses.v6.is_some()).map_err(step("setting up the network namespace"))?;
            rules::close(addresses).map_err(step("writing the packet rules of the closed link"))?;
            fault::point("net.closed").map_err(step("closing the link"))?;

            let doing = "making the wire out of the network namespace";
            let (name, group) = (record.wire(), named_net::group(0));
            let here = namespace::own().map_err(step(doing))?;
            let mac = mac_of_wire(addresses.v4);
            let mut requests = vec![link::new_wire(&name, group, mac, WIRE, here.as_fd())];
            if addresses.v6.is_some() {
                requests.push(link::without_own_address(&name));
            }
            host.carry_out(requests).map_err(step(doing))?;
            let wire = host.index_of(&name).map_err(step(doing))?;
            fault::point("net.wire").map_err(step(doing))?;

            tap::make(TAP, record.tap).map_err(step("making the tap"))?;
            fault::point("net.tap").map_err(step("making the tap"))?;

            let doing = "giving the network namespace its addresses";
            let mut inside = Socket::route().map_err(step(doing))?;
            let tap = inside.index_of(TAP).map_err(step(doing))?;
            let far = inside.index_of(WIRE).map_err(step(doing))?;
            let mut requests = vec![link::set_mac(tap, GATEWAY_MAC), link::up(tap), link::up(far)];
            requests.extend(gateways.map(|gateway| link::add_address(tap, gateway)));
            for address in guest.clone() {
                requests.push(link::route_to(tap, address));
                requests.push(link::neighbour(tap, address, addresses.mac));
                requests.push(link::route_to_all(far, address));
            }
            inside.carry_out(requests).map_err(step(doing))?;
            fault::point("net.addresses").map_err(step(doing))?;

            let mut requests = vec![link::up(wire)];
            requests.extend(guest.map(|address| link::route_to(wire, address)));
            host.carry_out(requests).map_err(step("routing to the fork"))?;
            fault::point("net.routes").map_err(step("routing to the fork"))
        })
    }

    /// Puts a policy into force. The caller's guard undoes it.
    fn put_into_force(&self, record: &LinkRecord, policy: &Policy) -> Result<(), LinkError> {
        self.ensure_table()?;
        if policy.net.is_some() || !policy.forwards.is_empty() {
            let _lock = self.lock_shared()?;
            if let Some(net) = &policy.net {
                let number = named_net::number(&self.state, net).map_err(|error| match error.kind() {
                    std::io::ErrorKind::QuotaExceeded => LinkError::TooManyNets,
                    _ => file("numbering the nets in", &self.state.nets())(error),
                })?;
                let mut table = Transaction::default();
                host_table::add_net(&mut table, number);
                table.commit().map_err(step("joining the named net"))?;
                let group = link::set_group(&record.wire(), named_net::group(number));
                let mut host = Socket::route().map_err(step("joining the named net"))?;
                host.carry_out(vec![group]).map_err(step("joining the named net"))?;
            }
            ports::take(&self.state, &record.id, &record.addresses, &policy.forwards)?;
            if !policy.forwards.is_empty() {
                ports::let_localhost_in(&record.wire(), true).map_err(step("forwarding ports of 127.0.0.1"))?;
            }
        }
        fault::point("net.shared").map_err(step("changing the host's table"))?;
        namespace::within(&record.namespace(&self.state), || {
            // It may have been prepared long ago: that its parts are there is not taken for granted.
            let doing = "finding the tap and the wire";
            let mut inside = Socket::route().map_err(step(doing))?;
            let tap = inside.index_of(TAP).map_err(step(doing))?;
            let wire = inside.index_of(WIRE).map_err(step(doing))?;
            if let Some(rate) = policy.rate {
                let requests = [tap, wire].map(|end| link::token_bucket(end, rate)).into();
                inside.carry_out(requests).map_err(step("limiting the rate"))?;
            }
            fault::point("net.rate").map_err(step("limiting the rate"))?;
            rules::open(&record.addresses, policy).map_err(step("opening the link"))
        })?;
        // Whoever flushed the host's rules since they were looked for did so while this link was closed; from here on it is seen by `doctor`.
        self.ensure_table()?;
        fault::point("net.opened").map_err(step("opening the link"))
    }
}

/// Lets a namespace forward, and keeps its own kernel from saying anything unasked.
pub(crate) fn set_up_routing(v6: bool) -> std::io::Result<()> {
    namespace::set("ipv4/ip_forward", "1")?;
    if v6 {
        // Before there are links: they begin with the defaults. No address of their own, no search for duplicates, no routers.
        namespace::set("ipv6/conf/default/addr_gen_mode", "1")?;
        namespace::set("ipv6/conf/default/accept_dad", "0")?;
        namespace::set("ipv6/conf/default/accept_ra", "0")?;
        namespace::set("ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

impl ClosedLink {
    /// What was made.
    #[must_use]
    pub fn record(&self) -> &LinkRecord {
        &self.record
    }

    /// Opens the tap, for handing it to the machine. Reading it does not block. A tap is open once at a time.
    ///
    /// # Errors
    /// It is open already (`ResourceBusy`), or gone.
    pub fn tap(&self) -> Result<OwnedFd, LinkError> {
        let doing = "opening the tap";
        namespace::within(&self.namespace_path(), || tap::attach_patiently(TAP, self.record.tap).map_err(step(doing)))
    }

    /// The fork's network namespace, for a machine's process that is to live in it.
    ///
    /// # Errors
    /// It is gone.
    pub fn namespace(&self) -> Result<OwnedFd, LinkError> {
        let path = self.namespace_path();
        Ok(std::fs::File::open(&path).map_err(file("opening the network namespace", &path))?.into())
    }

    /// The tap and the socket for acknowledgements, as [`tap`](Self::tap) and [`ack_socket`](Self::ack_socket), in one go into
    /// the namespace.
    ///
    /// # Errors
    /// Those of the two.
    pub fn ends(&self) -> Result<(OwnedFd, AckSocket), LinkError> {
        namespace::within(&self.namespace_path(), || {
            let tap = tap::attach_patiently(TAP, self.record.tap).map_err(step("opening the tap"))?;
            Ok((tap, AckSocket::bind(&self.record.addresses).map_err(step("waiting for acknowledgements"))?))
        })
    }

    /// The socket for the fork's acknowledgements. Make it before the fork runs.
    ///
    /// # Errors
    /// There is one already, or the namespace is gone.
    pub fn ack_socket(&self) -> Result<AckSocket, LinkError> {
        namespace::within(&self.namespace_path(), || {
            AckSocket::bind(&self.record.addresses).map_err(step("waiting for acknowledgements"))
        })
    }

    /// Puts the policy into force: from now on packets pass.
    ///
    /// # Errors
    /// [`LinkError`]; then the whole link is removed.
    pub fn open(mut self, policy: Policy) -> Result<OpenLink, LinkError> {
        policy.check()?;
        let network = &self.parts.network;
        self.record.policy = Some(policy.clone());
        // Before anything of it is made: it says what there may be to remove.
        self.record.write(&network.state).map_err(file("writing", &record::path(&network.state, &self.record.id)))?;
        network.put_into_force(&self.record, &policy)?;
        Ok(OpenLink { parts: self.parts, record: self.record })
    }

    /// Lets it outlive this value, for [`Network::adopt`].
    #[must_use = "what is kept must be removed by somebody"]
    pub fn keep(self) -> LinkRecord {
        self.parts.leave();
        self.record
    }

    fn namespace_path(&self) -> PathBuf {
        self.record.namespace(&self.parts.network.state)
    }
}

impl OpenLink {
    /// What was made.
    #[must_use]
    pub fn record(&self) -> &LinkRecord {
        &self.record
    }

    /// Lets it outlive this value. [`Network::remove`] removes it.
    #[must_use = "what is kept must be removed by somebody"]
    pub fn keep(self) -> LinkRecord {
        self.parts.leave();
        self.record
    }

    /// Closes it again: nothing passes any more, connections that there are included. Its ports and its net are given up, its rate stays.
    ///
    /// # Errors
    /// [`LinkError`]; then the whole link is removed.
    pub fn shut(mut self) -> Result<ClosedLink, LinkError> {
        let network = &self.parts.network;
        namespace::within(&self.record.namespace(&network.state), || rules::shut().map_err(step("closing the link")))?;
        network.give_up_shared(&self.record)?;
        let policy = self.record.policy.take();
        self.record.write(&network.state).map_err(file("writing", &record::path(&network.state, &self.record.id)))?;
        network.leave_again(&self.record.id, policy.as_ref())?;
        Ok(ClosedLink { parts: self.parts, record: self.record })
    }
}
