//! `doctor`: what this machine can do, and what to do about what it can not.

use std::{fs, path::Path};

use engine::{Accel, Engine, EngineName, KvmState, kvm, qemu::QemuEngine};
use net::Mode;
use serde::Serialize;

use crate::{engines, home::Home, image::kernel, limits};

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
    findings.extend([network(Mode::Tap), network(Mode::User)]);
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
    let (findings, detail) = match (lacking.is_empty(), mode) {
        (false, _) => (lacking, "forks can not have it: "),
        (true, Mode::Tap) => {
            let detail = "forks have it by default: a network namespace and an address each";
            return ok(name, detail.into());
        }
        (true, _) => (net::risks(mode), "works, without root; but "),
    };
    let [first, ..] = findings.as_slice() else { return ok(name, "works".into()) };
    let all: Vec<_> = findings.iter().map(|finding| finding.what.as_str()).collect();
    warn(name, format!("{detail}{}", all.join("; ")), &first.help)
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
