//! Which pages the first fork of a template copied on its way to its ack, so that later forks have them before they run.
//!
//! ```text
//! <state>/pages/<template id>
//! ```
//!
//! Only a help: a fork without the list is slower, and the next one makes it again.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use engine::{Engine, ProcessRef};
use identity::ForkId;
use store::{Store, Template};

use crate::home::Home;

const HALF_WRITTEN: &str = ".new-";

/// Where a template's list is, or would be. `None` for an id that no template of ours has.
pub(crate) fn file(home: &Home, template: &Template) -> Option<PathBuf> {
    let id = &template.manifest().id;
    // Both kinds of ids are 20 hexadecimal digits.
    ForkId::parse(id).is_ok().then(|| home.pages().join(id))
}

/// Makes the list from a fork that has just acknowledged, unless it is there. What goes wrong is of no importance.
pub(crate) fn note(home: &Home, engine: &dyn Engine, template: &Template, process: &ProcessRef) {
    let Some(path) = file(home, template).filter(|path| !path.exists()) else { return };
    let pages = engine.pages_to_have_ready(&template.memory_file(), template.manifest().machine, process);
    if let Ok(Some(pages)) = pages {
        let _ = write(&path, &pages);
    }
}

/// Lists of templates that are gone, and half-written ones.
///
/// # Errors
/// If the directory can not be read.
pub(crate) fn leftovers(home: &Home, store: &Store) -> io::Result<Vec<PathBuf>> {
    let known: Vec<String> =
        store.list().map_err(io::Error::other)?.into_iter().flatten().map(|manifest| manifest.id).collect();
    let ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        // One that is just being written is lost for its writer, who does not mind.
        name.is_some_and(|name| {
            name.starts_with(HALF_WRITTEN) || ForkId::parse(name).is_ok() && !known.iter().any(|id| id == name)
        })
    };
    Ok(entries(&home.pages())?.into_iter().filter(ours).collect())
}

/// Several first forks may do this at once.
fn write(path: &Path, pages: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(HALF_WRITTEN).tempfile_in(path.parent().unwrap_or(path))?;
    file.write_all(pages)?;
    file.persist(path)?;
    Ok(())
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}
