//! What an audit has found, gathered and bounded. A process chooses its name and what is in its memory: nothing of that is passed on but names, cleaned.

use std::borrow::Cow;

use super::{
    processes::{Place, Process},
    secrets,
};

/// Most findings of one audit; the others are counted.
const MAX_FINDINGS: usize = 64;

/// What was found. The texts are stable: programs rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A TCP connection with an end outside of the template.
    TcpConnection,
    /// A socket that is bound to an address which no fork has.
    SocketWithAddress,
    /// A secret in a process' environment.
    SecretInEnvironment,
    /// A secret in a process' arguments.
    SecretInArguments,
    /// Random state that nobody reseeds.
    UnseededRandom,
    /// An open or mapped file that an identity replaces.
    IdentityFileOpen,
    /// SSH host keys that stay the template's, or that forks lack.
    SshHostKeys,
    /// Not everything was looked at.
    AuditIncomplete,
}

impl Kind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::TcpConnection => "tcp_connection",
            Self::SocketWithAddress => "socket_with_address",
            Self::SecretInEnvironment => "secret_in_environment",
            Self::SecretInArguments => "secret_in_arguments",
            Self::UnseededRandom => "unseeded_random",
            Self::IdentityFileOpen => "identity_file_open",
            Self::SshHostKeys => "ssh_host_keys",
            Self::AuditIncomplete => "audit_incomplete",
        }
    }
}

/// Whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    pub(crate) name: String,
    /// The recipe's service, or `runtime`.
    pub(crate) service: Option<String>,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) kind: Kind,
    /// `None` where it is about no process.
    pub(crate) process: Option<Owner>,
    /// What the process does, after its name in a sentence; a sentence where there is none.
    pub(crate) reason: String,
    /// What to do about it.
    pub(crate) cure: Cow<'static, str>,
}

/// All of one audit.
#[derive(Debug, Clone, Default)]
pub(crate) struct Findings {
    list: Vec<Entry>,
    left_out: usize,
}

#[derive(Debug, Clone)]
struct Entry {
    finding: Finding,
    place: Option<Place>,
    /// Processes of the same place with the same finding.
    others: usize,
}

impl Findings {
    /// Notes one about a process. Processes of one service about which the same is to be said are named once.
    pub(super) fn of(
        &mut self,
        process: &Process,
        kind: Kind,
        reason: impl Into<String>,
        cure: impl Into<Cow<'static, str>>,
    ) {
        let reason = reason.into();
        let same = self.list.iter_mut().find(|entry| {
            entry.finding.kind == kind && entry.place.as_ref() == Some(&process.place) && entry.finding.reason == reason
        });
        if let Some(same) = same {
            if same.finding.process.as_ref().is_some_and(|owner| owner.pid != process.pid) {
                same.others += 1;
            }
            return;
        }
        let owner =
            Owner { pid: process.pid, name: process.name.clone(), service: process.place.name().map(str::to_owned) };
        let finding = Finding { kind, process: Some(owner), reason, cure: cure.into() };
        self.push(Entry { finding, place: Some(process.place.clone()), others: 0 });
    }

    /// Notes one about no process that is known.
    pub(crate) fn about_no_process(
        &mut self,
        kind: Kind,
        reason: impl Into<String>,
        cure: impl Into<Cow<'static, str>>,
    ) {
        let finding = Finding { kind, process: None, reason: reason.into(), cure: cure.into() };
        self.push(Entry { finding, place: None, others: 0 });
    }

    /// Notes what the runtime says of itself.
    pub(crate) fn of_runtime(&mut self, pid: u32, what: &str) {
        let owner = Owner { pid, name: super::processes::name(pid), service: Place::Runtime.name().map(str::to_owned) };
        let reason = format!("says that it can not reseed {}: they go on the same in all forks", clean(what));
        let cure = "see its log for which they are, and reseed them in offshoot_guest.on_identity".into();
        self.push(Entry {
            finding: Finding { kind: Kind::UnseededRandom, process: Some(owner), reason, cure },
            place: None,
            others: 0,
        });
    }

    fn push(&mut self, entry: Entry) {
        if self.list.len() < MAX_FINDINGS { self.list.push(entry) } else { self.left_out += 1 }
    }

    /// All that were kept, and how many were not.
    pub(crate) fn finish(self) -> (Vec<Finding>, usize) {
        let finish = |Entry { mut finding, others, .. }: Entry| {
            match others {
                0 => {}
                1 => finding.reason.push_str("; another process of it too"),
                others => finding.reason.push_str(&format!("; {others} other processes of it too")),
            }
            finding
        };
        (self.list.into_iter().map(finish).collect(), self.left_out)
    }
}

/// A name that a process chose: short, without what drives a terminal, and not if it looks like a secret itself.
pub(super) fn clean(name: &str) -> String {
    const LONGEST: usize = 40;
    if secrets::looks_like(name).is_some() {
        return "(a name that looks like a secret)".to_owned();
    }
    let mut clean = String::new();
    for character in name.chars() {
        let plain = !character.is_control()
            && !matches!(character, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffd}' | '\u{e0000}'..='\u{e007f}');
        if plain {
            clean.push(character)
        } else {
            clean.extend(character.escape_default())
        }
        if clean.len() > LONGEST {
            let end = (0..=LONGEST).rev().find(|&end| clean.is_char_boundary(end)).unwrap_or(0);
            clean.truncate(end);
            clean.push('…');
            break;
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, service: &str) -> Process {
        Process { pid, name: "worker".into(), place: Place::Service(service.into()) }
    }

    #[test]
    fn i17_what_is_true_of_many_processes_of_a_service_is_said_once() {
        let mut findings = Findings::default();
        for pid in 10..13 {
            findings.of(&process(pid, "web"), Kind::UnseededRandom, "has OpenSSL", "restart");
        }
        findings.of(&process(10, "web"), Kind::UnseededRandom, "has OpenSSL", "restart");
        findings.of(&process(13, "other"), Kind::UnseededRandom, "has OpenSSL", "restart");
        let (list, left_out) = findings.finish();
        assert_eq!((list.len(), left_out), (2, 0));
        assert_eq!(list[0].reason, "has OpenSSL; 2 other processes of it too");
        assert_eq!(list[0].process.as_ref().map(|owner| owner.pid), Some(10));
        assert_eq!(list[1].reason, "has OpenSSL");
    }

    #[test]
    fn i17_there_is_a_bound_and_what_is_over_it_is_counted() {
        let mut findings = Findings::default();
        for number in 0..MAX_FINDINGS + 5 {
            findings.of(&process(7, "web"), Kind::TcpConnection, format!("connection {number}"), "");
        }
        let (list, left_out) = findings.finish();
        assert_eq!((list.len(), left_out), (MAX_FINDINGS, 5));
    }

    #[test]
    fn i17_a_name_can_neither_drive_a_terminal_nor_tell_a_secret_nor_go_on_forever() {
        assert_eq!(clean("web \u{1b}[2J\n\u{202e}"), "web \\u{1b}[2J\\n\\u{202e}");
        assert!(!clean("ghp_0123456789abcdefghijABCDEFGHIJ012345").contains("ghp_"));
        assert!(clean(&"ü".repeat(5000)).chars().count() < 50);
        assert_eq!(clean("python3.11"), "python3.11");
    }
}
