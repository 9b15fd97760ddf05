//! Which pages the first fork of a template copied on its way to its ack, so that later forks have them before they run. A fork with a network
//! copies others than one without, so each kind has its own list.
//!
//! ```text
//! <state>/pages/<template id>            without a network
//! <state>/pages/<template id>.network    with one
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

use crate::{home::Home, network::Mode};

const HALF_WRITTEN: &str = ".new-";
/// Ends the name of the list for forks with a network.
const NETWORK: &str = ".network";

/// Where a template's list for forks that are connected so is, or would be. `None` for an id that no template of ours has.
pub(crate) fn file(home: &Home, template: &Template, network: Mode) -> Option<PathBuf> {
    file_of(home, &template.manifest().id, network)
}

fn file_of(home: &Home, id: &str, network: Mode) -> Option<PathBuf> {
    let kind = if network == Mode::None { "" } else { NETWORK };
    // Both kinds of ids are 20 hexadecimal digits.
    ForkId::parse(id).is_ok().then(|| home.pages().join(format!("{id}{kind}")))
}

/// Removes the lists of a template that is gone. What can not be removed `cleanup` finds.
pub(crate) fn remove(home: &Home, template_id: &str) {
    for network in [Mode::None, Mode::Tap] {
        let _ = file_of(home, template_id, network).map(fs::remove_file);
    }
}

/// Makes the list from a fork that has just acknowledged, unless it is there. What goes wrong is of no importance.
pub(crate) fn note(home: &Home, engine: &dyn Engine, template: &Template, network: Mode, process: &ProcessRef) {
    let Some(path) = file(home, template, network).filter(|path| !path.exists()) else { return };
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
            let of = name.strip_suffix(NETWORK).unwrap_or(name);
            name.starts_with(HALF_WRITTEN) || ForkId::parse(of).is_ok() && !known.iter().any(|id| id == of)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_both_kinds_go_with_their_template_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::below(dir.path()).make().unwrap();
        let store = Store::open(&home.data).unwrap();
        let (gone, other) = ("a".repeat(20), "b".repeat(20));
        let of = |id: &str| [id.to_owned(), format!("{id}{NETWORK}")];
        let foreign = ["readme".to_owned(), format!("{gone}.other"), NETWORK.to_owned()];
        for name in of(&gone).iter().chain(&of(&other)).chain(&foreign) {
            fs::write(home.pages().join(name), "").unwrap();
        }
        let names = |mut paths: Vec<PathBuf>| {
            paths.sort();
            paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        // Nobody's templates: all lists are left over, and nothing else is.
        assert_eq!(names(leftovers(&home, &store).unwrap()), [of(&gone), of(&other)].concat());
        remove(&home, &gone);
        assert_eq!(names(leftovers(&home, &store).unwrap()), of(&other));
        assert!(foreign.iter().all(|name| home.pages().join(name).exists()));
        // A template's id is no path.
        remove(&home, "../pages/readme");
        assert!(home.pages().join("readme").exists());
    }
}
