//! The manifest of a template.

use std::{collections::BTreeMap, fs::File, io, io::Read, path::Path};

use engine::{EngineInfo, Machine};
use identity::Tag;
use memory::{Ambiguous, Mailbox};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{MANIFEST, MEMORY, ROOT_IMAGE, STATE};

/// A manifest has some kilobytes.
const MAX_MANIFEST: u64 = 1 << 20;

/// Everything about a template that is not in its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`Manifest::FORMAT`].
    pub format: u32,
    /// The tag, as its directory is named.
    pub tag: Tag,
    /// 20 random hexadecimal digits: a tag can be built anew, an id can not.
    pub id: String,
    /// When it was built, in milliseconds since the epoch.
    pub created_ms: u64,
    /// What made it. Only the same engine, version and acceleration can load it.
    pub engine: EngineInfo,
    /// Memory and CPUs.
    pub machine: Machine,
    /// Version of the guest's kernel.
    pub kernel: String,
    /// Name of the recipe.
    pub recipe: String,
    /// Mailboxes and where they are.
    pub mailboxes: Vec<Mailbox>,
    /// Names of mailboxes that can not be addressed.
    pub ambiguous: Vec<Ambiguous>,
    /// Questions to the warmed runtime whose answers must differ in every fork: name → code.
    pub probes: BTreeMap<String, String>,
    /// What the template itself showed: host name, machine-id… and its answers to the probes.
    pub facts: BTreeMap<String, String>,
    /// What the audit at the capture found.
    pub warnings: Vec<String>,
    /// The guest's `CLOCK_MONOTONIC` when its workload was frozen.
    pub frozen_monotonic_ns: u64,
    /// The guest's `CLOCK_REALTIME` when its workload was frozen.
    pub frozen_wall_ns: u64,
    /// What the build took.
    pub build_millis: u64,
    /// Sizes of its files in bytes.
    pub files: BTreeMap<String, u64>,
}

/// Why a manifest can not be used.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// It can not be read.
    #[error("its manifest can not be read ({0})")]
    Read(io::Error),
    /// It is not of the form this build knows.
    #[error("its manifest is malformed ({0})")]
    Malformed(serde_json::Error),
    /// It has another format.
    #[error("its manifest has format {0}, and this build knows format {known}", known = Manifest::FORMAT)]
    Format(u32),
    /// It contradicts its directory.
    #[error("its manifest does not belong to it: {0}")]
    Contradiction(&'static str),
}

impl Manifest {
    /// The format this build writes and reads.
    pub const FORMAT: u32 = 1;

    /// Parses a manifest.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        if format != Self::FORMAT {
            return Err(ManifestError::Format(format));
        }
        serde_json::from_slice(bytes).map_err(ManifestError::Malformed)
    }

    pub(crate) fn read(dir: &Path, tag: &Tag) -> Result<Self, ManifestError> {
        let mut text = Vec::new();
        let file = File::open(dir.join(MANIFEST)).map_err(ManifestError::Read)?;
        file.take(MAX_MANIFEST + 1).read_to_end(&mut text).map_err(ManifestError::Read)?;
        if text.len() as u64 > MAX_MANIFEST {
            return Err(ManifestError::Read(io::Error::new(io::ErrorKind::InvalidData, "longer than any manifest")));
        }
        let manifest = Self::parse(&text)?;
        if manifest.tag != *tag {
            return Err(ManifestError::Contradiction("it names another tag"));
        }
        for name in [MEMORY, STATE, ROOT_IMAGE] {
            let len = dir.join(name).metadata().map_err(ManifestError::Read)?.len();
            if manifest.files.get(name) != Some(&len) {
                return Err(ManifestError::Contradiction("a file has another size than it says"));
            }
        }
        if manifest.files.get(MEMORY) != Some(&manifest.machine.memory_bytes) {
            return Err(ManifestError::Contradiction("the memory file does not have the machine's size"));
        }
        Ok(manifest)
    }
}
