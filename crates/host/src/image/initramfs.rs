//! The initramfs: our agent as `/init` and the kernel modules it loads.

use std::{
    env,
    fs::{self, File},
    io::{BufWriter, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    cache::{CacheError, Entry},
    cpio::Writer,
    kernel::{self, GuestKernel, KernelError},
};

const SHELF: &str = "initramfs";
/// Changes whenever the same input makes another archive.
const FORMAT: &[u8] = b"offshoot initramfs 1";
const AGENT: &str = "offshoot-agent";
/// Makes the agent, from the source tree.
const BUILD: &str = "RUSTFLAGS=\"-C target-feature=+crt-static\" cargo build --release -p offshoot-agent --target x86_64-unknown-linux-gnu";
const MAX_FILE: u64 = 1 << 30;

/// Why there is no initramfs.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// The agent is nowhere.
    #[error("the agent was not found (looked for {}); build it with: {BUILD} — and name it in OFFSHOOT_AGENT", list(.0))]
    NoAgent(Vec<PathBuf>),
    /// The agent cannot run as the first program of a guest.
    #[error("{} is not a statically linked x86-64 program, so it cannot be a guest's first; build it with: {BUILD}", .0.display())]
    NotStatic(PathBuf),
    /// A module of the kernel.
    #[error(transparent)]
    Module(#[from] KernelError),
    /// A file.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The agent's program file: `OFFSHOOT_AGENT`, or beside the running program, or in `../lib/offshoot` from there.
///
/// # Errors
/// [`InitramfsError::NoAgent`] and [`InitramfsError::NotStatic`], both with the command that makes it.
pub fn agent_binary() -> Result<PathBuf, InitramfsError> {
    let places = match env::var_os("OFFSHOOT_AGENT").filter(|value| !value.is_empty()) {
        Some(path) => vec![PathBuf::from(path)],
        None => {
            let program = env::current_exe().and_then(fs::canonicalize).unwrap_or_default();
            let beside = program.parent().unwrap_or(Path::new("/"));
            vec![beside.join(AGENT), beside.join("../lib/offshoot").join(AGENT)]
        }
    };
    let Some(path) = places.iter().find(|path| path.is_file()) else {
        return Err(InitramfsError::NoAgent(places));
    };
    if is_static(path).unwrap_or(false) { Ok(path.clone()) } else { Err(InitramfsError::NotStatic(path.clone())) }
}

/// An x86-64 ELF program that names no loader.
pub(super) fn is_static(path: &Path) -> Option<bool> {
    let file = File::open(path).ok()?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut table = [0; 8];
    table.copy_from_slice(&header[0x20..0x28]);
    let program = matches!(half(0x10), 2 | 3) && half(0x12) == 62;
    if &header[..5] != b"\x7fELF\x02" || !program {
        return Some(false);
    }
    let (table, size, count) = (u64::from_le_bytes(table), u64::from(half(0x36)), half(0x38));
    let mut kind = [0; 4];
    for index in 0..u64::from(count) {
        file.read_exact_at(&mut kind, table.checked_add(index * size)?).ok()?;
        // PT_INTERP
        if u32::from_le_bytes(kind) == 3 {
            return Some(false);
        }
    }
    Some(true)
}

/// The initramfs with this agent and this kernel's modules, made if the cache lacks it.
///
/// # Errors
/// [`InitramfsError::Module`], [`InitramfsError::Cache`].
pub fn build(cache: &Path, agent: &Path, kernel: &GuestKernel) -> Result<PathBuf, InitramfsError> {
    let agent = read(agent)?;
    let mut modules = Vec::new();
    for (index, path) in kernel.modules.iter().enumerate() {
        let name = kernel::module_name(path).ok_or_else(|| KernelError::NotAModule(path.clone()))?;
        modules.push((format!("modules/{index:02}-{name}.ko"), kernel::read_module(path)?));
    }
    let mut hash = blake3::Hasher::new();
    hash.update(FORMAT);
    for (name, content) in [("init", &agent)].into_iter().chain(modules.iter().map(|(name, c)| (name.as_str(), c))) {
        hash.update(name.as_bytes()).update(&[0]).update(blake3::hash(content).as_bytes());
    }
    let name = format!("{}.cpio", &hash.finalize().to_hex()[..32]);
    let path = cache.join(SHELF).join(&name);
    if path.is_file() {
        return Ok(path);
    }
    let entry = Entry::lock(cache, SHELF, &name, &mut |_| ())?;
    if entry.path().is_file() {
        return Ok(entry.path());
    }
    let work = entry.workspace()?;
    let finished = work.path().join("initramfs");
    let write = || {
        let mut archive = Writer::new(BufWriter::new(File::create(&finished)?));
        for name in ["dev", "proc", "sys", "run", "sysroot", "modules"] {
            archive.directory(name)?;
        }
        // The kernel opens it for the first program before that can mount anything.
        archive.character_device("dev/console", 0o600, (5, 1))?;
        archive.file("init", 0o755, &agent)?;
        for (name, content) in &modules {
            archive.file(name, 0o644, content)?;
        }
        archive.finish().map(drop)
    };
    write().map_err(CacheError::at("written", &finished))?;
    Ok(entry.publish(&finished)?)
}

fn read(path: &Path) -> Result<Vec<u8>, CacheError> {
    let mut content = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_end(&mut content))
        .map_err(CacheError::at("read", path))?;
    Ok(content)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_program_with_a_loader_is_not_static() {
        assert_eq!(is_static(&fs::canonicalize("/bin/sh").unwrap()), Some(false));
        assert!(!is_static(Path::new("/etc/passwd")).unwrap_or(false));
        // A header with no program headers names no loader.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let mut elf = [0_u8; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[0x10] = 2;
        elf[0x12] = 62;
        fs::write(&path, elf).unwrap();
        assert_eq!(is_static(&path), Some(true));
    }

    #[test]
    fn the_archive_has_all_a_guest_starts_with_and_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let agent = dir.path().join("agent");
        fs::write(&agent, "the agent").unwrap();
        let module = dir.path().join("07-virtio_ring.ko");
        fs::write(&module, "a module").unwrap();
        let kernel = GuestKernel { image: PathBuf::new(), modules: vec![module], version: String::new() };
        let first = build(&cache, &agent, &kernel).unwrap();
        assert_eq!(build(&cache, &agent, &kernel).unwrap(), first);
        let list = Command::new("cpio").args(["-it", "--quiet"]).stdin(File::open(&first).unwrap()).output().unwrap();
        let list = String::from_utf8(list.stdout).unwrap();
        assert_eq!(
            list.lines().collect::<Vec<_>>(),
            ["dev", "proc", "sys", "run", "sysroot", "modules", "dev/console", "init", "modules/00-virtio_ring.ko"]
        );
        fs::write(&agent, "another agent").unwrap();
        assert_ne!(build(&cache, &agent, &kernel).unwrap(), first);
        let left: Vec<_> = fs::read_dir(cache.join(SHELF)).unwrap().flatten().map(|e| e.file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().contains(".tmp-")), "{left:?}");
    }
}
