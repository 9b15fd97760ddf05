//! Processes that run machines, told from all others: by their program's name, and by the directory they work for.
//!
//! QEMU's working directory is its machine's directory. A worker of ours that runs as root's has left the host's file
//! system, so that its working directory says nothing; but its log, which it holds open, lies in that directory.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use engine::{ProcessRef, process::is_gone};

/// Whether a process' program is an engine's.
pub(crate) fn is_machine(pid: u32) -> bool {
    runs_machine(pid).unwrap_or(false)
}

fn runs_machine(pid: u32) -> io::Result<bool> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    Ok(name.starts_with("qemu-system") || name.trim_end() == engine::kvm::PROGRAM)
}

/// The machines' processes that work for `dir`: that work in it or below, or hold a file there.
///
/// # Errors
/// If a process can not be looked at, but for one that has gone or is somebody else's: one that is overlooked would be one that is left.
pub(crate) fn holders(dir: &Path) -> io::Result<Vec<ProcessRef>> {
    let dir = dir.canonicalize()?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        match holds(pid, &dir) {
            Ok(Some(process)) => found.push(process),
            Ok(None) => {}
            Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// A shell whose user went there is not ours; an engine is.
fn holds(pid: u32, dir: &Path) -> io::Result<Option<ProcessRef>> {
    if pid == std::process::id() || !runs_machine(pid)? {
        return Ok(None);
    }
    // Whether it can be looked at at all, before it counts as holding nothing.
    drop(fs::read_dir(format!("/proc/{pid}/fd"))?);
    if places(pid).any(|place| place.starts_with(dir)) { ProcessRef::of(pid).map(Some) } else { Ok(None) }
}

/// What a process works in and holds open, as far as we may see it.
pub(crate) fn places(pid: u32) -> impl Iterator<Item = PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    [PathBuf::from(format!("/proc/{pid}/cwd"))].into_iter().chain(open).filter_map(|link| fs::read_link(link).ok())
}

/// The part of a process' places below `dir`: the name of the first directory on the way.
pub(crate) fn below(pid: u32, dir: &Path) -> Option<String> {
    places(pid).find_map(|place| {
        let name = place.strip_prefix(dir).ok()?.iter().next()?.to_str()?.to_owned();
        Some(name)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, process::Command};

    use super::*;

    #[test]
    fn a_process_is_found_by_its_directory_or_by_what_it_holds_open() {
        let forks = tempfile::tempdir().unwrap();
        let forks_path = forks.path().canonicalize().unwrap();
        let dir = forks_path.join("one");
        fs::create_dir(&dir).unwrap();
        let log = File::create(dir.join("engine.log")).unwrap();
        let mut inside = Command::new("sleep").arg("1000").current_dir(&dir).spawn().unwrap();
        let mut holding = Command::new("sleep").arg("1000").current_dir("/").stderr(log).spawn().unwrap();
        let mut neither = Command::new("sleep").arg("1000").current_dir("/").spawn().unwrap();
        let found = [&inside, &holding, &neither].map(|child| below(child.id(), &forks_path));
        for child in [&mut inside, &mut holding, &mut neither] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(found, [Some("one".into()), Some("one".into()), None]);
        assert!(!is_machine(std::process::id()));
    }
}
