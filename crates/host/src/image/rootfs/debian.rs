//! A Debian root file system, made by mmdebstrap from the suite's packages and kept as a tar in the cache: another file in
//! the recipe then needs no packages again.

use std::{env, fs, path::Path};

use super::RootError;
use crate::{
    image::{
        cache::Entry,
        ext4,
        program::{self, Program, ProgramError},
    },
    progress::Progress,
};

/// Changes whenever the same packages make another tree.
const FORMAT: &[u8] = b"offshoot debian 1";
/// Nobody reads manuals in a sandbox, and they are a third of a small one. Copyright files stay, as licences ask.
const LEFT_OUT: [&str; 5] = ["doc", "man", "locale", "info", "lintian"];

/// Where packages come from, if not from the distribution's own servers.
fn mirror() -> Option<String> {
    env::var("OFFSHOOT_DEBIAN_MIRROR").ok().filter(|value| !value.is_empty())
}

/// A hash of all that decides what comes out.
pub(super) fn hash(suite: &str, packages: &[String]) -> blake3::Hash {
    let mut hash = blake3::Hasher::new();
    hash.update(FORMAT).update(suite.as_bytes()).update(&[0]);
    hash.update(mirror().unwrap_or_default().as_bytes()).update(&[0]);
    for package in packages {
        hash.update(package.as_bytes()).update(&[0]);
    }
    hash.finalize()
}

/// The path of the tar in the cache, made if it is not there.
pub(super) fn ensure(
    cache: &Path,
    suite: &str,
    packages: &[String],
    progress: &mut dyn FnMut(Progress),
) -> Result<std::path::PathBuf, RootError> {
    let name = format!("debian-{suite}-{}.tar", &hash(suite, packages).to_hex()[..24]);
    let path = cache.join(super::SHELF).join(&name);
    if path.is_file() {
        return Ok(path);
    }
    let entry = Entry::lock(cache, super::SHELF, &name, progress)?;
    if entry.path().is_file() {
        return Ok(entry.path());
    }
    let root = rustix::process::geteuid().is_root();
    if !root {
        check_subordinate_ids()?;
    }
    let work = entry.workspace()?;
    let tar = work.path().join("root.tar");
    let scratch = work.path().join("tmp");
    fs::create_dir(&scratch).map_err(crate::image::cache::CacheError::at("made", &scratch))?;
    if !root {
        // In its user namespace mmdebstrap is another user, who must reach its scratch directory through ours.
        for dir in [work.path(), &scratch] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(if dir == scratch { 0o1777 } else { 0o711 });
            fs::set_permissions(dir, mode).map_err(crate::image::cache::CacheError::at("changed", dir))?;
        }
    }
    let mmdebstrap = Program::new("mmdebstrap", "mmdebstrap").with(|command| {
        command.env("TMPDIR", &scratch).env("SOURCE_DATE_EPOCH", "1");
        command.args([if root { "--mode=root" } else { "--mode=unshare" }, "--variant=apt", "--format=tar"]);
        command.arg("--aptopt=Acquire::Languages \"none\"").arg("--aptopt=APT::Install-Recommends \"false\"");
        for name in LEFT_OUT {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{name}/*"));
        }
        command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
        if !packages.is_empty() {
            command.arg(format!("--include={}", packages.join(",")));
        }
        command.arg("--").arg(suite).arg(&tar).args(mirror());
    });
    let title = format!("Installing Debian {suite} with {} packages", packages.len());
    progress(Progress::step(title.as_str()));
    // Asked while it runs: at its end mmdebstrap has removed what filled the disk.
    let mut full = None;
    let ran = mmdebstrap.run(&mut |line| {
        full = full.take().or_else(|| ext4::out_of_room(&tar));
        // The other lines tell where its scratch directory is, and how it ended.
        if let Some(step) =
            line.strip_prefix("I: ").and_then(|step| step.strip_suffix("...")).filter(|s| !s.contains('/'))
        {
            progress(Progress::step(format!("{title}: {step}")));
        }
    });
    match ran {
        Ok(_) => Ok(entry.publish(&tar)?),
        Err(error @ ProgramError::Failed { .. }) => Err(match full {
            Some(full) => full.into(),
            None => RootError::Debian { suite: suite.to_owned(), source: error },
        }),
        Err(error) => Err(error.into()),
    }
}

/// An ordinary user's mmdebstrap gives files to other users of a user namespace, which takes a range of user ids.
fn check_subordinate_ids() -> Result<(), RootError> {
    if program::find("newuidmap").is_none() {
        return Err(ProgramError::Missing { program: "newuidmap".to_owned(), package: "uidmap" }.into());
    }
    let uid = rustix::process::geteuid().as_raw();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    });
    let user = name.map_or_else(|| uid.to_string(), str::to_owned);
    let listed = |file: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| line.split(':').next().is_some_and(|first| first == user || first == uid.to_string()))
    };
    if listed("/etc/subuid") && listed("/etc/subgid") { Ok(()) } else { Err(RootError::NoSubordinateIds { user }) }
}
