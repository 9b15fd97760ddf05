//! Templates on disk.
//!
//! ```text
//! <data>/templates/<tag>/            a template: manifest.json, memory.img, state.bin, root.img
//! <data>/templates/.building-<id>/   being built; the tag's lock is held by its builder
//! <data>/templates/.removing-<id>/   being removed
//! <data>/locks/<tag>                 the lock of a tag; its content names the holder
//! ```
//!
//! A template appears by one rename, with its manifest written last, and never changes afterwards.
#![forbid(unsafe_code)]

mod building;
mod finding;
mod lock;
mod manifest;

pub use building::{Building, Contents};
pub use finding::{Finding, FoundProcess};
pub use lock::Holder;
pub use manifest::{Manifest, ManifestError};

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use identity::Tag;
use thiserror::Error;

use lock::TagLock;

/// The memory of a template, in its directory.
pub const MEMORY: &str = "memory.img";
/// The device state of a template, in its directory.
pub const STATE: &str = "state.bin";
/// The root image of a template, in its directory.
pub const ROOT_IMAGE: &str = "root.img";
/// The manifest of a template, in its directory.
pub const MANIFEST: &str = "manifest.json";

const BUILDING: &str = ".building-";
const REMOVING: &str = ".removing-";
/// A directory that others pass through and do not read.
const PASSABLE: u32 = 0o711;

/// Why the store refuses.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is no such template.
    #[error(
        "there is no template {tag}; see `offshoot templates`, or make it with `offshoot build RECIPE --tag {tag}`"
    )]
    NotFound {
        /// The tag.
        tag: Tag,
    },
    /// The tag is taken.
    #[error("template {tag} exists already; remove it with `offshoot rmi {tag}` or choose another tag")]
    Exists {
        /// The tag.
        tag: Tag,
    },
    /// Somebody else works on the tag.
    #[error("template {tag} is in use by {holder}; wait until it is done, or end it")]
    Locked {
        /// The tag.
        tag: Tag,
        /// Who.
        holder: Holder,
    },
    /// Something needs it to come back.
    #[error("template {tag} is what {by} come back from; resume or kill them first (see `offshoot ls`)")]
    InUse {
        /// The tag.
        tag: Tag,
        /// Who.
        by: String,
    },
    /// The template is there and can not be used.
    #[error("template {tag} can not be used: {source}; remove it with `offshoot rmi {tag}` and build it again")]
    Broken {
        /// The tag.
        tag: Tag,
        /// Why.
        source: ManifestError,
    },
    /// A file or directory.
    #[error("{step} failed ({path})")]
    File {
        /// The step.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn file<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StoreError + 'a {
    move |source| StoreError::File { step, path: path.to_owned(), source }
}

/// Makes a directory that processes of other users pass through, whatever this process' umask takes away. One that is there stays as it is if it is
/// somebody else's.
fn make_passable(path: &Path) -> Result<(), StoreError> {
    let make = || {
        DirBuilder::new().recursive(true).mode(PASSABLE).create(path)?;
        let found = fs::metadata(path)?;
        let lacks = found.mode() & PASSABLE != PASSABLE && found.uid() == rustix::process::geteuid().as_raw();
        if lacks { fs::set_permissions(path, Permissions::from_mode(found.mode() | PASSABLE)) } else { Ok(()) }
    };
    make().map_err(file("making the directory", path))
}

/// The templates of one data directory.
#[derive(Debug, Clone)]
pub struct Store {
    templates: PathBuf,
    locks: PathBuf,
}

/// A template that can be forked. As long as this value lives, it can not be removed.
#[derive(Debug)]
pub struct Template {
    dir: PathBuf,
    manifest: Manifest,
    _lock: TagLock,
}

impl Template {
    /// What the template says of itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its memory.
    #[must_use]
    pub fn memory_file(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    /// Its device state.
    #[must_use]
    pub fn state_file(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// Its root image.
    #[must_use]
    pub fn root_image(&self) -> PathBuf {
        self.dir.join(ROOT_IMAGE)
    }
}

impl Store {
    /// Opens the store in `data`, which must exist.
    ///
    /// # Errors
    /// If its directories can not be made.
    pub fn open(data: &Path) -> Result<Self, StoreError> {
        let store = Self { templates: data.join("templates"), locks: data.join("locks") };
        // A fork's process passes through the first; nobody else has business in the second.
        make_passable(&store.templates)?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&store.locks);
        made.map_err(file("making the directory", &store.locks))?;
        Ok(store)
    }

    /// Starts a template: takes the tag's lock.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::Locked`]; nothing is made then.
    pub fn begin(&self, tag: &Tag) -> Result<Building, StoreError> {
        let lock = TagLock::exclusive(&self.locks, tag)?;
        if self.dir(tag).exists() {
            return Err(StoreError::Exists { tag: tag.clone() });
        }
        Building::begin(&self.templates, tag, lock)
    }

    /// A template, to fork it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Locked`] while it is being built or removed, [`StoreError::Broken`].
    pub fn get(&self, tag: &Tag) -> Result<Template, StoreError> {
        let dir = self.dir(tag);
        let lock = TagLock::shared(&self.locks, tag)?;
        if !dir.exists() {
            return Err(StoreError::NotFound { tag: tag.clone() });
        }
        let manifest = Manifest::read(&dir, tag).map_err(|source| StoreError::Broken { tag: tag.clone(), source })?;
        Ok(Template { dir, manifest, _lock: lock })
    }

    /// What a template says of itself, for those who only look: nobody is kept from removing it meanwhile.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Broken`].
    pub fn manifest(&self, tag: &Tag) -> Result<Manifest, StoreError> {
        let dir = self.dir(tag);
        Manifest::read(&dir, tag).map_err(|source| match dir.exists() {
            true => StoreError::Broken { tag: tag.clone(), source },
            false => StoreError::NotFound { tag: tag.clone() },
        })
    }

    /// All templates in the order of their tags; those that can not be used with the reason.
    ///
    /// # Errors
    /// If the directory can not be read.
    pub fn list(&self) -> Result<Vec<Result<Manifest, StoreError>>, StoreError> {
        let mut tags: Vec<Tag> = self.names()?.iter().filter_map(|name| Tag::parse(name).ok()).collect();
        tags.sort();
        let read =
            |tag: Tag| Manifest::read(&self.dir(&tag), &tag).map_err(|source| StoreError::Broken { tag, source });
        Ok(tags.into_iter().map(read).collect())
    }

    /// Bytes that a template takes on disk (its holes do not count).
    #[must_use]
    pub fn disk_bytes(&self, tag: &Tag) -> u64 {
        let files = fs::read_dir(self.dir(tag)).into_iter().flatten().flatten();
        files.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
    }

    /// Removes a template. Forks of it that run keep what they have mapped.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Locked`].
    pub fn remove(&self, tag: &Tag) -> Result<(), StoreError> {
        self.remove_unless(tag, |_| None)
    }

    /// The same, unless somebody needs the template of this id: `in_use` says who, while nobody else can do anything with the tag.
    ///
    /// # Errors
    /// As [`remove`](Self::remove); [`StoreError::InUse`].
    pub fn remove_unless(&self, tag: &Tag, in_use: impl FnOnce(&str) -> Option<String>) -> Result<(), StoreError> {
        let _lock = TagLock::exclusive(&self.locks, tag)?;
        let dir = self.dir(tag);
        if !dir.exists() {
            return Err(StoreError::NotFound { tag: tag.clone() });
        }
        // One whose manifest can not be read is of use to nobody.
        if let Ok(manifest) = Manifest::read(&dir, tag)
            && let Some(by) = in_use(&manifest.id)
        {
            return Err(StoreError::InUse { tag: tag.clone(), by });
        }
        // Out of sight in one step: a crash from here on leaves a leftover, never half a template.
        let removing = self.templates.join(format!("{REMOVING}{}", building::random_id()?));
        fs::rename(&dir, &removing).map_err(file("removing the template", &dir))?;
        fs::remove_dir_all(&removing).map_err(file("removing the template", &removing))
    }

    /// Directories of templates that were never finished, or whose removal was not: their maker is gone.
    ///
    /// # Errors
    /// If the directory can not be read.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>, StoreError> {
        let names = self.names()?;
        let ours = names.iter().filter(|name| {
            let id = name.strip_prefix(BUILDING).or_else(|| name.strip_prefix(REMOVING));
            id.is_some_and(building::is_id)
        });
        let left = ours.map(|name| self.templates.join(name)).filter(|dir| !building::is_alive(dir));
        Ok(left.collect())
    }

    fn dir(&self, tag: &Tag) -> PathBuf {
        self.templates.join(tag.as_str())
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let entries = fs::read_dir(&self.templates).map_err(file("reading the templates", &self.templates))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str().map(str::to_owned)).collect())
    }
}
