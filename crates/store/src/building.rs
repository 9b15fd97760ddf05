//! A template while it is being built: a directory that disappears unless it is committed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    num::NonZeroU16,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::SystemTime,
};

use engine::{EngineInfo, Machine, ProcessRef};
use identity::{EnvName, Tag};
use memory::{Ambiguous, Mailbox};
use rustix::fs::{CWD, RenameFlags};

use crate::{BUILDING, Finding, MANIFEST, MEMORY, Manifest, ROOT_IMAGE, STATE, StoreError, file, lock::TagLock};

/// Who builds, in a directory that is being built.
const MAKER: &str = "maker.json";

/// A template that is being built. Dropped before [`Building::commit`], it is removed.
#[derive(Debug)]
pub struct Building {
    dir: PathBuf,
    tag: Tag,
    id: String,
    committed: bool,
    _lock: TagLock,
}

/// What a builder knows of a template.
#[derive(Debug)]
pub struct Contents {
    /// What made it.
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
    /// Questions to the warmed runtime.
    pub probes: BTreeMap<String, String>,
    /// Variables that a fork's caller may set though they decide which code programs run.
    pub allow_env: BTreeSet<EnvName>,
    /// The port at which its browser answers DevTools.
    pub devtools_port: Option<NonZeroU16>,
    /// What the template itself showed.
    pub facts: BTreeMap<String, String>,
    /// What was noticed, as text.
    pub warnings: Vec<String>,
    /// What the audit found.
    pub findings: Vec<Finding>,
    /// How many more it found.
    pub findings_left_out: u32,
    /// The guest's `CLOCK_MONOTONIC` at the freeze.
    pub frozen_monotonic_ns: u64,
    /// The guest's `CLOCK_REALTIME` at the freeze.
    pub frozen_wall_ns: u64,
    /// Whether its machines can rehearse.
    pub rehearses: bool,
    /// How long a fork may take until it acknowledges its identity, in milliseconds.
    pub ack_limit_ms: u32,
    /// What the build took.
    pub build_millis: u64,
    /// Group that the processes of forks belong to (as root).
    pub group: Option<u32>,
    /// Whether the engine can only open the memory file for writing.
    pub memory_writable: bool,
}

impl Building {
    pub(crate) fn begin(templates: &Path, tag: &Tag, lock: TagLock) -> Result<Self, StoreError> {
        let id = random_id()?;
        let dir = templates.join(format!("{BUILDING}{id}"));
        crate::make_passable(&dir)?;
        let building = Self { dir, tag: tag.clone(), id, committed: false, _lock: lock };
        let maker = building.dir.join(MAKER);
        let written = ProcessRef::myself().and_then(|process| fs::write(&maker, serde_json::to_vec(&process)?));
        written.map_err(file("noting who builds", &maker))?;
        Ok(building)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The id that the template will have.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the memory goes.
    #[must_use]
    pub fn memory_file(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    /// Where the device state goes.
    #[must_use]
    pub fn state_file(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// Where the root image goes.
    #[must_use]
    pub fn root_image(&self) -> PathBuf {
        self.dir.join(ROOT_IMAGE)
    }

    /// Makes the template: files read-only and on disk, the manifest last, then one rename.
    ///
    /// # Errors
    /// [`StoreError`]; the directory is removed then.
    pub fn commit(mut self, contents: Contents) -> Result<Manifest, StoreError> {
        let mut files = BTreeMap::new();
        for name in [MEMORY, STATE, ROOT_IMAGE] {
            let path = self.dir.join(name);
            let finish = || -> io::Result<u64> {
                let mode = if name == MEMORY { memory_mode(&contents) } else { 0o444 };
                if name == MEMORY {
                    chown(&path, Some(rustix::process::geteuid().as_raw()), contents.group)?;
                }
                let file = File::open(&path)?;
                file.set_permissions(Permissions::from_mode(mode))?;
                file.sync_all()?;
                Ok(file.metadata()?.len())
            };
            files.insert(name.to_owned(), finish().map_err(file("finishing the template's file", &path))?);
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let manifest = Manifest {
            format: Manifest::FORMAT,
            tag: self.tag.clone(),
            id: self.id.clone(),
            created_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            engine: contents.engine,
            machine: contents.machine,
            kernel: contents.kernel,
            recipe: contents.recipe,
            mailboxes: contents.mailboxes,
            ambiguous: contents.ambiguous,
            probes: contents.probes,
            allow_env: contents.allow_env,
            devtools_port: contents.devtools_port,
            facts: contents.facts,
            warnings: contents.warnings,
            findings: contents.findings,
            findings_left_out: contents.findings_left_out,
            rehearses: contents.rehearses,
            frozen_monotonic_ns: contents.frozen_monotonic_ns,
            frozen_wall_ns: contents.frozen_wall_ns,
            ack_limit_ms: contents.ack_limit_ms,
            build_millis: contents.build_millis,
            files,
        };
        let path = self.dir.join(MANIFEST);
        write_manifest(&path, &manifest).map_err(file("writing the manifest", &path))?;
        let maker = self.dir.join(MAKER);
        fs::remove_file(&maker).map_err(file("finishing the template", &maker))?;
        let parent = self.dir.parent().unwrap_or(Path::new(".")).to_owned();
        let place = parent.join(self.tag.as_str());
        let publish = || -> io::Result<()> {
            File::open(&self.dir)?.sync_all()?;
            // Never over anything, whatever it is.
            rustix::fs::renameat_with(CWD, &self.dir, CWD, &place, RenameFlags::NOREPLACE)?;
            File::open(&parent)?.sync_all()
        };
        publish().map_err(file("publishing the template", &place))?;
        self.committed = true;
        Ok(manifest)
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Rights of the memory file: who may fork may read it. Where the engine can only open it for writing, that right has to
/// be there; it is the template's own group's, or the owner's.
fn memory_mode(contents: &Contents) -> u32 {
    match (contents.group, contents.memory_writable) {
        (Some(_), true) => 0o460,
        (Some(_), false) => 0o440,
        (None, true) => 0o600,
        (None, false) => 0o400,
    }
}

fn write_manifest(path: &Path, manifest: &Manifest) -> io::Result<()> {
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec_pretty(manifest)?)?;
    file.sync_all()
}

/// Whether the process that works on this directory still lives.
pub(crate) fn is_alive(dir: &Path) -> bool {
    let maker = match fs::read(dir.join(MAKER)) {
        Ok(text) => serde_json::from_slice::<ProcessRef>(&text).ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        // Who it is can not be found out, for want of descriptors: he is not to be taken for dead.
        Err(_) => return true,
    };
    match maker {
        Some(maker) => maker.is_alive(),
        // A builder writes its name right after it made the directory: a moment without is no sign of death. A remover
        // writes none, and takes a moment.
        None => is_fresh(dir),
    }
}

fn is_fresh(dir: &Path) -> bool {
    let age = dir.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
    age.is_some_and(|age| age.as_secs() < 10)
}

pub(crate) fn random_id() -> Result<String, StoreError> {
    use std::fmt::Write as _;
    let mut bytes = [0; 10];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::File {
        step: "taking random bytes",
        path: PathBuf::new(),
        source: io::Error::other(error.to_string()),
    })?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 20 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
