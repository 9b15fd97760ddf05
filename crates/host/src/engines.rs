//! Which engine, and whether hardware virtualisation can be used.

use std::{fs, io, path::Path};

use engine::{
    Accel, EngineError, EngineName,
    qemu::{KvmState, QemuEngine, kvm_state},
};
use store::Manifest;

use crate::home::Home;

/// The engine for a new template: with KVM where a kernel really boots on it, else by emulation; or what the caller
/// forces.
///
/// # Errors
/// [`EngineError`] if there is no engine on this machine.
pub fn for_build(home: &Home, forced: Option<Accel>, kernel: &Path) -> Result<QemuEngine, EngineError> {
    let accel = forced.unwrap_or_else(|| match probe_kvm(home, Some(kernel)) {
        KvmState::Works => Accel::Kvm,
        KvmState::Unusable(_) => Accel::Tcg,
    });
    QemuEngine::find(accel)
}

/// The engine that made a template.
///
/// # Errors
/// [`EngineError`] if it is not on this machine.
pub fn for_template(manifest: &Manifest) -> Result<QemuEngine, EngineError> {
    match manifest.engine.name {
        // Asking for the version takes a third of the time of a fork; a program that is older than the template is the
        // one that built it.
        EngineName::Qemu => match QemuEngine::unchanged_since(manifest.created_ms, &manifest.engine) {
            Some(engine) => Ok(engine),
            None => QemuEngine::find(manifest.engine.accel),
        },
    }
}

/// Whether KVM works; remembered until the host's next boot, because the answer can take a kernel's boot.
#[must_use]
pub fn probe_kvm(home: &Home, kernel: Option<&Path>) -> KvmState {
    let remembered = home.cache.join("kvm-probe.json");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if let Ok(text) = fs::read(&remembered)
        && let Ok((when, state)) = serde_json::from_slice::<(String, KvmState)>(&text)
        && when == boot
    {
        return state;
    }
    let state = match tempfile::tempdir_in(&home.cache) {
        Ok(dir) => kvm_state(kernel, dir.path()),
        Err(error) => KvmState::Unusable(format!("it could not be tried: {error}")),
    };
    // Without a kernel nothing was tried that would be worth remembering.
    if kernel.is_some() {
        let _ = remember(&remembered, &(boot, &state));
    }
    state
}

fn remember(path: &Path, what: &(String, &KvmState)) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(&mut file, what)?;
    file.persist(path)?;
    Ok(())
}
