//! `cleanup`: finds what a crash left behind. A plan first; nothing is touched until it is carried out.
//!
//! What lives is judged by what processes really hold: a machine's working directory is its fork's directory, and its
//! sockets lie there. Only what offshoot made is ever touched: directories and links whose names have our exact form, and
//! processes that hold such a directory.

use std::{
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
                let mut processes = holders(&dir)?;
                processes.extend(process.filter(|process| process.is_alive() && !processes.contains(process)));
                plan.leftovers.push(Leftover {
                    what: format!("half-made fork {id} ({} processes)", processes.len()),
                    reason,
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
        Err(_) => false,
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
        Action::Template => {
            for process in holders(&leftover.path)? {
                process.kill(Duration::from_secs(20))?;
            }
            fs::remove_dir_all(&leftover.path)
        }
    }
}

/// What is left of networks of forks that are not there any more. Links of other homes are theirs to judge.
fn links(home: &Home, known: &[ForkId]) -> io::Result<Vec<Leftover>> {
    // Nobody but root has any.
    let Some(network) =
        network::existing(home).map_err(io::Error::other)?.filter(|_| net::missing_capability().is_none())
    else {
        return Ok(Vec::new());
    };
    let inventory = network.inventory().map_err(io::Error::other)?;
    // Listed before the forks were looked for once more: one that was made in the meantime is there by now.
    let made_since = |id: &ForkId| {
        ["", record::NEW, record::SPARE].iter().any(|kind| home.forks().join(format!("{kind}{id}")).exists())
    };
    let left = inventory.leftovers(&known.iter().cloned().collect()).into_iter();
    let left: Vec<_> = left.filter(|left| !matches!(left, net::Leftover::Link(id) if made_since(id))).collect();
    // The rules that all links share stay for the next fork; alone they are nothing that a crash left.
    if left == [net::Leftover::Table] {
        return Ok(Vec::new());
    }
    let leftover = |left: net::Leftover| Leftover {
        what: left.to_string(),
        reason: "there is no such fork".into(),
        path: home.network.clone(),
        action: Action::Network(left),
    };
    Ok(left.into_iter().map(leftover).collect())
}

/// Processes of engines whose working directory is `dir` or below, or which hold a file there.
fn holders(dir: &Path) -> io::Result<Vec<ProcessRef>> {
    let dir = dir.canonicalize()?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A shell whose user went there is not ours; an engine is.
        if pid == std::process::id() || !machines::is_machine(pid) {
            continue;
        }
        if machines::places(pid).any(|place| place.starts_with(&dir))
            && let Ok(process) = ProcessRef::of(pid)
        {
            found.push(process);
        }
    }
    Ok(found)
}
