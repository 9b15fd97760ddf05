//! Which engine, and whether hardware virtualisation can be used.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use engine::{
    Accel, Engine, EngineError, EngineName, KvmState,
    kvm::{self, KvmEngine},
    obstacle,
    qemu::{self, QemuEngine},
};
use serde::{Deserialize, Serialize};
use store::Manifest;
use thiserror::Error;

use crate::home::Home;

/// What a caller asks for instead of what probes find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Forced {
    /// Which engine.
    pub engine: Option<EngineName>,
    /// What executes the guest.
    pub accel: Option<Accel>,
}

/// Why there is no engine for a template.
#[derive(Debug, Error)]
pub enum ChoiceError {
    /// What was asked for contradicts itself.
    #[error("the kvm engine does not emulate; leave out --accel tcg, or use --engine qemu")]
    NoEmulation,
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// The engine for a new template, unless the caller forces one: our own where a kernel really boots on it; else QEMU, with
/// KVM where a kernel boots on that, else by emulation.
///
/// # Errors
/// [`ChoiceError`].
pub fn for_build(home: &Home, forced: Forced, kernel: &Path) -> Result<Box<dyn Engine>, ChoiceError> {
    let works = |engine| probe(home, engine, Some(kernel)) == KvmState::Works;
    let ours = match (forced.engine, forced.accel) {
        (Some(EngineName::Kvm), Some(Accel::Tcg)) => return Err(ChoiceError::NoEmulation),
        (Some(EngineName::Kvm), _) => true,
        (Some(EngineName::Qemu), _) | (None, Some(Accel::Tcg)) => false,
        (None, _) => works(EngineName::Kvm),
    };
    if ours {
        return Ok(Box::new(KvmEngine::find()?));
    }
    let accel = forced.accel.unwrap_or_else(|| if works(EngineName::Qemu) { Accel::Kvm } else { Accel::Tcg });
    Ok(Box::new(QemuEngine::find(accel)?))
}

/// The engine that made a template.
///
/// # Errors
/// [`EngineError`] if it is not on this machine.
pub fn for_template(manifest: &Manifest) -> Result<Box<dyn Engine>, EngineError> {
    Ok(match manifest.engine.name {
        EngineName::Kvm => Box::new(KvmEngine::find()?),
        // Asking for the version takes a third of the time of a fork; a program that is older than the template is the
        // one that built it.
        EngineName::Qemu => match QemuEngine::unchanged_since(manifest.created_ms, &manifest.engine) {
            Some(engine) => Box::new(engine),
            None => Box::new(QemuEngine::find(manifest.engine.accel)?),
        },
    })
}

/// What a probe's answer depends on: the host's boot, and the program that was tried.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tried {
    boot: String,
    /// Path, length in bytes, and time of the last change in seconds since the epoch.
    program: Option<(PathBuf, u64, i64)>,
}

/// Whether an engine can use KVM; remembered until the host's next boot, because the answer can take a kernel's boot.
#[must_use]
pub fn probe(home: &Home, engine: EngineName, kernel: Option<&Path>) -> KvmState {
    if let Some(reason) = obstacle() {
        return KvmState::Unusable(reason);
    }
    let program = match engine {
        EngineName::Qemu => None,
        EngineName::Kvm => match kvm::program() {
            Ok(program) => Some(program),
            Err(error) => return KvmState::Unusable(error.to_string()),
        },
    };
    let Some(kernel) = kernel else { return KvmState::Unusable("no kernel to try it with yet".into()) };
    let tried = Tried {
        boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        program: program.and_then(|path| {
            let metadata = path.metadata().ok()?;
            Some((path, metadata.len(), metadata.ctime()))
        }),
    };
    let remembered = home.cache.join(format!("probe-{engine}.json"));
    if let Ok(text) = fs::read(&remembered)
        && let Ok((when, state)) = serde_json::from_slice::<(Tried, KvmState)>(&text)
        && when == tried
    {
        return state;
    }
    let state = match tempfile::tempdir_in(&home.cache) {
        Ok(dir) => match engine {
            EngineName::Qemu => qemu::probe(kernel, dir.path()),
            EngineName::Kvm => kvm::probe(kernel, dir.path()),
        },
        Err(error) => return KvmState::Unusable(format!("it could not be tried: {error}")),
    };
    let _ = remember(&remembered, &(tried, &state));
    state
}

fn remember(path: &Path, what: &(Tried, &KvmState)) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(&mut file, what)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn our_engine_does_not_emulate() {
        let home = Home::below(Path::new("/nowhere"));
        let forced = Forced { engine: Some(EngineName::Kvm), accel: Some(Accel::Tcg) };
        let refused = for_build(&home, forced, Path::new("/nowhere")).unwrap_err();
        assert!(refused.to_string().contains("--engine qemu"));
    }
}
