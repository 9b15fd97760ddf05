//! Loading the kernel's modules that the initramfs carries.

use std::{fs, io};

use rustix::fs::{Mode, OFlags};

use super::{BootError, step};

/// `MODULE_INIT_COMPRESSED_FILE` of `linux/module.h`: the kernel unpacks the file itself.
const COMPRESSED: i32 = 4;

/// Loads every module in `folder`, in the order of their names, and removes the files (the initramfs is memory).
///
/// # Errors
/// The first module that the kernel refuses. One that is loaded or built in already is fine.
pub fn load_all(folder: &str) -> Result<(), BootError> {
    let mut paths: Vec<_> = match fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(step("list the kernel modules")(error)),
    };
    paths.sort();
    for path in paths {
        let what = format!("load the kernel module {}", path.display());
        let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(step(&what))?;
        let compressed = path.extension().is_some_and(|extension| extension != "ko");
        match rustix::system::finit_module(&file, c"", if compressed { COMPRESSED } else { 0 }) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(step(&what)(error)),
        }
        // Best effort: a file that stays costs only memory.
        let _ = fs::remove_file(&path);
    }
    Ok(())
}
