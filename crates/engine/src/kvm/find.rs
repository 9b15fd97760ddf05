//! Where the worker's program is.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use crate::EngineError;

/// The program.
pub const PROGRAM: &str = "offshoot-vmm";

/// The worker's program file: `OFFSHOOT_VMM`, or beside the running program, or in `../lib/offshoot` from there.
///
/// # Errors
/// [`EngineError::NoWorker`], with the command that makes it.
pub fn program() -> Result<PathBuf, EngineError> {
    let places = match env::var_os("OFFSHOOT_VMM").filter(|value| !value.is_empty()) {
        Some(path) => vec![PathBuf::from(path)],
        None => {
            let program = env::current_exe().and_then(fs::canonicalize).unwrap_or_default();
            let beside = program.parent().unwrap_or(Path::new("/"));
            vec![beside.join(PROGRAM), beside.join("../lib/offshoot").join(PROGRAM)]
        }
    };
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(EngineError::NoWorker { places }),
    }
}
