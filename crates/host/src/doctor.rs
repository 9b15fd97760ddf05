//! `doctor`: what this machine can do, and what to do about what it can not.

use std::{collections::BTreeSet, fs, io, path::Path};

use engine::{Accel, Engine, EngineName, KvmState, kvm, qemu::QemuEngine};
use net::{Inventory, Leftover, Mode};
use serde::Serialize;

use crate::{
    cleanup, engines,
    home::Home,
    image::kernel,
    limits,
    record::{self, Entry},
};

/// How a finding counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, with less than could be.
    Warn,
    /// Something does not work without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// How it counts.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do.
    pub next: Option<String>,
}

/// Looks at everything.
#[must_use]
pub fn run(home: &Home) -> Vec<Finding> {
    let mut findings = vec![qemu(), acceleration(home), worker(home)];
    findings.push(agent());
    findings.extend([
        program("mke2fs", "e2fsprogs", "makes root images"),
        program("mmdebstrap", "mmdebstrap", "builds recipes from Debian packages (python)"),
        program("dpkg-deb", "dpkg", "unpacks the guest kernel"),
        program("busybox", "busybox-static", "builds the busybox recipe"),
    ]);
    findings.extend([limit("memory", "--memory-limit"), limit("cpu", "--cpus")]);
    findings.extend([network(Mode::Tap), network(Mode::User), networks(home)]);
    findings.push(user());
    findings.push(space(home));
    findings
}

fn qemu() -> Finding {
    match QemuEngine::find(Accel::Tcg) {
        Ok(engine) => {
            let version = &engine.info().version;
            if engine.capabilities().read_only_template {
                ok("qemu", format!("QEMU {version}"))
            } else {
                warn(
                    "qemu",
                    format!("QEMU {version} works; it opens template memory for writing (it never writes it)"),
                    "QEMU 8.2 or later opens it for reading only",
                )
            }
        }
        Err(error) => missing("qemu", error.to_string(), "apt-get install qemu-system-x86"),
    }
}

fn acceleration(home: &Home) -> Finding {
    match engines::probe(home, EngineName::Qemu, newest_kernel(home).as_deref()) {
        KvmState::Works => ok("kvm", "a kernel boots on it".into()),
        KvmState::Unusable(reason) => warn(
            "kvm",
            format!("{reason}; new templates use emulation (qemu tcg)"),
            "nothing, unless this machine has hardware virtualisation: then see its firmware settings and the permissions of /dev/kvm",
        ),
    }
}

/// The engine `kvm`.
fn worker(home: &Home) -> Finding {
    let name = "kvm engine";
    let program = match kvm::program() {
        Ok(program) => program,
        Err(error) => {
            return warn(name, error.to_string(), "nothing, unless this machine has KVM: scripts/demo builds it");
        }
    };
    match engines::probe(home, EngineName::Kvm, newest_kernel(home).as_deref()) {
        KvmState::Works => ok(name, format!("a kernel boots with it; new templates use it ({})", program.display())),
        KvmState::Unusable(reason) => {
            warn(name, reason, "nothing: qemu does the same, slower; `offshoot build --engine kvm` tries all the same")
        }
    }
}

/// A kernel in the cache to try KVM with.
fn newest_kernel(home: &Home) -> Option<std::path::PathBuf> {
    let kernels = fs::read_dir(home.cache.join(kernel::SHELF)).ok()?;
    kernels.flatten().map(|entry| entry.path().join("vmlinuz")).filter(|path| path.is_file()).max()
}

fn agent() -> Finding {
    match crate::image::initramfs::agent_binary() {
        Ok(path) => ok("agent", path.display().to_string()),
        Err(error) => missing("agent", error.to_string(), "scripts/demo builds it"),
    }
}

fn program(name: &'static str, package: &str, why: &str) -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), "/usr/bin".into(), "/bin".into()])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    match found {
        Some(path) => ok(name, path.display().to_string()),
        None => missing(name, format!("not installed; {why}"), &format!("apt-get install {package}")),
    }
}

fn limit(controller: &'static str, option: &str) -> Finding {
    let name = if controller == "memory" { "memory limits" } else { "cpu limits" };
    match limits::available(controller) {
        Ok(path) => ok(name, format!("{option} works ({})", path.display())),
        Err(reason) => warn(
            name,
            format!("{option} would be refused: {reason}"),
            "run as root, or under `systemd-run --user --scope -p Delegate=yes`, on a host whose controller is on",
        ),
    }
}

/// One way to connect forks.
fn network(mode: Mode) -> Finding {
    let name = if mode == Mode::Tap { "network tap" } else { "network user" };
    let lacking = net::missing(mode);
    let works = match mode {
        Mode::Tap => "forks have it by default: a network namespace and an address each",
        _ => "works, without root",
    };
    let (findings, detail) = match lacking.is_empty() {
        false => (lacking, "forks can not have it: ".to_owned()),
        true => (net::risks(mode), format!("{works}; but ")),
    };
    let [first, ..] = findings.as_slice() else { return ok(name, works.into()) };
    let all: Vec<_> = findings.iter().map(|finding| finding.what.as_str()).collect();
    warn(name, format!("{detail}{}", all.join("; ")), &first.help)
}

/// The networks that there are.
fn networks(home: &Home) -> Finding {
    let found = || {
        // The links are listed after the forks: what is newer than the list is looked for once more.
        let found = cleanup::networks(home, &record::ids(home)?)?;
        let Some((inventory, mut left)) = found else { return Ok(None) };
        // A fork that was never finished is none.
        for entry in record::entries(home)? {
            match entry {
                Entry::Leftover { id, .. } if inventory.links.contains(&id) => drop(left.insert(Leftover::Link(id))),
                _ => {}
            }
        }
        Ok::<_, io::Error>(Some((inventory, left)))
    };
    match found() {
        Ok(Some((inventory, left))) => state_of(&inventory, &left),
        Ok(None) => ok(NETWORKS, "no fork is connected by tap".into()),
        Err(error) => warn(NETWORKS, format!("what there is can not be listed: {error}"), "run as root"),
    }
}

const NETWORKS: &str = "networks";

fn state_of(inventory: &Inventory, left: &BTreeSet<Leftover>) -> Finding {
    let Inventory { links, namespaces, wires, leases, capacity, .. } = inventory;
    let rules = if inventory.table { "in force" } else { "not there" };
    let detail = format!(
        "{} linked, {} of {capacity} addresses leased; {} namespaces, {} wires, the host's packet rules are {rules}",
        forks(links.len()),
        leases.len(),
        namespaces.len(),
        wires.len(),
    );
    if inventory.lacks_rules(left) {
        let open = "forks are not kept from the host and from each other: somebody removed the host's packet rules";
        return missing(
            NETWORKS,
            format!("{open}; {detail}"),
            "offshoot cleanup --yes (or the next fork by tap) writes them again",
        );
    }
    let links = left.iter().filter(|left| matches!(left, Leftover::Link(_))).count();
    if links > 0 {
        return warn(NETWORKS, format!("{detail}; {links} of them without a fork"), "offshoot cleanup");
    }
    // Who makes a fork at this moment finds one; where there are few left, many at once do not.
    let held = u64::try_from(leases.len()).unwrap_or(u64::MAX);
    if held.saturating_mul(10) >= capacity.saturating_mul(9) {
        return warn(
            NETWORKS,
            format!("{detail}: nearly all"),
            "end forks, or set OFFSHOOT_NETWORK_POOL to a larger range",
        );
    }
    ok(NETWORKS, detail)
}

fn forks(count: usize) -> String {
    if count == 1 { "1 fork is".into() } else { format!("{count} forks are") }
}

fn user() -> Finding {
    if rustix::process::geteuid().is_root() {
        ok("privileges", "root: every fork gets a user id and namespaces of its own".into())
    } else {
        warn(
            "privileges",
            "ordinary user: forks run with your user id, under QEMU's system call filter".into(),
            "run as root to give every fork a user id of its own",
        )
    }
}

fn space(home: &Home) -> Finding {
    let free = |path: &Path| rustix::fs::statvfs(path).map(|stat| stat.f_bavail * stat.f_frsize).ok();
    match free(&home.data) {
        Some(bytes) if bytes >= 2 << 30 => {
            ok("disk space", format!("{} GiB free in {}", bytes >> 30, home.data.display()))
        }
        Some(bytes) => warn(
            "disk space",
            format!("only {} MiB free in {}; a template takes about 500", bytes >> 20, home.data.display()),
            "free some, or set OFFSHOOT_DATA_DIR",
        ),
        None => warn("disk space", format!("{} can not be examined", home.data.display()), "check the directory"),
    }
}

fn ok(name: &'static str, detail: String) -> Finding {
    Finding { name, status: Status::Ok, detail, next: None }
}

fn warn(name: &'static str, detail: String, next: &str) -> Finding {
    Finding { name, status: Status::Warn, detail, next: Some(next.into()) }
}

fn missing(name: &'static str, detail: String, next: &str) -> Finding {
    Finding { name, status: Status::Missing, detail, next: Some(next.into()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use identity::ForkId;

    use super::*;

    #[test]
    fn o3_doctor_counts_links_and_leases_and_names_what_is_left_and_rules_that_are_gone() {
        let id = |number: u32| ForkId::parse(&format!("{number:020x}")).unwrap();
        let leases = |count: u32| (0..count).map(|number| ([10, 0, 0, 2].into(), id(number))).collect();
        let but = |inventory: &Inventory, change: &dyn Fn(&mut Inventory)| {
            let mut changed = inventory.clone();
            change(&mut changed);
            changed
        };
        let well = but(&Inventory::default(), &|well| {
            well.links = [id(0), id(1)].into();
            well.namespaces = well.links.clone();
            (well.leases, well.capacity, well.table) = (leases(2), 29, true);
        });
        let found = state_of(&well, &BTreeSet::new());
        assert_eq!(found.status, Status::Ok);
        assert!(found.detail.starts_with("2 forks are linked, 2 of 29 addresses leased"), "{}", found.detail);
        let left = state_of(&well, &[Leftover::Link(id(1))].into());
        assert_eq!((left.status, left.next.as_deref()), (Status::Warn, Some("offshoot cleanup")));
        assert!(left.detail.contains("1 of them without a fork"), "{}", left.detail);

        let flushed = but(&well, &|flushed| flushed.table = false);
        let found = state_of(&flushed, &BTreeSet::new());
        assert_eq!(found.status, Status::Missing);
        assert!(found.detail.contains("not kept from the host") && found.next.unwrap().contains("cleanup"));
        // Whom nobody needs, and who is just being made, needs no rules.
        assert_eq!(state_of(&flushed, &[Leftover::Link(id(0)), Leftover::Link(id(1))].into()).status, Status::Warn);
        let in_work = but(&flushed, &|flushed| flushed.in_work = flushed.links.clone());
        assert_eq!(state_of(&in_work, &BTreeSet::new()).status, Status::Ok);

        let full = but(&well, &|full| full.leases = leases(27));
        assert_eq!(state_of(&full, &BTreeSet::new()).status, Status::Warn);
    }
}
