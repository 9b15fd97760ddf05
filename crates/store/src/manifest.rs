//! The manifest of a template.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    io::Read,
    num::NonZeroU16,
    path::Path,
};

use engine::{EngineInfo, Machine};
use identity::{
    EnvName, Tag,
    mailbox::{MAX_CAPACITY, PAGE_SIZE, PAYLOAD_PER_PAGE},
};
use memory::{Ambiguous, Mailbox};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Finding, MANIFEST, MEMORY, ROOT_IMAGE, STATE};

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
    /// Variables that a fork's caller may set though they decide which code programs run.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub allow_env: BTreeSet<EnvName>,
    /// The port at which its browser answers DevTools, if its recipe names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devtools_port: Option<NonZeroU16>,
    /// What the template itself showed: host name, machine-id… and its answers to the probes.
    pub facts: BTreeMap<String, String>,
    /// What was noticed at the capture, a line of text each, the findings of the audit among it.
    pub warnings: Vec<String>,
    /// What the audit at the capture found, at most 64. Older templates were audited less, and have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
    /// How many more it found.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub findings_left_out: u32,
    /// The guest's `CLOCK_MONOTONIC` when its workload was frozen.
    pub frozen_monotonic_ns: u64,
    /// The guest's `CLOCK_REALTIME` when its workload was frozen.
    pub frozen_wall_ns: u64,
    /// Whether its guest knows rehearsals: those of older templates do not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rehearses: bool,
    /// How long a fork may take until it acknowledges its identity, in milliseconds, by what its recipe has services wait for; 0 in older templates.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ack_limit_ms: u32,
    /// What the build took.
    pub build_millis: u64,
    /// Sizes of its files in bytes.
    pub files: BTreeMap<String, u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // As serde calls it.
fn is_zero(number: &u32) -> bool {
    *number == 0
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
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(ManifestError::Read(io::Error::new(io::ErrorKind::InvalidData, "longer than any manifest")));
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        if format != Self::FORMAT {
            return Err(ManifestError::Format(format));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The rules that the types alone do not hold.
    fn check(&self) -> Result<(), ManifestError> {
        let refuse = |what| Err(ManifestError::Contradiction(what));
        if !crate::building::is_id(&self.id) {
            return refuse("its id is malformed");
        }
        let page = PAGE_SIZE as u64;
        let mut places = BTreeSet::new();
        for mailbox in &self.mailboxes {
            if mailbox.capacity > MAX_CAPACITY || mailbox.pages.len() != mailbox.capacity.div_ceil(PAYLOAD_PER_PAGE) {
                return refuse("a mailbox has another number of pages than its capacity needs");
            }
            for &place in &mailbox.pages {
                let inside = place.checked_add(page).is_some_and(|end| end <= self.machine.memory_bytes);
                if !inside || place % page != 0 || !places.insert(place) {
                    return refuse("a mailbox's page is misplaced");
                }
            }
        }
        Ok(())
    }

    pub(crate) fn read(dir: &Path, tag: &Tag) -> Result<Self, ManifestError> {
        let mut text = Vec::new();
        let file = File::open(dir.join(MANIFEST)).map_err(ManifestError::Read)?;
        file.take(MAX_MANIFEST + 1).read_to_end(&mut text).map_err(ManifestError::Read)?;
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
