//! Sockets whose other end, or whose address, no fork has. Looked for before the capture ends them, so that their processes can be named.
//!
//! A connection with both ends in the workload goes on in each fork by itself and is none.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use super::{
    findings::{Findings, Kind},
    processes::Process,
};

// include/net/tcp_states.h
const ESTABLISHED: u8 = 1;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

/// Most rows of all tables together.
const MAX_ROWS: usize = 16_384;

const RECONNECT: &str =
    "connect after the fork: let the program connect again when that fails, or use on_fork = \"restart\"";
const CLOSE_IT: &str = "close it before the capture, or use on_fork = \"restart\"";
const LISTEN_ANYWHERE: &str = "bind it to 0.0.0.0, [::] or loopback, or use on_fork = \"restart\"";

/// Which connections the capture ends: those in the agent's network namespace with another address than these.
pub(super) struct Ending {
    /// The agent's network namespace.
    pub(super) namespace: Option<PathBuf>,
    /// Addresses that stay; `None` where there is no card and nothing is ended.
    pub(super) staying: Option<BTreeSet<IpAddr>>,
}

/// A row of `/proc/net/tcp` or one of its kin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    /// 0 if no process has it, or none yet.
    inode: u64,
}

/// Looks at the sockets of all processes; `owner` is the first process that has a socket of this inode.
pub(super) fn look(
    processes: &[Process],
    owners: &BTreeMap<u64, usize>,
    ending: &Ending,
    restarted: impl Fn(&Process) -> bool,
    findings: &mut Findings,
) {
    let mut namespaces = BTreeMap::new();
    for process in processes {
        if let Some(namespace) = process.network_namespace() {
            namespaces.entry(namespace).or_insert(process);
        }
    }
    let mut all: Vec<(bool, bool, Row)> = Vec::new();
    for (namespace, process) in &namespaces {
        let ends_here = Some(namespace) == ending.namespace.as_ref() && ending.staying.is_some();
        for (table, tcp) in [("tcp", true), ("tcp6", true), ("udp", false), ("udp6", false)] {
            let rows = rows(&process.network_table(table));
            all.extend(rows.into_iter().map(|row| (ends_here, tcp, row)).take(MAX_ROWS.saturating_sub(all.len())));
        }
    }
    let ends: BTreeSet<(SocketAddr, SocketAddr)> =
        all.iter().filter(|(_, tcp, _)| *tcp).map(|(_, _, row)| (row.local, row.remote)).collect();
    for (ends_here, tcp, row) in &all {
        let goes = *ends_here && !ending.staying.as_ref().is_some_and(|staying| stays(row.local.ip(), staying));
        let inside = row.local.ip().is_loopback() || ends.contains(&(row.remote, row.local));
        let Some((kind, reason, cure)) = judge(row, *tcp, goes, inside) else { continue };
        match owner(row, &all, owners).and_then(|index| processes.get(index)) {
            Some(process) if restarted(process) => {}
            Some(process) => findings.of(process, kind, reason, cure),
            // Nobody waits for anything of it: it has been closed.
            None => {}
        }
    }
}

fn stays(address: IpAddr, staying: &BTreeSet<IpAddr>) -> bool {
    address.is_unspecified() || address.is_loopback() || staying.contains(&address)
}

/// What is to be said of a socket; `goes`: its address does, at the capture; `inside`: the other end is in the workload too.
fn judge(row: &Row, tcp: bool, goes: bool, inside: bool) -> Option<(Kind, String, &'static str)> {
    let Row { local, remote, state, .. } = row;
    let protocol = if tcp { "TCP" } else { "UDP" };
    match (tcp, *state) {
        (true, TIME_WAIT | CLOSE) => None,
        (true, LISTEN) | (false, CLOSE) if goes => {
            let does = if tcp { "listens at" } else { "is bound to" };
            let reason = format!(
                "{does} {local} ({protocol}), an address that no fork has: the capture ends the socket, and its program sees it fail (ECONNABORTED)"
            );
            Some((Kind::SocketWithAddress, reason, LISTEN_ANYWHERE))
        }
        (true, LISTEN) | (false, CLOSE) => None,
        (false, ESTABLISHED) if goes => {
            let reason = format!(
                "has a UDP socket from {local} to {remote}, and no fork has that address: the capture ends the socket, and its program sees it fail (ECONNABORTED)"
            );
            Some((Kind::SocketWithAddress, reason, RECONNECT))
        }
        (false, _) => None,
        (true, _) if goes => {
            let reason = format!(
                "has a TCP connection from {local} to {remote}, which the capture ends: in each fork its program sees it fail (ECONNABORTED)"
            );
            Some((Kind::TcpConnection, reason, RECONNECT))
        }
        (true, _) if !inside => {
            let reason = format!(
                "has a TCP connection from {local} to {remote}, whose other end is outside of the template: the capture does not end it, and each fork goes on as the same peer"
            );
            Some((Kind::TcpConnection, reason, CLOSE_IT))
        }
        (true, _) => None,
    }
}

/// Who has a socket; of a connection that was not accepted yet, who listens for it.
fn owner(row: &Row, all: &[(bool, bool, Row)], owners: &BTreeMap<u64, usize>) -> Option<usize> {
    if row.inode != 0 {
        return owners.get(&row.inode).copied();
    }
    let listens = |other: &Row| {
        let address = other.local.ip();
        other.state == LISTEN
            && other.local.port() == row.local.port()
            && (address.is_unspecified() || address == row.local.ip())
    };
    let listener = all.iter().find(|(_, tcp, other)| *tcp && listens(other));
    owners.get(&listener?.2.inode).copied()
}

/// The rows of a table. Its first line is a heading.
fn rows(table: &str) -> Vec<Row> {
    table.lines().skip(1).filter_map(row).take(MAX_ROWS).collect()
}

/// `sl local remote state queues timer retransmits uid timeout inode …`, see the kernel's `Documentation/networking/proc_net_tcp.rst`.
fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (address(fields.next()?)?, address(fields.next()?)?);
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    Some(Row { local, remote, state, inode: fields.nth(5)?.parse().ok()? })
}

/// An address in memory's order, in groups of 32 bits in the processor's order, and a port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let group = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match address.len() {
        8 => IpAddr::from(Ipv4Addr::from(group(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&group(index * 8)?);
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 4D0200C0:1B59 4D0200C0:9C40 01 00000000:00000000 00:00000000 00000000     0        0 771 1 0000000000000000 20 4 30 10 -1
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 772 1 0000000000000000 100 0 0 10 0
junk
   2: 0100007F:1B5A
   3: 0100007F:1B5A 0100007G:1B5A 01 0:0 0:0 0 0 0 7
   4: 4D0200C0:1B59 4D0200C0:9C40 06 00000000:00000000 03:00000B78 00000000     0        0 0 3 0000000000000000";

    #[test]
    fn i17_rows_are_read_and_what_is_no_row_is_passed_over() {
        let rows = rows(TCP);
        assert_eq!(rows.len(), 3);
        let local: SocketAddr = "192.0.2.77:7001".parse().unwrap();
        assert_eq!(rows[0], Row { local, remote: "192.0.2.77:40000".parse().unwrap(), state: 1, inode: 771 });
        assert_eq!((rows[1].state, rows[1].local.to_string().as_str()), (LISTEN, "0.0.0.0:80"));
        let six = address("B80D0120000000000000000001000000:01BB").unwrap();
        assert_eq!(six, "[2001:db8::1]:443".parse().unwrap());
        assert_eq!(address("0000000000000000FFFF00000100007F:01BB").unwrap(), "127.0.0.1:443".parse().unwrap());
        for text in ["", ":", "0:0", "0100007F:", "0100007F:10000", "é100007F:0", "0100007F0100007F:1"] {
            assert_eq!(address(text), None, "{text}");
        }
    }

    #[test]
    fn i17_what_the_capture_ends_what_it_does_not_and_what_goes_on_by_itself() {
        let row = rows(TCP)[0];
        let kind = |row: &Row, tcp, goes, inside| judge(row, tcp, goes, inside).map(|(kind, ..)| kind);
        // The capture ends it, though both ends are here: the address goes.
        assert!(judge(&row, true, true, true).unwrap().1.contains("192.0.2.77:40000, which the capture ends"));
        // In a namespace of its own.
        assert!(judge(&row, true, false, false).unwrap().1.contains("does not end it"));
        assert_eq!(kind(&row, true, false, true), None);
        for state in [TIME_WAIT, CLOSE] {
            assert_eq!(kind(&Row { state, ..row }, true, true, false), None);
        }
        let listening = Row { state: LISTEN, ..row };
        assert_eq!(kind(&listening, true, true, false), Some(Kind::SocketWithAddress));
        assert_eq!(kind(&listening, true, false, false), None);
        assert_eq!(kind(&row, false, true, false), Some(Kind::SocketWithAddress));
        assert_eq!(kind(&Row { state: CLOSE, ..row }, false, true, false), Some(Kind::SocketWithAddress));
        assert_eq!(kind(&row, false, false, false), None);
        let staying = BTreeSet::from(["192.0.2.77".parse().unwrap()]);
        assert!(stays(row.local.ip(), &staying) && !stays(row.local.ip(), &BTreeSet::new()));
        for address in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
            assert!(stays(address.parse().unwrap(), &BTreeSet::new()), "{address}");
        }
    }

    #[test]
    fn i17_a_connection_that_was_not_accepted_belongs_to_who_listens() {
        let pending = Row { local: "192.0.2.77:80".parse().unwrap(), inode: 0, ..rows(TCP)[0] };
        let all: Vec<_> = rows(TCP).into_iter().chain([pending]).map(|row| (true, true, row)).collect();
        let owners = BTreeMap::from([(771, 0), (772, 4)]);
        assert_eq!(owner(&pending, &all, &owners), Some(4));
        assert_eq!(owner(&all[0].2, &all, &owners), Some(0));
        assert_eq!(owner(&pending, &all[..1], &owners), None);
    }
}
