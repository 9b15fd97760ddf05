//! The guest's root file system as a disk image, whatever the recipe makes it from.

mod busybox;
mod debian;
mod directory;
pub(crate) mod oci;
mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use self::tree::{Content, Meta, Tree};
use super::{
    cache::{CacheError, Entry},
    ext4::{self, Ext4Error},
    program::ProgramError,
};
use crate::{
    progress::Progress,
    recipe::{Recipe, RootSource},
};

const SHELF: &str = "rootfs";
/// Changes whenever the same input makes another image.
const FORMAT: &[u8] = b"offshoot root image 1";
/// What the agent mounts onto, or writes to, in every guest.
const DIRECTORIES: [(&str, u32); 6] =
    [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777), ("etc", 0o755)];

/// A finished root image in the cache, read-only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootImage {
    /// The ext4 image.
    pub path: PathBuf,
    /// Hexadecimal hash of everything that went into it (not of its bytes): equal hashes, equal contents.
    pub hash: String,
    /// Its length in bytes; the file is sparse.
    pub size: u64,
}

/// Why there is no root image.
#[derive(Debug, Error)]
pub enum RootError {
    /// An archive tries what no honest one does.
    #[error("the entry {} is refused: {why}; nothing was kept — get the archive from a source you trust", path.display())]
    Hostile {
        /// The entry.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// More than we unpack.
    #[error(
        "the root file system is larger than 64 GiB or has more than 4 million files; leave out what the guest does not need"
    )]
    TooLarge,
    /// There is nothing in it.
    #[error("{} is empty; give a directory or an archive with a root file system in it", .0.display())]
    Empty(PathBuf),
    /// The archive cannot be read.
    #[error("the archive is damaged or not a tar archive: {0}; check it with: tar -tf FILE")]
    Archive(#[source] io::Error),
    /// A compression we do not read.
    #[error("archives compressed with {0} are not read; unpack it first with: {1} FILE")]
    Compression(&'static str, &'static str),
    /// An OCI layout that is not one, or not for us.
    #[error("the OCI layout cannot be used: {0}")]
    Oci(String),
    /// A blob is not what its digest says.
    #[error(
        "a blob of the OCI layout is damaged or was changed: expected {expected}, found {actual} ({size} bytes); copy the image again"
    )]
    Digest {
        /// From the descriptor.
        expected: String,
        /// Of the file.
        actual: String,
        /// Of the file.
        size: u64,
    },
    /// mmdebstrap failed.
    #[error(
        "Debian {suite} could not be installed; check the names of suite and packages and that its servers are reached (another mirror: OFFSHOOT_DEBIAN_MIRROR)"
    )]
    Debian {
        /// The suite.
        suite: String,
        /// Its last words.
        #[source]
        source: ProgramError,
    },
    /// An ordinary user needs a range of user ids for mmdebstrap.
    #[error(
        "{user} has no subordinate user ids; run: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
    )]
    NoSubordinateIds {
        /// The user.
        user: String,
    },
    /// The host's root directory.
    #[error("{} is this machine's own root directory; give the directory of another root file system", .0.display())]
    OwnRoot(PathBuf),
    /// A program of the distribution.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl From<Ext4Error> for RootError {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::Program(error) => Self::Program(error),
            Ext4Error::Cache(error) => Self::Cache(error),
        }
    }
}

/// The recipe's root image: from the cache if nothing that goes into it has changed, else made. Two at once share the
/// work; a failure leaves nothing behind.
///
/// As root the files keep their owners; as an ordinary user all belong to root in the guest.
///
/// # Errors
/// [`RootError`].
pub fn ensure(cache: &Path, recipe: &Recipe, progress: &mut dyn FnMut(Progress)) -> Result<RootImage, RootError> {
    progress(Progress::step("Looking for the root image"));
    let hash = hash(recipe)?;
    let name = format!("{}.ext4", &hash.to_hex()[..32]);
    let path = cache.join(SHELF).join(&name);
    let found = |path: &Path| {
        let size = fs::metadata(path).ok().filter(fs::Metadata::is_file)?.len();
        Some(RootImage { path: path.to_owned(), hash: hash.to_hex().to_string(), size })
    };
    if let Some(image) = found(&path) {
        return Ok(image);
    }
    // Before the lock: the packages are an entry of their own that other recipes share.
    let debian = match &recipe.rootfs {
        RootSource::Debian { suite, packages } => Some(debian::ensure(cache, suite, packages, progress)?),
        _ => None,
    };
    let entry = Entry::lock(cache, SHELF, &name, progress)?;
    if let Some(image) = found(&path) {
        return Ok(image);
    }
    let work = entry.workspace()?;
    let directory = work.path().join("root");
    let mut tree = Tree::create(&directory)?;
    fill(&mut tree, recipe, debian.as_deref(), progress)?;
    let skipped = tree.finish()?;
    if skipped > 0 {
        progress(Progress::step(format!("Left out {skipped} device nodes (the guest has its own /dev)")));
    }
    progress(Progress::step("Making the root image"));
    let image = work.path().join("image");
    let mut id = [0; 16];
    id.copy_from_slice(&hash.as_bytes()[..16]);
    ext4::make(&directory, &image, id)?;
    let path = entry.publish(&image)?;
    found(&path).ok_or_else(|| CacheError::at("found again", &path)(io::ErrorKind::NotFound.into()).into())
}

fn hash(recipe: &Recipe) -> Result<blake3::Hash, RootError> {
    // An ordinary user's image has other owners than root's.
    let owners = rustix::process::geteuid().is_root();
    let source = match &recipe.rootfs {
        RootSource::Debian { suite, packages } => debian::hash(suite, packages),
        RootSource::Busybox => file_hash(&busybox::find()?)?,
        RootSource::Directory(path) => {
            if fs::canonicalize(path).is_ok_and(|path| path == Path::new("/")) {
                return Err(RootError::OwnRoot(path.clone()));
            }
            directory::hash(path, owners)?
        }
        RootSource::Tar(path) => file_hash(path)?,
        RootSource::Oci(path) => blake3::hash(oci::Image::open(path)?.digest().as_bytes()),
    };
    let mut hash = blake3::Hasher::new();
    hash.update(FORMAT).update(&[u8::from(owners)]).update(recipe.rootfs.kind().as_bytes()).update(source.as_bytes());
    for file in &recipe.files {
        hash.update(file.path.as_bytes()).update(&[0]).update(&file.mode.to_le_bytes());
        hash.update(blake3::hash(&file.content).as_bytes());
    }
    Ok(hash.finalize())
}

fn file_hash(path: &Path) -> Result<blake3::Hash, CacheError> {
    let mut hash = blake3::Hasher::new();
    let file = File::open(path).map_err(CacheError::at("read", path))?;
    hash.update_reader(file).map_err(CacheError::at("read", path))?;
    Ok(hash.finalize())
}

fn fill(
    tree: &mut Tree,
    recipe: &Recipe,
    debian: Option<&Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), RootError> {
    const STEP: &str = "Unpacking the root file system";
    progress(Progress::step(STEP));
    let mut counted = |done, total| progress(Progress { step: STEP.to_owned(), done: Some(done), total: Some(total) });
    match &recipe.rootfs {
        RootSource::Debian { .. } | RootSource::Tar(_) => {
            let path = match &recipe.rootfs {
                RootSource::Tar(path) => path,
                _ => debian.unwrap_or(Path::new("")),
            };
            let total = fs::metadata(path).map_err(CacheError::at("read", path))?.len();
            tar::unpack(path, tree, &mut |read| counted(read, total))?;
        }
        RootSource::Busybox => busybox::fill(&busybox::find()?, tree)?,
        RootSource::Directory(path) => directory::copy(path, tree)?,
        RootSource::Oci(path) => oci::Image::open(path)?.unpack(tree, &mut counted)?,
    }
    for (path, mode) in DIRECTORIES {
        tree.ensure_directory(path, mode)?;
    }
    for file in &recipe.files {
        tree.add(Path::new(&file.path), Meta::root(file.mode), Content::File(&mut file.content.as_slice()))?;
    }
    Ok(())
}
