//! Which DNS servers a fork gets: those of its host that it can reach.
//!
//! A host's `resolv.conf` is for the host. It often names only a resolver on the host's loopback (systemd-resolved at 127.0.0.53, dnsmasq), which
//! is another one's in the guest; the servers behind it are then in a file of the resolver's own. In mode `tap` an address of the host is
//! out of reach too, and whatever the fork's egress does not allow.

use std::{
    fmt, fs, io,
    io::Read,
    net::{IpAddr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use ipnet::IpNet;
use rustix::fs::OFlags;

use crate::{
    mode::Mode,
    netlink::{Socket, link},
    policy::Egress,
};

/// Most DNS servers of a fork: the C library asks no more.
pub const MAX_DNS: usize = 3;

/// Where servers are looked for, in this order; the first file that names one of use is taken alone. The second is systemd-resolved's, the
/// third NetworkManager's.
const FILES: [&str; 3] =
    ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"];

/// Longest part of a file that is read, in bytes. One with three servers and six domains has less than 2 KiB.
const MAX_FILE: u64 = 64 * 1024;

/// Why a server is of no use to a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// It is the host's own loopback, which in the guest is the guest's.
    Loopback,
    /// It is an address of one link of the host's.
    LinkLocal,
    /// It is an address of the host, which forks in mode `tap` do not reach.
    Host,
    /// The fork's egress does not allow it.
    Egress,
    /// The fork has no address of its family.
    Family,
    /// It is no host's address.
    Special,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "it answers on the host's loopback only",
            Self::LinkLocal => "it is link-local",
            Self::Host => "it is an address of the host, which forks do not reach",
            Self::Egress => "the fork's egress does not allow it",
            Self::Family => "the fork has no address of its family",
            Self::Special => "it is no host's address",
        })
    }
}

/// What decides what a fork reaches.
#[derive(Debug, Clone, Copy)]
pub struct Reach<'a> {
    /// How it is connected.
    pub mode: Mode,
    /// Where its connections may go.
    pub egress: &'a Egress,
    /// Whether it has IPv4.
    pub v4: bool,
    /// Whether it has IPv6.
    pub v6: bool,
}

/// A fork's DNS servers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dns {
    /// The servers, at most [`MAX_DNS`], in the order in which they are asked.
    pub servers: Vec<IpAddr>,
    /// Servers that were left out, or that were asked for and will not answer.
    pub unreachable: Vec<(IpAddr, Unreachable)>,
    asked: bool,
}

impl Dns {
    /// The DNS servers of a fork. `asked` are the caller's: if there are any, they are taken as they are (the first [`MAX_DNS`]), and the
    /// host's are not looked at.
    #[must_use]
    pub fn of(reach: Reach<'_>, asked: &[IpAddr]) -> Self {
        let own = if reach.mode == Mode::Tap {
            Socket::route().and_then(|mut socket| link::addresses(&mut socket)).unwrap_or_default()
        } else {
            Vec::new()
        };
        choose(FILES.map(Path::new), |server| why_not(server, reach, &own), asked)
    }

    /// What people should know, if there is something: why there is no server, or which of those they asked for will not answer.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let because: Vec<_> = self.unreachable.iter().map(|(server, why)| format!("{server}: {why}")).collect();
        let because = because.join("; ");
        if self.asked {
            return (!because.is_empty()).then(|| format!("a DNS server will not answer the fork ({because})"));
        }
        let none = "the fork has no DNS server";
        let help = "give it one with --dns ADDRESS";
        match (self.servers.is_empty(), because.is_empty()) {
            (false, _) => None,
            (true, true) => Some(format!("{none}, because the host names none in /etc/resolv.conf; {help}")),
            (true, false) => Some(format!("{none}, because it can not use those of the host ({because}); {help}")),
        }
    }
}

fn choose<'a>(
    files: impl IntoIterator<Item = &'a Path>,
    why_not: impl Fn(IpAddr) -> Option<Unreachable>,
    asked: &[IpAddr],
) -> Dns {
    let mut dns = Dns { asked: !asked.is_empty(), ..Dns::default() };
    if dns.asked {
        dns.servers = asked[..asked.len().min(MAX_DNS)].to_vec();
        dns.unreachable = dns.servers.iter().filter_map(|&server| Some((server, why_not(server)?))).collect();
        return dns;
    }
    for file in files {
        for server in servers_in(&read(file).unwrap_or_default()) {
            match why_not(server) {
                Some(why) if !dns.unreachable.contains(&(server, why)) => dns.unreachable.push((server, why)),
                Some(_) => {}
                None if dns.servers.len() < MAX_DNS && !dns.servers.contains(&server) => dns.servers.push(server),
                None => {}
            }
        }
        if !dns.servers.is_empty() {
            break;
        }
    }
    // It is for people: a file full of loopback addresses is not.
    dns.unreachable.truncate(MAX_DNS);
    dns
}

/// Reads the beginning of a file. What is no plain file is not waited for.
fn read(path: &Path) -> io::Result<String> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The servers that a `resolv.conf` names. As the C library reads it: the word begins the line, and what follows the address says nothing.
fn servers_in(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let rest = line.strip_prefix("nameserver").filter(|rest| rest.starts_with([' ', '\t']))?;
        let server = rest.split_whitespace().next()?;
        // A link-local address says which link: the name of a card of the host.
        let server = server.split('%').next().unwrap_or(server);
        server.parse::<IpAddr>().ok().map(|server| server.to_canonical())
    })
}

fn why_not(server: IpAddr, reach: Reach<'_>, own: &[IpAddr]) -> Option<Unreachable> {
    // The metadata services of clouds answer DNS there too; rules::never() has the same.
    let site_metadata = [[0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254]];
    let (link_local, special, family) = match server {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets()[0] >= 224 || v4.octets()[0] == 0, reach.v4),
        IpAddr::V6(v6) => (
            v6.is_unicast_link_local() || site_metadata.map(Ipv6Addr::from).contains(&v6),
            v6.is_multicast() || v6.octets()[0] == 0,
            reach.v6,
        ),
    };
    // To connect to "unspecified" is to connect to oneself.
    if server.is_loopback() || server.is_unspecified() {
        Some(Unreachable::Loopback)
    } else if link_local {
        Some(Unreachable::LinkLocal)
    } else if special {
        Some(Unreachable::Special)
    } else if !family {
        Some(Unreachable::Family)
    } else if own.contains(&server) {
        Some(Unreachable::Host)
    } else {
        let allowed = match reach.egress {
            Egress::Allow => true,
            Egress::Deny => false,
            Egress::Only(ranges) => ranges.iter().any(|range: &IpNet| range.contains(&server)),
        };
        (!allowed).then_some(Unreachable::Egress)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OPEN: Reach<'static> = Reach { mode: Mode::Tap, egress: &Egress::Allow, v4: true, v6: true };

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// What is chosen from files of these contents, on a host that has the address 192.0.2.1.
    fn chosen(contents: &[&[u8]], reach: Reach<'_>, asked: &[&str]) -> Dns {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<_> = (0..contents.len()).map(|number| dir.path().join(number.to_string())).collect();
        for (file, content) in files.iter().zip(contents) {
            fs::write(file, content).unwrap();
        }
        let asked: Vec<_> = asked.iter().map(|asked| address(asked)).collect();
        let own = [address("192.0.2.1")];
        choose(files.iter().map(AsRef::as_ref), |server| why_not(server, reach, &own), &asked)
    }

    fn servers(contents: &[&str]) -> Vec<String> {
        let contents: Vec<_> = contents.iter().map(|content| content.as_bytes()).collect();
        chosen(&contents, OPEN, &[]).servers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_hosts_servers_are_taken_in_their_order_and_at_most_three() {
        let file = "# made by hand\nsearch example.com\nnameserver 9.9.9.9\nnameserver\t2620:fe::fe  # quad9\n\
            nameserver 9.9.9.9\nnameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        assert_eq!(servers(&[file]), ["9.9.9.9", "2620:fe::fe", "1.1.1.1"]);
        assert_eq!(servers(&["nameserver 127.0.0.1\nnameserver 1.1.1.1\n"]), ["1.1.1.1"]);
        assert_eq!(servers(&["nameserver 1.1.1.1\n", "nameserver 9.9.9.9\n"]), ["1.1.1.1"]);
    }

    #[test]
    fn a_resolver_on_the_hosts_loopback_is_followed_to_those_behind_it() {
        for loopback in ["127.0.0.53", "127.0.0.1", "::1", "0.0.0.0", "::ffff:127.0.0.1"] {
            let file = format!("nameserver {loopback}\noptions edns0 trust-ad\n");
            assert_eq!(servers(&[&file, "nameserver 1.1.1.1\n"]), ["1.1.1.1"], "{loopback}");
            let dns = chosen(&[file.as_bytes()], OPEN, &[]);
            assert_eq!(dns.servers, [] as [IpAddr; 0]);
            let warning = dns.warning().unwrap();
            assert!(warning.contains("loopback only") && warning.contains("--dns ADDRESS"), "{warning}");
        }
        let warning = chosen(&[b""], OPEN, &[]).warning().unwrap();
        assert!(warning.contains("names none"), "{warning}");
    }

    #[test]
    fn what_a_fork_can_not_reach_is_left_out_and_said() {
        let why = |server: &str, reach| chosen(&[format!("nameserver {server}\n").as_bytes()], reach, &[]).unreachable;
        let is = |server: &str, why| vec![(address(server), why)];
        assert_eq!(why("fe80::1%eth0", OPEN), is("fe80::1", Unreachable::LinkLocal));
        assert_eq!(why("169.254.169.253", OPEN), is("169.254.169.253", Unreachable::LinkLocal));
        assert_eq!(why("192.0.2.1", OPEN), is("192.0.2.1", Unreachable::Host));
        assert_eq!(why("224.0.0.1", OPEN), is("224.0.0.1", Unreachable::Special));
        assert_eq!(why("2620:fe::fe", Reach { v6: false, ..OPEN }), is("2620:fe::fe", Unreachable::Family));
        let deny = Reach { egress: &Egress::Deny, ..OPEN };
        assert_eq!(why("1.1.1.1", deny), is("1.1.1.1", Unreachable::Egress));
        let only = "1.0.0.0/8".parse().unwrap();
        let only = Reach { egress: &only, ..OPEN };
        assert_eq!(why("1.1.1.1", only), []);
        assert_eq!(why("9.9.9.9", only), is("9.9.9.9", Unreachable::Egress));
    }

    #[test]
    fn asked_for_servers_are_taken_as_they_are_with_a_warning() {
        let file: &[u8] = b"nameserver 9.9.9.9\n";
        let dns = chosen(&[file], OPEN, &["1.1.1.1", "192.0.2.1"]);
        assert_eq!(dns.servers, [address("1.1.1.1"), address("192.0.2.1")]);
        assert!(dns.warning().unwrap().contains("192.0.2.1: it is an address of the host"));
        assert_eq!(chosen(&[file], OPEN, &["1.1.1.1"]).warning(), None);
        assert_eq!(chosen(&[], OPEN, &["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"]).servers.len(), MAX_DNS);
    }

    #[test]
    fn hostile_files_name_no_server() {
        for hostile in [
            &b"nameserver1.1.1.1\n Nameserver 1.1.1.1\n nameserver 1.1.1.1\n#nameserver 1.1.1.1\n;nameserver 1.1.1.1\n"
                [..],
            b"nameserver\nnameserver \nnameserver %\nnameserver 1.1.1\nnameserver 1.1.1.1:53\nnameserver 01.1.1.1\n",
            b"nameserver \xff\xfe\nnameserver 1.1.1.1\0\nnameserver $(reboot)\n",
            b"\0\0\0",
        ] {
            assert_eq!(
                chosen(&[hostile], OPEN, &[]).servers,
                [] as [IpAddr; 0],
                "{}",
                String::from_utf8_lossy(hostile)
            );
        }
        let long = [&vec![b'#'; usize::try_from(MAX_FILE).unwrap()][..], b"\nnameserver 1.1.1.1\n"].concat();
        assert!(chosen(&[&long], OPEN, &[]).servers.is_empty(), "it is read to a limit");
        let loopbacks: String =
            (1..1000).map(|number| format!("nameserver 127.0.{}.{}\n", number / 200, number % 200 + 1)).collect();
        assert!(chosen(&[loopbacks.as_bytes()], OPEN, &[]).warning().unwrap().len() < 400);
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let paths = [pipe.as_path(), dir.path(), Path::new("/dev/zero"), Path::new("/nowhere")];
        assert_eq!(choose(paths, |_| None, &[]), Dns::default());
    }

    #[test]
    fn this_hosts_own_addresses_are_known() {
        let mut socket = Socket::route().unwrap();
        assert!(link::addresses(&mut socket).unwrap().contains(&address("127.0.0.1")));
        let _ = Dns::of(OPEN, &[]).warning();
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_fall(text in ".{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(servers_in(&text).count() <= 200);
            let _ = servers_in(&format!("nameserver {}", String::from_utf8_lossy(&bytes))).count();
        }
    }
}
