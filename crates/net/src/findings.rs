//! What a host or a caller lacks for a mode, and what is not safe there, each with what helps: for `doctor`.
//!
//! It is found out by trying: all that a link is made of is made once, in a network namespace that ends with the trial. Modules of the
//! kernel are loaded by that, where the host allows it.
#![allow(unsafe_code)]

use std::{fmt, fs::OpenOptions, io, os::fd::AsFd};

use identity::ForkId;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::{
    address::{GATEWAY_MAC, Pool},
    error::missing_capability,
    host_table, link,
    mode::Mode,
    named_net, namespace,
    netlink::{self, Socket},
    nft,
    policy::{Policy, Rate},
    rules::{self, TAP, WIRE},
    tap::{self, TapOptions},
    user::{self, RunAs, UserAddresses, UserError, UserLink},
};

/// Something that a mode needs and that is not there, or that people should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What, and the kernel's or the program's word on it.
    pub what: String,
    /// What helps: a command, or what to choose instead.
    pub help: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.help)
    }
}

impl Finding {
    fn new(what: impl Into<String>, help: impl Into<String>) -> Self {
        Self { what: what.into(), help: help.into() }
    }

    /// A firewall of the host's: what offshoot's rules accept it may still drop.
    fn of_chain(nft::BaseChain { family, table, chain }: &nft::BaseChain) -> Self {
        Self::new(
            format!(
                "the host's chain {chain} (nft table {family} {table}) drops what it is not told to forward, packets of forks too"
            ),
            format!(
                "nft 'insert rule {family} {table} {chain} iifname \"ofs*\" accept; insert rule {family} {table} {chain} oifname \"ofs*\" accept'"
            ),
        )
    }
}

/// What is missing for a mode, as far as can be told before the first of it is there: nothing is asked of the kernel without the right to.
/// Nothing is left behind. It takes some 50 ms.
#[must_use]
pub fn missing(mode: Mode) -> Vec<Finding> {
    match mode {
        Mode::None => Vec::new(),
        Mode::User => missing_for_user().into_iter().collect(),
        Mode::Tap => missing_for_tap(),
    }
}

fn missing_for_tap() -> Vec<Finding> {
    let mut missing = Vec::new();
    if let Some(capability) = missing_capability() {
        missing.push(Finding::new(
            format!("the capability {capability} is missing"),
            "run offshoot as root (sudo offshoot …), or choose the network `user`",
        ));
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        let help = match error.kind() {
            io::ErrorKind::PermissionDenied => "run offshoot as root",
            _ => "modprobe tun (for a container: --device /dev/net/tun)",
        };
        missing.push(Finding::new(format!("/dev/net/tun can not be opened ({error})"), help));
    }
    // Without the right to try, a refusal would say nothing about the host.
    if missing.is_empty() {
        let trial = namespace::on_own_thread(|| Ok::<_, io::Error>(trial()));
        missing.extend(trial.unwrap_or_else(|error| vec![Finding::new("no thread can be started", error.to_string())]));
    }
    missing
}

/// Makes one of each, in a namespace of the calling thread's own.
fn trial() -> Vec<Finding> {
    // SAFETY: what must not be unshared is the table of file descriptors; a network namespace has no part in memory safety.
    if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
        let what = format!("no network namespace can be made ({})", io::Error::from(error));
        return vec![Finding::new(what, "sysctl -w user.max_net_namespaces=65536 (for a container: --privileged)")];
    }
    let addresses = Pool::default().addresses(Pool::default().gateway());
    let wire = || -> io::Result<()> {
        let own = namespace::own()?;
        let request = netlink::link::new_wire("trial", named_net::group(0), GATEWAY_MAC, WIRE, own.as_fd());
        Socket::route()?.carry_out(vec![request])
    };
    let rate = || -> io::Result<()> {
        let _tap = tap::attach(TAP, TapOptions { owner: 0, vnet_header: false })?;
        let mut socket = Socket::route()?;
        let tap = socket.index_of(TAP)?;
        let rate = Rate::new(Rate::LEAST).map_err(io::Error::other)?;
        socket.carry_out(vec![netlink::link::token_bucket(tap, rate)])
    };
    let rules = || {
        host_table::make_empty()?;
        // Both have one name: in a link they are in two namespaces.
        host_table::remove()?;
        rules::close(&addresses)?;
        rules::open(&addresses, &Policy::default())
    };
    let modules = "modprobe -a nf_tables nf_conntrack nf_nat nft_ct nft_nat nft_masq nft_fib_inet nft_reject_inet nft_connlimit \
        (CONFIG_NF_TABLES_INET and what belongs to it in the kernel's configuration)";
    let results = [
        (
            "the settings of a network namespace can not be written",
            link::set_up_routing(false),
            "mount -o remount,rw /proc/sys (for a container: --privileged)",
        ),
        ("the kernel takes not all packet rules", rules(), modules),
        ("a pair of virtual cards can not be made", wire(), "modprobe veth"),
        ("a tap with a rate can not be made", rate(), "modprobe -a tun sch_tbf"),
    ];
    let lacking = |(what, result, help): (&str, io::Result<()>, &str)| {
        result.err().map(|error| Finding::new(format!("{what} ({error})"), help))
    };
    results.into_iter().filter_map(lacking).collect()
}

/// What people should know before they use a mode here. It is found out by trying, too, and takes some 200 ms.
#[must_use]
pub fn risks(mode: Mode) -> Vec<Finding> {
    match mode {
        Mode::None => Vec::new(),
        Mode::Tap => nft::chains_that_forward_nothing().unwrap_or_default().iter().map(Finding::of_chain).collect(),
        Mode::User => user_risks().unwrap_or_default(),
    }
}

fn user_risks() -> Result<Vec<Finding>, UserError> {
    let mut risks = vec![Finding::new(
        "forks with the network `user` reach the host's services on its addresses, and metadata services of clouds",
        "for guests that are not trusted choose the network `tap`",
    )];
    if user::reaches_loopback()? {
        risks.push(Finding::new(
            "forks with the network `user` reach the host's services on 127.0.0.1: this passt lets them",
            "install a newer passt (that of Debian 13 does not), or choose the network `tap`",
        ));
    }
    Ok(risks)
}

/// Starts passt for a machine that is none, and ends it.
fn missing_for_user() -> Option<Finding> {
    let nobody = ForkId::parse(&"0".repeat(20)).ok()?;
    let trial = UserLink::new(UserAddresses::of(&nobody)).and_then(|(link, machine)| {
        let process = link.start(&Policy::default(), RunAs::default());
        drop(machine);
        process
    });
    let install = "install the package passt (Debian and Ubuntu: apt-get install passt; Fedora: dnf install passt)";
    match trial {
        Ok(_) => None,
        Err(UserError::NoPasst) => Some(Finding::new("the program passt is not installed", install)),
        Err(error) => Some(Finding::new(
            error.to_string(),
            "if it may make no user namespace: sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=65536",
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

    use super::*;

    #[test]
    fn nothing_is_missing_where_these_tests_run_and_nothing_is_left() {
        if missing_capability().is_some() {
            return eprintln!("not run: it needs root");
        }
        let links = || netlink::link::all(&mut Socket::route().unwrap()).unwrap().len();
        let before = links();
        assert_eq!(missing(Mode::Tap), []);
        assert_eq!(missing(Mode::None), []);
        assert_eq!(links(), before);
        if user::find_passt().is_some() {
            assert_eq!(missing(Mode::User), []);
        }
    }

    #[test]
    fn a_missing_right_is_named_with_what_to_do_and_the_kernel_is_not_blamed() {
        std::thread::spawn(|| {
            let none = CapabilitySets {
                effective: CapabilitySet::empty(),
                permitted: CapabilitySet::empty(),
                inheritable: CapabilitySet::empty(),
            };
            set_capabilities(None, none).unwrap();
            let missing = missing(Mode::Tap);
            let text = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            assert!(text.contains("CAP_SYS_ADMIN") && text.contains("sudo") && !text.contains("modprobe -a"), "{text}");
        })
        .join()
        .unwrap();
    }
}
