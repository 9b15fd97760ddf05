//! Tools that are built into the agent and run as processes of the workload, in its root: `offshoot-agent --tool NAME ARG`.
//!
//! They are how `cp` and `verify` work in a root file system that has no shell and no tar.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufReader, BufWriter, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Runs a tool; what goes wrong is said on stderr.
#[must_use]
pub fn tool(name: &str, arg: &str) -> ExitCode {
    let result = match name {
        "pack" => pack(Path::new(arg)),
        "unpack" => unpack(Path::new(arg)),
        "facts" => facts(),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "there is no such tool")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Writes `path` (a file, or a directory with all that is in it) as a tar stream. Entries are named from its last component on.
fn pack(path: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path).map_err(at(path))?;
    let name = path.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from);
    let mut archive = tar::Builder::new(BufWriter::new(io::stdout().lock()));
    archive.follow_symlinks(false);
    if metadata.is_dir() {
        archive.append_dir_all(&name, path).map_err(at(path))?;
    } else {
        // What the name stands for, as cp does for a single file.
        archive.append_file(&name, &mut File::open(path).map_err(at(path))?).map_err(at(path))?;
    }
    archive.into_inner()?.flush()
}

/// Takes a tar stream whose entries all begin with one name. Into an existing directory they go under that name; else that
/// name becomes `path`, as cp does.
fn unpack(path: &Path) -> io::Result<()> {
    let (parent, rename) = if path.is_dir() {
        (path, None)
    } else {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("/"));
        if !parent.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{}: no such directory", parent.display())));
        }
        (parent, path.file_name().map(PathBuf::from))
    };
    let mut archive = tar::Archive::new(BufReader::new(io::stdin().lock()));
    archive.set_preserve_permissions(true);
    archive.set_overwrite(true);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        let mut rest = name.components();
        let first = rest.next().map(|first| PathBuf::from(first.as_os_str())).unwrap_or_default();
        let mut target = rename.clone().unwrap_or(first);
        // Not by joining what is left, even if that is nothing: a file's path must not end in '/'.
        target.extend(rest);
        if target.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an entry points outside"));
        }
        let target = parent.join(target);
        if let Some(directory) = target.parent() {
            fs::create_dir_all(directory).map_err(at(directory))?;
        }
        entry.unpack(&target).map_err(at(&target))?;
    }
    Ok(())
}

/// Who a workload is on the wire: its card's address if that is up, and the addresses that it would send from. Nothing is sent for that.
fn network_facts() -> [(&'static str, Option<String>); 3] {
    let card = || {
        let cards = fs::read_dir("/sys/class/net").ok()?.flatten().map(|entry| entry.path());
        let is_up = |card: &Path| {
            let flags = fs::read_to_string(card.join("flags")).unwrap_or_default();
            let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap_or_default();
            // IFF_UP, and not IFF_LOOPBACK.
            flags & 0b1001 == 0b0001
        };
        let card = cards.filter(|card| is_up(card)).min()?;
        Some(fs::read_to_string(card.join("address")).ok()?.trim_end().to_owned())
    };
    let source = |any: IpAddr, far: IpAddr| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((far, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    // Addresses of documentation (RFC 5737, RFC 3849): nobody has them.
    let far_v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    [
        ("mac", card()),
        ("ipv4", source(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into())),
        ("ipv6", source(Ipv6Addr::UNSPECIFIED.into(), far_v6.into())),
    ]
}

/// What a workload sees of itself.
fn facts() -> io::Result<()> {
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned());
    let uname = rustix::system::uname();
    let mut facts: BTreeMap<&str, Option<String>> = BTreeMap::new();
    facts.insert("hostname", Some(uname.nodename().to_string_lossy().into_owned()));
    facts.insert("machine_id", read("/etc/machine-id"));
    facts.insert("boot_id", read("/proc/sys/kernel/random/boot_id"));
    facts.insert("uuid", read("/proc/sys/kernel/random/uuid"));
    facts.insert("id", read("/run/offshoot/id"));
    facts.insert("name", read("/run/offshoot/name"));
    facts.extend(network_facts());
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    facts.insert("getrandom", Some(format!("{:032x}", u128::from_be_bytes(bytes))));
    let present: BTreeMap<&str, String> = facts.into_iter().filter_map(|(name, fact)| Some((name, fact?))).collect();
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &present)?;
    out.flush()
}
