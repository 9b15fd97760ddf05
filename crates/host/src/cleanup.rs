//! `cleanup`: finds what a crash left behind. A plan first; nothing is touched until it is carried out.
//!
//! What lives is judged by what processes really hold: a machine's working directory is its fork's directory, and its
//! sockets lie there. Only what offshoot made is ever touched: directories and links whose names have our exact form, and
//! processes that hold such a directory.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use engine::ProcessRef;
use identity::ForkId;
use store::Store;

use crate::{
    forks,
    home::Home,
    limits, machines, network, operation, pages,
    record::{self, Entry},
    snapshot,
    source::SourceError,
    standby,
};

/// Something that can be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// What it is, for people.
    pub what: String,
    /// Why it can go.
    pub reason: String,
    /// Where it is.
    pub path: PathBuf,
    action: Action,
}

impl Leftover {
    /// The fork that it is all there is of, if it is one.
    #[must_use]
    pub fn fork(&self) -> Option<&ForkId> {
        match &self.action {
            Action::DeadFork(id) | Action::HalfMade { id, .. } => Some(id),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    /// A dead fork, by its record.
    DeadFork(ForkId),
    /// A fork that somebody began something with.
    Interrupted(ForkId),
    /// A fork whose network was not acknowledged in time.
    NoNetwork(ForkId),
    /// What a fork was captured as, and nobody wants.
    Snapshot,
    /// A half-made fork: end the processes that hold its directory, then remove it.
    HalfMade { id: ForkId, processes: Vec<ProcessRef> },
    /// A name that points to no fork.
    Name,
    /// A control group of no fork.
    Cgroup,
    /// A network link of no fork, or what all links share.
    Network(net::Leftover),
    /// Packet rules that forks need and that are gone.
    Rules,
    /// A half-made or half-removed template.
    Template,
    /// What was noted of a template's forks.
    Pages,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Plan {
    /// What can be removed.
    pub leftovers: Vec<Leftover>,
    /// What is being made right now, and is left alone.
    pub being_made: Vec<PathBuf>,
    /// Forks that may well live, or be in standby, but whose records can not be read: an input error, or another version's. They are left alone
    /// by everybody who was not told explicitly to end them.
    pub unclear: Vec<Leftover>,
    /// What is not ours, and is left alone.
    pub foreign: Vec<PathBuf>,
}

/// Looks, and touches nothing.
///
/// # Errors
/// If a directory can not be read.
pub fn plan(home: &Home, store: &Store) -> io::Result<Plan> {
    let mut plan = Plan::default();
    let mut known: Vec<ForkId> = Vec::new();
    // Names and groups before forks: what is made after this line is newer than every one of them.
    let names = record::names(home)?;
    let groups = limits::all();
    for entry in record::entries(home)? {
        match entry {
            Entry::Fork(record) if standby::is_interrupted(home, &record) => {
                known.push(record.id.clone());
                plan.leftovers.push(Leftover {
                    what: format!("fork {} ({}), which is then brought back", record.name, record.id),
                    reason: "who put it into standby, resumed or forked it ended before that was done".into(),
                    path: forks::dir(home, &record),
                    action: Action::Interrupted(record.id),
                });
            }
            Entry::Fork(record)
                if record.is_alive() && network::is_to_be_ended(&record, &forks::dir(home, &record)) =>
            {
                known.push(record.id.clone());
                plan.leftovers.push(Leftover {
                    what: format!("fork {} ({})", record.name, record.id),
                    reason: "its network was not acknowledged in time, and who was to end it then ended before".into(),
                    path: forks::dir(home, &record),
                    action: Action::NoNetwork(record.id),
                });
            }
            Entry::Fork(record) if !record.is_dead() => known.push(record.id),
            Entry::Fork(record) => {
                known.push(record.id.clone());
                plan.leftovers.push(Leftover {
                    what: format!("fork {} ({})", record.name, record.id),
                    reason: "its machine has ended".into(),
                    path: forks::dir(home, &record),
                    action: Action::DeadFork(record.id),
                });
            }
            Entry::Spare { dir, id, spare } => {
                known.push(id.clone());
                let reason = if !spare.process.is_alive() {
                    "its machine has ended"
                } else if store.get(&spare.template).is_ok_and(|found| found.manifest().id == spare.template_id) {
                    continue;
                } else {
                    "its template is gone"
                };
                plan.leftovers.push(Leftover {
                    what: format!("spare machine of template {}", spare.template),
                    reason: reason.into(),
                    path: dir,
                    action: Action::HalfMade { id, processes: vec![spare.process] },
                });
            }
            Entry::BeingMade(dir) => {
                if let Some(id) =
                    dir.file_name().and_then(|name| ForkId::parse(name.to_str()?.trim_start_matches(".new-")).ok())
                {
                    known.push(id);
                }
                plan.being_made.push(dir);
            }
            Entry::Leftover { dir, id, process, reason } => {
                known.push(id.clone());
                let Some(mut processes) = holders(&dir)? else { continue };
                processes.extend(process.filter(|process| process.is_alive() && !processes.contains(process)));
                plan.leftovers.push(Leftover {
                    what: format!("half-made fork {id} ({} processes)", processes.len()),
                    reason,
                    path: dir,
                    action: Action::HalfMade { id, processes },
                });
            }
            Entry::Unreadable { dir, id, error } => {
                known.push(id.clone());
                let Some(processes) = holders(&dir)? else { continue };
                // Without a record nobody could bring it back any more.
                let stands_by = error.kind() != io::ErrorKind::NotFound && snapshot::place(home, &id).exists();
                let may_live = stands_by || !processes.is_empty();
                let kept = if may_live { &mut plan.unclear } else { &mut plan.leftovers };
                kept.push(Leftover {
                    what: format!("fork {id} ({} processes)", processes.len()),
                    reason: format!("its record can not be read: {error}"),
                    path: dir,
                    action: Action::HalfMade { id, processes },
                });
            }
            Entry::Foreign(path) => plan.foreign.push(path),
        }
    }
    for (path, id) in names {
        match id {
            None => plan.foreign.push(path),
            Some(id) if known.contains(&id) => {}
            // Made or removed while we looked: its directory decides, once more.
            Some(id) if home.forks().join(id.as_str()).exists() || home.forks().join(format!(".new-{id}")).exists() => {
            }
            Some(id) => plan.leftovers.push(Leftover {
                what: format!("name {}", path.file_name().unwrap_or_default().to_string_lossy()),
                reason: format!("there is no fork {id}"),
                path,
                action: Action::Name,
            }),
        }
    }
    for (path, id) in groups.into_iter().filter(|(_, id)| !known.contains(id)) {
        let empty = fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|procs| procs.trim().is_empty());
        if empty && !home.forks().join(format!(".new-{id}")).exists() {
            plan.leftovers.push(Leftover {
                what: format!("control group of fork {id}"),
                reason: "it is empty and there is no such fork".into(),
                path,
                action: Action::Cgroup,
            });
        }
    }
    plan.leftovers.extend(links(home, &known)?);
    let is_wanted = |id: &ForkId| match record::read(&home.forks().join(id.as_str())) {
        // Its own operation removes it.
        Ok(record) => record.standby.is_some() || operation::is_under_way(&forks::dir(home, &record)),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    for path in snapshot::leftovers(home, is_wanted)? {
        plan.leftovers.push(Leftover {
            what: "what a fork was captured as".into(),
            reason: "it was never finished, or there is no such fork".into(),
            path,
            action: Action::Snapshot,
        });
    }
    for path in pages::leftovers(home, store)? {
        plan.leftovers.push(Leftover {
            what: "list of pages that forks need first".into(),
            reason: "its template is gone".into(),
            path,
            action: Action::Pages,
        });
    }
    for left in store.leftovers().map_err(io::Error::other)? {
        plan.leftovers.push(Leftover {
            what: "half-made or half-removed template".into(),
            reason: "its maker ended before it was finished".into(),
            path: left,
            action: Action::Template,
        });
    }
    Ok(plan)
}

/// Removes one leftover.
///
/// # Errors
/// If it can not be removed.
pub fn carry_out(home: &Home, leftover: &Leftover) -> io::Result<()> {
    match &leftover.action {
        Action::DeadFork(id) => {
            // Read again: only what is dead now goes.
            match record::find(home, id.as_str())? {
                Some(record) if record.is_dead() => forks::kill(home, &record).map_err(io::Error::other),
                _ => Ok(()),
            }
        }
        Action::Interrupted(id) => match record::find(home, id.as_str())? {
            Some(record) => Store::open(&home.data)
                .map_err(SourceError::from)
                .and_then(|store| standby::settle(home, &store, &record))
                .map(drop)
                .map_err(io::Error::other),
            None => Ok(()),
        },
        Action::NoNetwork(id) => match record::find(home, id.as_str())? {
            Some(record) if network::is_to_be_ended(&record, &forks::dir(home, &record)) => {
                forks::kill(home, &record).map_err(io::Error::other)
            }
            _ => Ok(()),
        },
        Action::Snapshot => match fs::remove_dir_all(&leftover.path) {
            // Bringing its fork back removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        },
        Action::HalfMade { id, processes } => {
            for process in processes {
                process.kill(Duration::from_secs(20))?;
            }
            network::remove(home, id)?;
            for (group, _) in limits::all().into_iter().filter(|(_, owner)| owner == id) {
                limits::remove(&[group], id)?;
            }
            record::remove(home, &leftover.path, id)
        }
        Action::Name | Action::Pages => fs::remove_file(&leftover.path),
        Action::Cgroup => fs::remove_dir(&leftover.path),
        Action::Network(link) => match network::existing(home).map_err(io::Error::other)? {
            Some(network) => network.remove_leftover(link).map_err(io::Error::other),
            None => Ok(()),
        },
        Action::Rules => match network::existing(home).map_err(io::Error::other)? {
            Some(network) => network.restore_rules().map(drop).map_err(io::Error::other),
            None => Ok(()),
        },
        Action::Template => {
            for process in holders(&leftover.path)?.unwrap_or_default() {
                process.kill(Duration::from_secs(20))?;
            }
            fs::remove_dir_all(&leftover.path)
        }
    }
}

/// What is left of networks of forks that are not there any more, and what those that are there lack.
fn links(home: &Home, known: &[ForkId]) -> io::Result<Vec<Leftover>> {
    let Some((inventory, left)) = networks(home, known)? else { return Ok(Vec::new()) };
    let leftover = |what: String, reason: &str, action| Leftover {
        what,
        reason: reason.into(),
        path: home.network.clone(),
        action,
    };
    let mut found = Vec::new();
    if inventory.lacks_rules(&left) {
        let what = format!("{}, which are then written again", net::Leftover::Table);
        found.push(leftover(what, "somebody removed them, and forks are connected", Action::Rules));
    }
    let gone = |left: net::Leftover| leftover(left.to_string(), "there is no such fork", Action::Network(left));
    found.extend(left.into_iter().map(gone));
    Ok(found)
}

/// What there is of networks, and what of it no fork needs any more; `None` without any, or for who may not look: nobody but root has any. Links of other homes are
/// theirs to judge.
pub(crate) fn networks(home: &Home, known: &[ForkId]) -> io::Result<Option<(net::Inventory, BTreeSet<net::Leftover>)>> {
    let network = network::existing(home).map_err(io::Error::other)?;
    let Some(network) = network.filter(|_| net::missing_capability().is_none()) else { return Ok(None) };
    let inventory = network.inventory().map_err(io::Error::other)?;
    // Listed before the forks were looked for once more: one that was made in the meantime is there by now.
    let made_since = |id: &ForkId| {
        ["", record::NEW, record::SPARE].iter().any(|kind| home.forks().join(format!("{kind}{id}")).exists())
    };
    let left = inventory.leftovers(&known.iter().cloned().collect()).into_iter();
    let mut left: BTreeSet<_> =
        left.filter(|left| !matches!(left, net::Leftover::Link(id) if made_since(id))).collect();
    // The rules that all links share stay for the next fork; alone they are nothing that a crash left.
    if left.iter().eq([&net::Leftover::Table]) {
        left.clear();
    }
    Ok(Some((inventory, left)))
}

/// The machines that work for `dir`; `None` if it is gone by now.
fn holders(dir: &Path) -> io::Result<Option<Vec<ProcessRef>>> {
    match machines::holders(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::rig::{self, Machine};

    #[test]
    fn o2_a_fork_whose_record_can_not_be_read_is_ended_by_nobody_who_was_not_told_to() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::below(place.path()).make().unwrap();
        let store = Store::open(&home.data).unwrap();
        // Runs, of another format; runs, without a record; in standby, unreadable; nothing but a directory; being made, as far as can be seen.
        let [newer, lost, still, empty, made] = ['a', 'b', 'c', 'd', 'e'].map(rig::id);
        let (running, bare) = (Machine::of_fork(&home, &newer), Machine::of_fork(&home, &lost));
        let mut record = rig::record(&newer, &running.process);
        record.format += 1;
        let dir = |id: &ForkId| home.forks().join(id.as_str());
        record::write_json(&dir(&newer), record::RECORD, &record).unwrap();
        symlink(newer.as_str(), home.names().join("newer")).unwrap();
        for id in [&still, &empty] {
            fs::create_dir(dir(id)).unwrap();
            fs::write(dir(id).join(record::RECORD), "{").unwrap();
        }
        snapshot::Draft::begin(&home, &still).unwrap().publish(&home).unwrap().keep();
        let making = home.forks().join(format!(".new-{made}"));
        fs::create_dir(&making).unwrap();
        symlink("lock", making.join("lock")).unwrap();

        let found = plan(&home, &store).unwrap();
        let own = |found: &[Leftover]| -> Vec<PathBuf> {
            let paths = found.iter().map(|leftover| leftover.path.clone());
            paths.filter(|path| path.starts_with(place.path())).collect()
        };
        assert_eq!(own(&found.leftovers), [dir(&empty)]);
        assert_eq!(own(&found.unclear), [dir(&newer), dir(&lost), dir(&still)]);
        assert_eq!(found.being_made, [making]);
        let here = |leftover: &&Leftover| leftover.path.starts_with(place.path());
        for leftover in found.leftovers.iter().filter(here) {
            carry_out(&home, leftover).unwrap();
        }
        assert!(running.process.is_alive() && bare.process.is_alive() && !dir(&empty).exists());
        assert!(home.names().join("newer").is_symlink() && snapshot::place(&home, &still).exists());

        // Told to.
        for leftover in found.unclear.iter().filter(here) {
            carry_out(&home, leftover).unwrap();
        }
        assert!(!running.process.is_alive() && !bare.process.is_alive());
        let found = plan(&home, &store).unwrap();
        assert_eq!(own(&found.leftovers), [snapshot::place(&home, &still)]);
        assert_eq!((own(&found.unclear), record::names(&home).unwrap().len()), (Vec::new(), 0));
    }
}
