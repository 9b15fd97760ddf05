//! The guest's kernel: the distribution's cloud kernel, unpacked from its package into our cache and never installed on
//! the host, or one the user names.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    cache::{CacheError, Entry},
    ext4, module,
    program::{self, Program, ProgramError},
};
use crate::progress::Progress;

/// The package that depends on the newest kernel for virtual machines.
const PACKAGE: &str = "linux-image-cloud-amd64";
/// Its number changes with [`WANTED`]: an entry has the modules of its day.
pub(crate) const SHELF: &str = "kernel-2";
/// What a guest of ours may need. A kernel that has one built in, or lacks it, simply has no such file.
const WANTED: [&str; 12] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    // ext4 asks for it by its algorithm, which is no dependency of a module.
    "crc32c_generic",
    "ext4",
    "overlay",
    // With what it depends on: failover, net_failover.
    "virtio_net",
    // With inet_diag: a capture ends the connections that have the template's address (CONFIG_INET_DIAG_DESTROY).
    "tcp_diag",
    "udp_diag",
    "virtio_rng",
];
/// No module of any kernel we know is near this size.
const MAX_MODULE: u64 = 64 << 20;
const MAX_MODULES: usize = 256;

/// A kernel that guests can be started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestKernel {
    /// The kernel image (bzImage or ELF).
    pub image: PathBuf,
    /// Modules for the initramfs, in the order to load them; perhaps packed.
    pub modules: Vec<PathBuf>,
    /// For people: "6.1.0-31-cloud-amd64 (6.1.128-1)".
    pub version: String,
}

/// Why there is no kernel for guests.
#[derive(Debug, Error)]
pub enum KernelError {
    /// No apt, or it knows no such package, and the cache has no kernel either.
    #[error(
        "no package {PACKAGE} is known here; on Debian run: sudo apt-get update — elsewhere give a kernel with --kernel FILE (its modules installed, or in a folder `modules` beside it)"
    )]
    Unknown,
    /// apt knew the package but could not fetch it.
    #[error(
        "the guest kernel could not be downloaded; if apt's lists are old run: sudo apt-get update — or give one with --kernel FILE"
    )]
    Download(#[source] ProgramError),
    /// The package could not be unpacked.
    #[error("the kernel package could not be unpacked")]
    Unpack(#[source] ProgramError),
    /// The package has no kernel in it.
    #[error("the package {0} has no kernel image in it; give a kernel with --kernel FILE")]
    Empty(String),
    /// The named file is not a kernel.
    #[error("{} is neither a bzImage nor an ELF kernel; give the file that boots (for Debian: /boot/vmlinuz-…)", .0.display())]
    NotAKernel(PathBuf),
    /// A module file cannot be used.
    #[error("{} is not a kernel module that can be used; take it out of the folder, or unpack it first", .0.display())]
    NotAModule(PathBuf),
    /// A file of the cache, or the named kernel.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// The kernel to boot guests with: `explicit`, or the distribution's, fetched into `cache` when it is not there.
///
/// With `explicit` come the modules in the folder `modules` beside it (every `*.ko` there). Without that folder those that
/// are installed for it, if it is called `ROOT/boot/…`: what a guest needs of `ROOT/lib/modules/VERSION`.
///
/// # Errors
/// [`KernelError`]; the cache is left as it was.
pub fn ensure(
    cache: &Path,
    explicit: Option<&Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<GuestKernel, KernelError> {
    if let Some(image) = explicit {
        return from_file(image);
    }
    progress(Progress::step("Looking for the guest kernel"));
    let Some((package, version)) = candidate() else {
        return newest_cached(cache).ok_or(KernelError::Unknown);
    };
    // An epoch's colon is no trouble in a file name, but it is in many tools' arguments.
    let name = format!("{package}_{}", version.replace(':', "%3a"));
    if let Some(kernel) = load(&cache.join(SHELF).join(&name)) {
        return Ok(kernel);
    }
    let entry = Entry::lock(cache, SHELF, &name, progress)?;
    if let Some(kernel) = load(&entry.path()) {
        return Ok(kernel);
    }
    let work = entry.workspace()?;
    progress(Progress::step(format!("Downloading the guest kernel {package} {version}")));
    download(work.path(), &package, &version)?;
    progress(Progress::step("Unpacking the guest kernel"));
    let finished = unpack(work.path(), &package)?;
    let path = entry.publish(&finished)?;
    load(&path).ok_or(KernelError::Empty(package))
}

/// The real package behind the one that only depends on it, and its version.
fn candidate() -> Option<(String, String)> {
    let show = Program::new("apt-cache", "apt").with(|command| {
        command.args(["show", "--no-all-versions", PACKAGE]);
    });
    let show = show.output().ok()?;
    parse_candidate(&String::from_utf8_lossy(&show))
}

fn parse_candidate(show: &str) -> Option<(String, String)> {
    let depends = show.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    let plain = |text: &str| {
        !text.is_empty()
            && text.len() <= 100
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.:~".contains(&b))
    };
    depends.split(',').find_map(|part| {
        let (name, version) = part.trim().split_once(" (= ")?;
        let version = version.strip_suffix(')')?;
        (name.starts_with("linux-image-") && plain(name) && plain(version))
            .then(|| (name.to_owned(), version.to_owned()))
    })
}

fn download(into: &Path, package: &str, version: &str) -> Result<(), KernelError> {
    let get = Program::new("apt-get", "apt").with(|command| {
        // Root's apt would fetch as another user, who cannot write here.
        command
            .args(["-q", "-o", "APT::Sandbox::User=", "download", &format!("{package}={version}")])
            .current_dir(into);
    });
    get.output().map(|_| ()).map_err(|error| {
        ext4::out_of_room(&into.join("package")).map_or(KernelError::Download(error), KernelError::Cache)
    })
}

/// From the package in `work` makes the entry: `vmlinuz` and `modules/NN-name.ko`.
fn unpack(work: &Path, package: &str) -> Result<PathBuf, KernelError> {
    let io = CacheError::at("read", work);
    let deb = fs::read_dir(work)
        .map_err(io)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| KernelError::Empty(package.to_owned()))?;
    let tree = work.join("tree");
    let extract = Program::new("dpkg-deb", "dpkg").with(|command| {
        command.arg("-x").arg(&deb).arg(&tree);
    });
    extract
        .output()
        .map_err(|error| ext4::out_of_room(&tree).map_or(KernelError::Unpack(error), KernelError::Cache))?;

    let finished = work.join("kernel");
    let modules = finished.join("modules");
    fs::create_dir_all(&modules).map_err(CacheError::at("made", &modules))?;
    let release = package.strip_prefix("linux-image-").unwrap_or(package).trim_end_matches("-unsigned");
    let image = tree.join("boot").join(format!("vmlinuz-{release}"));
    if !image.is_file() {
        return Err(KernelError::Empty(package.to_owned()));
    }
    move_file(&image, &finished.join("vmlinuz"))?;

    // Debian moved modules from /lib to /usr/lib.
    let mut files = BTreeMap::new();
    for lib in ["lib/modules", "usr/lib/modules"] {
        find_modules(&tree.join(lib).join(release).join("kernel"), &mut files, 0);
    }
    let names: Vec<&str> = WANTED.to_vec();
    let (order, contents) = order(&names, &files, true)?;
    for (index, name) in order.iter().enumerate() {
        let path = modules.join(format!("{index:02}-{name}.ko"));
        fs::write(&path, contents.get(name).map(Vec::as_slice).unwrap_or_default())
            .map_err(CacheError::at("written", &path))?;
    }
    Ok(finished)
}

fn move_file(from: &Path, to: &Path) -> Result<(), CacheError> {
    fs::rename(from, to).map_err(CacheError::at("moved", from))
}

/// Module files below `dir` by the kernel's name for them.
fn find_modules(dir: &Path, found: &mut BTreeMap<String, PathBuf>, depth: usize) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth < 16 {
                find_modules(&path, found, depth + 1);
            }
        } else if let Some(name) = module_name(&path) {
            found.insert(name, path);
        }
    }
}

/// The kernel's name for the module in a file of this name.
pub(super) fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"].iter().find_map(|suffix| file.strip_suffix(suffix))?;
    // Ours are called NN-name.ko.
    let number = stem.bytes().take_while(u8::is_ascii_digit).count();
    let stem = if number > 0 { stem[number..].strip_prefix('-').unwrap_or(stem) } else { stem };
    Some(module::canonical(stem))
}

/// Modules in the order to load them, and what is in each file.
type Ordered = (Vec<String>, BTreeMap<String, Vec<u8>>);

/// The order to load `wanted` in, and the plain content of those. Reads only what it must: with `lazily`, a module is
/// read when something needs it.
fn order(wanted: &[&str], files: &BTreeMap<String, PathBuf>, lazily: bool) -> Result<Ordered, KernelError> {
    let mut needs = BTreeMap::new();
    let mut contents = BTreeMap::new();
    let mut open: Vec<String> = wanted.iter().map(|name| module::canonical(name)).collect();
    if !lazily {
        open.extend(files.keys().cloned());
    }
    while let Some(name) = open.pop() {
        let Some(path) = files.get(&name).filter(|_| !needs.contains_key(&name)) else { continue };
        if needs.len() == MAX_MODULES {
            return Err(KernelError::NotAModule(path.clone()));
        }
        let content = read_module(path)?;
        let own = module::dependencies(&content).ok_or_else(|| KernelError::NotAModule(path.clone()))?;
        open.extend(own.iter().cloned());
        needs.insert(name.clone(), own);
        contents.insert(name, content);
    }
    Ok((module::load_order(wanted, &needs), contents))
}

/// A module's content, unpacked: the guest has no program to do it, and not every kernel can.
///
/// # Errors
/// [`KernelError::NotAModule`], [`KernelError::Unpack`], [`KernelError::Cache`].
pub(super) fn read_module(path: &Path) -> Result<Vec<u8>, KernelError> {
    let bad = || KernelError::NotAModule(path.to_owned());
    let mut file = File::open(path).map_err(CacheError::at("read", path))?;
    let mut content = Vec::new();
    let extension = path.extension().unwrap_or_default();
    let outcome = if extension == "gz" {
        flate2::read::GzDecoder::new(file).take(MAX_MODULE).read_to_end(&mut content)
    } else if extension == "zst" {
        ruzstd::decoding::StreamingDecoder::new(&mut file)
            .map_err(|_| bad())?
            .take(MAX_MODULE)
            .read_to_end(&mut content)
    } else if extension == "xz" {
        let unpack = Program::new("xz", "xz-utils").with(|command| {
            command.arg("-dc").arg(path);
        });
        content = unpack.output().map_err(KernelError::Unpack)?;
        Ok(content.len())
    } else {
        file.take(MAX_MODULE).read_to_end(&mut content)
    };
    outcome.map_err(CacheError::at("read", path))?;
    Ok(content)
}

/// A finished entry of the cache.
fn load(dir: &Path) -> Option<GuestKernel> {
    let image = dir.join("vmlinuz");
    if !image.is_file() {
        return None;
    }
    let mut modules: Vec<PathBuf> =
        fs::read_dir(dir.join("modules")).ok()?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    let name = dir.file_name()?.to_str()?;
    let (package, version) = name.split_once('_')?;
    let release = package.strip_prefix("linux-image-").unwrap_or(package);
    Some(GuestKernel { image, modules, version: format!("{release} ({})", version.replace("%3a", ":")) })
}

/// Without apt (or its lists) what was fetched before serves.
fn newest_cached(cache: &Path) -> Option<GuestKernel> {
    let entries = fs::read_dir(cache.join(SHELF)).ok()?.flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("linux-image-"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    found.sort();
    found.iter().rev().find_map(|(_, path)| load(path))
}

fn from_file(image: &Path) -> Result<GuestKernel, KernelError> {
    let file = File::open(image).map_err(CacheError::at("read", image))?;
    let version = kernel_version(&file).ok_or_else(|| KernelError::NotAKernel(image.to_owned()))?;
    let image = fs::canonicalize(image).map_err(CacheError::at("read", image))?;
    let folder = image.with_file_name("modules");
    let mut files = BTreeMap::new();
    let mut wanted = WANTED.to_vec();
    let chosen = folder.is_dir();
    if chosen {
        for entry in fs::read_dir(&folder).map_err(CacheError::at("read", &folder))?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "ko")
                && let Some(name) = module_name(&path)
            {
                files.insert(name, path);
            }
        }
    } else {
        for folder in installed_modules(&image, &version) {
            find_modules(&folder, &mut files, 0);
        }
    }
    if chosen {
        // What we know to need comes first, in our order; then whatever else the user put there.
        wanted.extend(files.keys().map(String::as_str));
    }
    let (order, _) = order(&wanted, &files, !chosen)?;
    let modules = order.iter().filter_map(|name| files.get(name).cloned()).collect();
    Ok(GuestKernel { image, modules, version })
}

/// Where the modules of a kernel lie that was installed, or whose package was unpacked.
fn installed_modules(image: &Path, version: &str) -> Vec<PathBuf> {
    // The version is what the file says: no path.
    let boot = image.parent().filter(|folder| folder.ends_with("boot"));
    match boot.and_then(Path::parent) {
        Some(root) if Path::new(version).file_name() == Some(version.as_ref()) => {
            ["lib/modules", "usr/lib/modules"].map(|lib| root.join(lib).join(version).join("kernel")).to_vec()
        }
        _ => Vec::new(),
    }
}

/// The version text of a bzImage (`kernel_version` of the boot protocol), "custom" for an ELF; `None` for anything else.
fn kernel_version(file: &File) -> Option<String> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).ok()?;
    if &magic == b"\x7fELF" {
        return Some("custom".to_owned());
    }
    file.read_exact_at(&mut magic, 0x202).ok()?;
    if &magic != b"HdrS" {
        return None;
    }
    let mut pointer = [0; 2];
    file.read_exact_at(&mut pointer, 0x20e).ok()?;
    let mut text = [0; 64];
    let read = read_up_to(file, &mut text, u64::from(u16::from_le_bytes(pointer)) + 0x200).ok()?;
    let text: String = String::from_utf8_lossy(&text[..read]).chars().take_while(|c| c.is_ascii_graphic()).collect();
    Some(if text.is_empty() { "custom".to_owned() } else { text })
}

fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    file.read_at(buffer, at)
}

/// Whether a distribution's kernel could be fetched at all (for `doctor`).
#[must_use]
pub fn can_fetch() -> bool {
    program::find("apt-get").is_some() && program::find("dpkg-deb").is_some() && candidate().is_some()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_real_package_is_read_from_the_one_that_depends_on_it() {
        let show = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-31-cloud-amd64 (= 6.1.128-1)\n";
        let (package, version) = parse_candidate(show).unwrap();
        assert_eq!((package.as_str(), version.as_str()), ("linux-image-6.1.0-31-cloud-amd64", "6.1.128-1"));
        for bad in
            ["", "Depends: other (= 1)\n", "Depends: linux-image-../x (= 1)\n", "Depends: linux-image-x (= $(id))\n"]
        {
            assert!(parse_candidate(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_kernel_of_the_users_own_is_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bzImage");
        let mut image = vec![0; 0x600];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x30c].copy_from_slice(b"6.6.6-mine #");
        fs::write(&path, &image).unwrap();
        let kernel = ensure(dir.path(), Some(&path), &mut |_| ()).unwrap();
        assert_eq!(kernel.version, "6.6.6-mine");
        assert!(kernel.modules.is_empty());

        fs::create_dir(dir.path().join("modules")).unwrap();
        fs::write(dir.path().join("modules/virtio.ko"), "not one").unwrap();
        assert!(matches!(ensure(dir.path(), Some(&path), &mut |_| ()), Err(KernelError::NotAModule(_))));
        fs::write(&path, "text").unwrap();
        assert!(matches!(ensure(dir.path(), Some(&path), &mut |_| ()), Err(KernelError::NotAKernel(_))));
        assert!(matches!(ensure(dir.path(), Some(&dir.path().join("none")), &mut |_| ()), Err(KernelError::Cache(_))));
    }

    #[test]
    fn an_installed_kernel_of_the_users_own_has_its_modules() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = |version: &str| {
            let path = dir.path().join("boot/vmlinuz");
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mut image = vec![0; 0x600];
            image[0x202..0x206].copy_from_slice(b"HdrS");
            image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
            image[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
            fs::write(&path, &image).unwrap();
            ensure(dir.path(), Some(&path), &mut |_| ())
        };
        let place = |path: &str, content: &[u8]| {
            let path = dir.path().join("lib/modules/6.6.6-mine/kernel").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
        };
        place("fs/ext4/ext4.ko", &module::tests::module(b"depends=mbcache\0"));
        place("fs/mbcache.ko", &module::tests::module(b"depends=\0"));
        // What no guest needs is not even read.
        place("drivers/other.ko", b"not one");
        let found = kernel("6.6.6-mine").unwrap();
        let names: Vec<_> = found.modules.iter().map(|path| module_name(path).unwrap()).collect();
        assert_eq!(names, ["mbcache", "ext4"]);
        for version in ["6.6.7", "../modules/6.6.6-mine", ".."] {
            assert!(kernel(version).unwrap().modules.is_empty(), "{version}");
        }
        // A folder of the user's own goes first.
        fs::create_dir(dir.path().join("boot/modules")).unwrap();
        assert!(kernel("6.6.6-mine").unwrap().modules.is_empty());
    }

    #[test]
    fn names_of_modules_are_the_kernels() {
        for (file, name) in
            [("virtio-rng.ko", "virtio_rng"), ("00-virtio_ring.ko", "virtio_ring"), ("8021q.ko.xz", "8021q")]
        {
            assert_eq!(module_name(Path::new(file)).unwrap(), name);
        }
        assert!(module_name(Path::new("modules.dep")).is_none());
    }
}
