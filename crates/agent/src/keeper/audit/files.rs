//! Open and mapped files that an identity replaces: who holds one of the template's goes on reading the template's.

use super::{
    findings::{Findings, Kind},
    processes::{Descriptors, Mapped, Process},
};

/// Where the identity directory is in the workload.
const DIRECTORY: &str = "/run/offshoot/";

/// Files that an identity replaces by others.
const REPLACED: [&str; 5] =
    ["/etc/hostname", "/etc/hosts", "/etc/machine-id", "/var/lib/dbus/machine-id", "/etc/resolv.conf"];
/// The one that it writes over in place.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

const CURE: &str = "close it before the capture and open it again in the fork (on_fork = \"signal\" or \"hook\"), or use on_fork = \"restart\"";
const SSH_CURE: &str = "use on_fork = \"restart\" or \"wait\": it then reads the fork's own keys";

/// Programs that keep host keys in their memory, and whether a signal makes them read these anew.
const SSH_SERVERS: [(&str, bool); 2] = [("sshd", true), ("dropbear", false)];

/// Looks at one process.
pub(super) fn look(process: &Process, open: &Descriptors, mapped: &[Mapped], findings: &mut Findings) {
    let mapped = mapped.iter().map(|mapped| (&mapped.path, "mapped"));
    for (path, held) in open.paths.iter().map(|path| (path, "open")).chain(mapped) {
        if let Some(reason) = judge(path, held) {
            findings.of(process, Kind::IdentityFileOpen, reason, CURE);
        }
    }
}

/// SSH servers hold the template's keys, whatever becomes of the files. `signalled`: a signal tells it of the fork.
pub(super) fn look_for_ssh(process: &Process, program: &str, signalled: bool, findings: &mut Findings) {
    if SSH_SERVERS.iter().any(|&(server, reloads)| server == program && !(reloads && signalled)) {
        let reason = "is an SSH server with the template's host keys in its memory, which all forks show then";
        findings.of(process, Kind::SshHostKeys, reason, SSH_CURE);
    }
}

fn judge(path: &str, held: &str) -> Option<String> {
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    let shown = |path: &str| Some(format!("has {path} {held}, the template's file: a fork has another in its place"));
    if path == BOOT_ID {
        return Some(format!("has {path} {held}: what it has read of it is the template's"));
    }
    if let Some(path) = REPLACED.into_iter().find(|&replaced| replaced == path) {
        return shown(path);
    }
    if is_host_key(path) {
        return shown("an SSH host key in /etc/ssh");
    }
    // Its names may be the caller's; the folders of it stay.
    let name = path.strip_prefix(DIRECTORY)?;
    (!matches!(name, "" | "env" | "secrets")).then(|| shown("a file of /run/offshoot"))?
}

fn is_host_key(path: &str) -> bool {
    path.strip_prefix("/etc/ssh/ssh_host_").is_some_and(|rest| rest.ends_with("_key"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i17_files_that_an_identity_replaces_are_known_and_others_are_not() {
        for path in REPLACED.into_iter().chain([BOOT_ID]) {
            assert!(
                judge(path, "open").is_some_and(|reason| reason.contains(path) && reason.contains("open")),
                "{path}"
            );
        }
        for path in ["/etc/hosts (deleted)", "/run/offshoot/id", "/run/offshoot/env/A", "/etc/ssh/ssh_host_rsa_key"] {
            assert!(judge(path, "mapped").is_some_and(|reason| reason.contains("mapped")), "{path}");
        }
        for path in [
            "/etc/hosts.allow",
            "/home/etc/hosts",
            "/run/offshoot",
            "/run/offshoot/env",
            "/run/offshootx/id",
            "/etc/ssh/ssh_config",
            "/proc/sys/kernel/random/uuid",
            "/dev/null",
            "",
        ] {
            assert_eq!(judge(path, "open"), None, "{path}");
        }
        // A name of a secret is not told.
        assert!(!judge("/run/offshoot/secrets/KEY", "open").is_some_and(|reason| reason.contains("KEY")));
    }
}
