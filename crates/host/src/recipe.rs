//! How a template is built: its root file system, what runs in it, and what each of that needs in a fork.
//!
//! A recipe is a folder with a `recipe.toml`, one of the built-in ones, or made up around a root file system given as it
//! is (a directory, a tar archive, an OCI image layout). A recipe may come from elsewhere, so everything in it is
//! bounded and what it names on the host lies in its own folder.

mod expected;
mod file;
#[cfg(test)]
mod tests;
mod values;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    num::NonZeroU16,
    ops::Range,
    path::{Path, PathBuf},
};

use guest_api::{RUNTIME, proto};
use identity::EnvName;
use thiserror::Error;
use toml::Spanned;

use self::file::{
    FileToml, HookWhen, OnFork, RecipeToml, RootKind, RootToml, RuntimeRestart, ServiceRestart, ServiceToml,
};
use crate::{
    handoff::IDENTITY_TIMEOUT,
    image::rootfs::{RootError, oci},
};

const FILE: &str = "recipe.toml";
const MAX_RECIPE: u64 = 256 << 10;
const MAX_FILE: u64 = 16 << 20;
const MAX_FILES: usize = 256;
const MAX_SERVICES: usize = 32;
const MAX_PACKAGES: usize = 512;
const MAX_PROBES: usize = 16;
/// What a browser answers DevTools with, and what is in it.
const CDP_PATH: &str = "/json/version";
const CDP_TEXT: &str = "\"webSocketDebuggerUrl\"";
const DEFAULT_MEMORY: u64 = 256 << 20;
const DEFAULT_TIMEOUT_MS: u32 = 60_000;
const DEFAULT_EVENT_TIMEOUT_MS: u32 = 5_000;
/// What a fork's guest may take besides its services and runtime: 20 s for SSH host keys, and the rest of its steps on a busy host.
const OTHER_STEPS_MS: u32 = 30_000;

/// A recipe of the program itself.
struct BuiltIn {
    name: &'static str,
    recipe: &'static str,
    files: &'static [(&'static str, &'static str)],
}

const BUILT_IN: [BuiltIn; 4] = [
    BuiltIn {
        name: "python",
        recipe: include_str!("../../../recipes/python/recipe.toml"),
        files: &[("bridge.py", include_str!("../../../recipes/python/bridge.py"))],
    },
    BuiltIn {
        name: "node",
        recipe: include_str!("../../../recipes/node/recipe.toml"),
        files: &[
            ("bridge.js", include_str!("../../../recipes/node/bridge.js")),
            ("lines.js", include_str!("../../../recipes/node/lines.js")),
            ("randomness.js", include_str!("../../../recipes/node/randomness.js")),
        ],
    },
    BuiltIn {
        name: "browser",
        recipe: include_str!("../../../recipes/browser/recipe.toml"),
        files: &[("page.html", include_str!("../../../recipes/browser/page.html"))],
    },
    BuiltIn { name: "busybox", recipe: include_str!("../../../recipes/busybox/recipe.toml"), files: &[] },
];

/// The names of the built-in recipes.
#[must_use]
pub fn built_in() -> Vec<&'static str> {
    BUILT_IN.iter().map(|recipe| recipe.name).collect()
}

/// A recipe in which everything is checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// `[a-z0-9-]{1,32}`
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Memory of the guest in bytes, unless the user asks for another size.
    pub memory: u64,
    /// Virtual CPUs, unless the user asks for another number.
    pub vcpus: u32,
    /// Whether the machine has a network card. What it is connected to is said at each fork.
    pub network: bool,
    /// What the root file system is made from.
    pub rootfs: RootSource,
    /// Put into the root file system.
    pub files: Vec<RecipeFile>,
    /// Environment of everything in the workload.
    pub env: BTreeMap<String, String>,
    /// The warmed interpreter that answers `eval`.
    pub runtime: Option<proto::Runtime>,
    /// What else runs.
    pub services: Vec<proto::Service>,
    /// What forks are told besides who they are, and how; without it nothing.
    pub expected: Option<proto::Expected>,
    /// Variables that a fork's caller may set though they decide which code programs run.
    pub allow_env: BTreeSet<EnvName>,
    /// The port at which its browser answers DevTools, if it says one.
    pub devtools_port: Option<NonZeroU16>,
    /// Questions to the runtime whose answers must differ in every fork: name → code. `verify` asks them.
    pub probes: BTreeMap<String, String>,
}

/// What a root file system is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootSource {
    /// Packages of a Debian suite.
    Debian {
        /// "bookworm"
        suite: String,
        /// Besides the essential ones.
        packages: Vec<String>,
    },
    /// The host's static busybox.
    Busybox,
    /// A directory of the host.
    Directory(PathBuf),
    /// A tar archive, plain or compressed with gzip or zstd.
    Tar(PathBuf),
    /// An OCI image layout.
    Oci(PathBuf),
}

impl RootSource {
    /// As it is called in a recipe.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Debian { .. } => "debian",
            Self::Busybox => "busybox",
            Self::Directory(_) => "directory",
            Self::Tar(_) => "tar",
            Self::Oci(_) => "oci",
        }
    }
}

/// A file that the recipe puts into the root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeFile {
    /// Absolute, in the guest.
    pub path: String,
    /// All of it.
    pub content: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
}

/// Why there is no recipe.
#[derive(Debug, Error)]
pub enum RecipeError {
    /// Neither a recipe of ours nor a file.
    #[error("there is no recipe, directory or file {arg:?}; built-in recipes are {}; a folder of your own needs a path, as in ./{arg}", built_in().join(", "))]
    NotFound {
        /// As given.
        arg: String,
    },
    /// A file that is no recipe and no archive.
    #[error("{} is neither a {FILE} nor a .tar, .tar.gz, .tgz or .tar.zst archive; give one of these or a folder", .0.display())]
    UnknownFile(PathBuf),
    /// The text is not TOML, or not a recipe.
    #[error("{name} has a mistake; docs/recipes.md lists what may stand there\n{error}")]
    Syntax {
        /// Which recipe.
        name: String,
        /// With the line and what was expected.
        error: Box<toml::de::Error>,
    },
    /// The parts do not fit together.
    #[error("{name}, line {line}: {why}")]
    Invalid {
        /// Which recipe.
        name: String,
        /// From 1.
        line: usize,
        /// What is wrong and what would be right.
        why: String,
    },
    /// A file of the recipe, or the recipe itself.
    #[error("{} could not be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An OCI layout.
    #[error(transparent)]
    Root(#[from] Box<RootError>),
}

/// Where a recipe's own files are.
enum Folder<'a> {
    Disk(PathBuf),
    Program(&'a BuiltIn),
}

impl Recipe {
    /// A built-in recipe by name; a folder with a `recipe.toml`, or that file; or a root file system: a folder without
    /// one, an OCI layout, a tar archive.
    ///
    /// # Errors
    /// [`RecipeError`], with the line where a recipe is wrong.
    pub fn load(arg: &str) -> Result<Self, RecipeError> {
        if let Some(own) = BUILT_IN.iter().find(|recipe| recipe.name == arg) {
            return parse(own.recipe, &format!("the built-in recipe {}", own.name), &Folder::Program(own));
        }
        let path = Path::new(arg);
        let read = |source| RecipeError::Read { path: path.to_owned(), source };
        let meta = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RecipeError::NotFound { arg: arg.to_owned() });
            }
            other => other.map_err(read)?,
        };
        let path = fs::canonicalize(path).map_err(read)?;
        if meta.is_dir() {
            let recipe = path.join(FILE);
            if recipe.is_file() {
                return Self::from_file(&recipe);
            }
            if path.join("oci-layout").is_file() {
                return Self::around(&path, RootSource::Oci(path.clone()));
            }
            return Self::around(&path, RootSource::Directory(path.clone()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.extension().is_some_and(|extension| extension == "toml") {
            return Self::from_file(&path);
        }
        if [".tar", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|suffix| name.ends_with(suffix)) {
            return Self::around(&path, RootSource::Tar(path.clone()));
        }
        Err(RecipeError::UnknownFile(path))
    }

    fn from_file(path: &Path) -> Result<Self, RecipeError> {
        let text = read_file(path, MAX_RECIPE)?;
        let text = String::from_utf8(text)
            .map_err(|_| RecipeError::Read { path: path.to_owned(), source: io::Error::other("it is not UTF-8") })?;
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        parse(&text, &path.display().to_string(), &Folder::Disk(folder))
    }

    /// A recipe that is a root file system and nothing more, with the environment an image asks for.
    fn around(path: &Path, rootfs: RootSource) -> Result<Self, RecipeError> {
        let env = image_env(&rootfs)?;
        Ok(Self {
            name: name_from(path),
            description: format!("the root file system {}", path.display()),
            memory: DEFAULT_MEMORY,
            vcpus: 1,
            network: true,
            rootfs,
            files: Vec::new(),
            env,
            runtime: None,
            services: Vec::new(),
            expected: None,
            allow_env: BTreeSet::new(),
            devtools_port: None,
            probes: BTreeMap::new(),
        })
    }

    /// What the agent is asked to start, with time for all of it one after the other.
    #[must_use]
    pub fn warm_request(&self) -> proto::WarmRequest {
        let services =
            self.services.iter().filter(|service| service.start_in_template).map(|service| service.timeout_ms);
        let runtime = self.runtime.iter().map(|runtime| runtime.ready_timeout_ms);
        proto::WarmRequest {
            services: self.services.clone(),
            runtime: self.runtime.clone(),
            env: self.env.clone().into_iter().collect(),
            expected: self.expected.clone(),
            timeout_ms: services.chain(runtime).fold(10_000, u32::saturating_add),
        }
    }
}

impl Recipe {
    /// How long a fork may take until it acknowledges its identity: time for all that its services and its runtime do one after the other, each of which
    /// has a deadline of its own in the guest, so that it is the guest that gives up and says on whom it waited.
    #[must_use]
    pub fn ack_limit_ms(&self) -> u32 {
        let acts = |service: &&proto::Service| !service.start_in_template || service.on_fork() != proto::OnFork::Keep;
        let services = self.services.iter().filter(acts).map(|service| service.timeout_ms);
        let runtime = self.runtime.iter().map(|runtime| runtime.event_timeout_ms);
        let limit = services.chain(runtime).fold(OTHER_STEPS_MS, u32::saturating_add);
        limit.max(u32::try_from(IDENTITY_TIMEOUT.as_millis()).unwrap_or(u32::MAX))
    }
}

fn image_env(rootfs: &RootSource) -> Result<BTreeMap<String, String>, RecipeError> {
    let RootSource::Oci(path) = rootfs else { return Ok(BTreeMap::new()) };
    let image = oci::Image::open(path).map_err(Box::new)?;
    let env = image.env().iter().filter(|(name, value)| values::is_env(name, value)).take(256);
    Ok(env.cloned().collect())
}

fn name_from(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let stem = file.split(".t").next().unwrap_or_default();
    let name: String =
        stem.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' }).take(32).collect();
    let name = name.trim_matches('-');
    if values::is_name(name) { name.to_owned() } else { "rootfs".to_owned() }
}

fn read_file(path: &Path, most: u64) -> Result<Vec<u8>, RecipeError> {
    let read = |source| RecipeError::Read { path: path.to_owned(), source };
    // Opening a pipe would wait for its other end.
    if !fs::metadata(path).map_err(read)?.is_file() {
        return Err(read(io::Error::other("it is not a regular file")));
    }
    let mut content = Vec::new();
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut content)).map_err(read)?;
    if content.len() as u64 > most {
        return Err(read(io::Error::other(format!("it is larger than {most} bytes"))));
    }
    Ok(content)
}

impl Folder<'_> {
    /// A path in the folder that really is in it, whatever links there are.
    fn inside(&self, relative: &str) -> Result<PathBuf, String> {
        let Self::Disk(folder) = self else {
            return Err("a built-in recipe has no folder".to_owned());
        };
        let path = Path::new(relative);
        let plain = path
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
        if relative.is_empty() || !plain {
            return Err(format!("{relative:?} must be a path below the recipe's folder, without \"..\""));
        }
        let folder = fs::canonicalize(folder).map_err(|error| format!("the recipe's folder: {error}"))?;
        let full = fs::canonicalize(folder.join(path)).map_err(|error| format!("{relative:?}: {error}"))?;
        if full.starts_with(&folder) {
            Ok(full)
        } else {
            Err(format!("{relative:?} leads out of the recipe's folder; copy what it links to into the folder"))
        }
    }

    fn read(&self, relative: &str) -> Result<Vec<u8>, String> {
        if let Self::Program(own) = self {
            let file = own.files.iter().find(|(name, _)| *name == relative);
            return file.map(|(_, text)| text.as_bytes().to_owned()).ok_or_else(|| format!("no file {relative:?}"));
        }
        read_file(&self.inside(relative)?, MAX_FILE).map_err(|error| error.to_string())
    }
}

fn parse(text: &str, name: &str, folder: &Folder<'_>) -> Result<Recipe, RecipeError> {
    let toml: RecipeToml =
        toml::from_str(text).map_err(|error| RecipeError::Syntax { name: name.to_owned(), error: Box::new(error) })?;
    let invalid = |span: Range<usize>, why: String| RecipeError::Invalid {
        name: name.to_owned(),
        line: file::line(text, &span),
        why,
    };

    let span = toml.rootfs.span();
    let rootfs = root_source(toml.rootfs.into_inner(), folder).map_err(|why| invalid(span, why))?;
    let files =
        check_all(toml.files, MAX_FILES, "files", |file| recipe_file(file, folder)).map_err(|(s, w)| invalid(s, w))?;
    let devtools_port = devtools_port(&toml.services).map_err(|(span, why)| invalid(span, why))?;
    let services = check_all(toml.services, MAX_SERVICES, "services", service).map_err(|(s, w)| invalid(s, w))?;
    let mut names = BTreeSet::new();
    if let Some(twice) = services.iter().find(|service| !names.insert(&service.name)) {
        return Err(invalid(0..0, format!("two services are called {:?}; give each its own name", twice.name)));
    }
    let (expected, allow_env) = match toml.identity {
        Some(identity) => {
            let span = identity.span();
            let (expected, allow) = expected::expected(identity.into_inner()).map_err(|why| invalid(span, why))?;
            (Some(expected), allow)
        }
        None => (None, BTreeSet::new()),
    };
    let mut env = image_env(&rootfs)?;
    env.extend(toml.env.map(|env| env.0).unwrap_or_default());
    let runtime = toml.runtime.map(|runtime| proto::Runtime {
        command: runtime.command.0,
        env: runtime.env.map(|env| env.0.into_iter().collect()).unwrap_or_default(),
        workdir: runtime.workdir.map(|path| path.0).unwrap_or_default(),
        user: runtime.user.map(|user| user.0).unwrap_or_default(),
        restart: match runtime.restart {
            RuntimeRestart::Never => "never",
            RuntimeRestart::OnFailure => "on-failure",
        }
        .to_owned(),
        ready_timeout_ms: runtime.ready_timeout_s.map_or(DEFAULT_TIMEOUT_MS, |time| time.0),
        event_timeout_ms: runtime.event_timeout_s.map_or(DEFAULT_EVENT_TIMEOUT_MS, |time| time.0),
    });
    let probes = toml.probes.unwrap_or_default();
    if !probes.is_empty() && runtime.is_none() {
        return Err(invalid(0..0, "probes are questions to the runtime, and there is no [runtime]".to_owned()));
    }
    if probes.len() > MAX_PROBES
        || probes.iter().any(|(name, code)| name.is_empty() || name.len() > 64 || code.len() > 4096)
    {
        return Err(invalid(
            0..0,
            format!("at most {MAX_PROBES} probes with names up to 64 and code up to 4096 bytes"),
        ));
    }
    Ok(Recipe {
        probes,
        name: toml.name.0,
        description: toml.description.map(|text| text.0).unwrap_or_default(),
        memory: toml.memory.map_or(DEFAULT_MEMORY, |size| size.0),
        vcpus: toml.vcpus.map_or(1, |vcpus| vcpus.0),
        network: toml.network.unwrap_or(true),
        rootfs,
        files,
        env,
        runtime,
        services,
        expected,
        allow_env,
        devtools_port,
    })
}

fn check_all<T, U>(
    all: Vec<Spanned<T>>,
    most: usize,
    what: &str,
    check: impl Fn(T) -> Result<U, String>,
) -> Result<Vec<U>, (Range<usize>, String)> {
    if let Some(extra) = all.get(most) {
        return Err((extra.span(), format!("at most {most} {what} are allowed")));
    }
    all.into_iter()
        .map(|one| {
            let span = one.span();
            check(one.into_inner()).map_err(|why| (span, why))
        })
        .collect()
}

fn root_source(root: RootToml, folder: &Folder<'_>) -> Result<RootSource, String> {
    if root.kind != RootKind::Debian && (root.suite.is_some() || root.packages.is_some()) {
        return Err("suite and packages are for kind = \"debian\" only".to_owned());
    }
    let path = match (root.kind, root.path) {
        (RootKind::Debian | RootKind::Busybox, Some(_)) => {
            return Err("path is for the kinds directory, tar and oci only".to_owned());
        }
        (RootKind::Debian | RootKind::Busybox, None) => PathBuf::new(),
        (_, None) => return Err("this kind needs path = \"…\", relative to the recipe's folder".to_owned()),
        (_, Some(path)) => folder.inside(&path.0)?,
    };
    let is = |right: bool, what: &str| if right { Ok(()) } else { Err(format!("{} is not {what}", path.display())) };
    Ok(match root.kind {
        RootKind::Debian => {
            let suite = root.suite.ok_or("kind = \"debian\" needs suite = \"…\", for example \"bookworm\"")?.0;
            let packages: Vec<String> =
                root.packages.unwrap_or_default().into_iter().map(|package| package.0).collect();
            if packages.len() > MAX_PACKAGES {
                return Err(format!("at most {MAX_PACKAGES} packages are allowed"));
            }
            RootSource::Debian { suite, packages }
        }
        RootKind::Busybox => RootSource::Busybox,
        RootKind::Directory => {
            is(path.is_dir(), "a directory")?;
            RootSource::Directory(path)
        }
        RootKind::Tar => {
            is(path.is_file(), "a file")?;
            RootSource::Tar(path)
        }
        RootKind::Oci => {
            is(path.join("oci-layout").is_file(), "an OCI layout (it has no file oci-layout)")?;
            RootSource::Oci(path)
        }
    })
}

fn recipe_file(file: FileToml, folder: &Folder<'_>) -> Result<RecipeFile, String> {
    let path = file.path.0;
    if path == "/" {
        return Err("a file cannot be put at /".to_owned());
    }
    let content = match (file.source, file.content) {
        (Some(source), None) => folder.read(&source.0)?,
        (None, Some(content)) => content.into_bytes(),
        _ => return Err(format!("the file {path} needs either source = \"…\" or content = \"…\"")),
    };
    Ok(RecipeFile { path, content, mode: file.mode.map_or(0o644, |mode| mode.0) })
}

/// The port of the service that answers DevTools.
fn devtools_port(services: &[Spanned<ServiceToml>]) -> Result<Option<NonZeroU16>, (Range<usize>, String)> {
    let mut all = services.iter().filter_map(|service| Some((service.span(), service.get_ref().ready_cdp?)));
    let first = all.next().map(|(_, port)| port);
    match all.next() {
        Some((span, _)) => Err((span, "one service may have a ready_cdp: which one would `inspect` show?".to_owned())),
        None => Ok(first),
    }
}

fn service(service: ServiceToml) -> Result<proto::Service, String> {
    let name = service.name.0;
    if name == RUNTIME {
        return Err(format!("a service can not be called {RUNTIME}: that is what the warmed runtime is called"));
    }
    let expect = |wanted: bool, given: bool, key: &str| match (wanted, given) {
        (true, false) => Err(format!("the service {name} has on_fork = \"{key}\" and needs {key} = …")),
        (false, true) => Err(format!("the service {name} has {key} = … and needs on_fork = \"{key}\" too")),
        _ => Ok(()),
    };
    expect(service.on_fork == OnFork::Signal, service.signal.is_some(), "signal")?;
    expect(service.on_fork == OnFork::Hook, service.hook.is_some(), "hook")?;
    if service.hook_when.is_some() && service.on_fork != OnFork::Hook {
        return Err(format!("the service {name} has hook_when = … and needs on_fork = \"hook\" too"));
    }
    if service.awaited.is_some() && !matches!(service.on_fork, OnFork::Restart | OnFork::Wait) {
        return Err(format!(
            "the service {name} does not start in a fork, so awaited has no meaning: it is for on_fork = \"restart\" and \"wait\""
        ));
    }
    let ready_line = service.ready_line.map(|text| text.0).unwrap_or_default();
    if ready_line.contains('\n') {
        return Err(format!("ready_line of the service {name} must be one line"));
    }
    if service.ready_cdp.is_some() && service.ready_port.is_some() {
        return Err(format!("ready_cdp of the service {name} is a ready_port by itself; leave out the other"));
    }
    let mut ready_http = service.ready_http.map(|path| path.0).unwrap_or_default();
    let mut ready_text = service.ready_text.map(|text| text.0).unwrap_or_default();
    let ready_port = service.ready_cdp.map(NonZeroU16::get).or(service.ready_port).unwrap_or_default();
    if service.ready_cdp.is_some() && ready_http.is_empty() && ready_text.is_empty() {
        CDP_PATH.clone_into(&mut ready_http);
        CDP_TEXT.clone_into(&mut ready_text);
    }
    if service.ready_port == Some(0)
        || ready_port == 0 && !ready_http.is_empty()
        || ready_http.is_empty() && !ready_text.is_empty()
    {
        return Err(format!(
            "the service {name}: ready_http needs a ready_port (1 to 65535) or ready_cdp, and ready_text a ready_http"
        ));
    }
    if !ready_http.is_empty()
        && (!ready_http.starts_with('/') || ready_http.bytes().any(|byte| !byte.is_ascii_graphic()))
    {
        return Err(format!("ready_http of the service {name} must be a path that begins with /, without blanks"));
    }
    Ok(proto::Service {
        command: service.command.0,
        env: service.env.map(|env| env.0.into_iter().collect()).unwrap_or_default(),
        workdir: service.workdir.map(|path| path.0).unwrap_or_default(),
        user: service.user.map(|user| user.0).unwrap_or_default(),
        start_in_template: service.on_fork != OnFork::Wait,
        on_fork: i32::from(match service.on_fork {
            OnFork::Keep | OnFork::Wait => proto::OnFork::Keep,
            OnFork::Event => proto::OnFork::Event,
            OnFork::Restart => proto::OnFork::Restart,
            OnFork::Signal => proto::OnFork::Signal,
            OnFork::Hook => proto::OnFork::Hook,
        }),
        signal: service.signal.map(|signal| signal.0).unwrap_or_default(),
        hook: service.hook.map(|hook| hook.0).unwrap_or_default(),
        hook_before_thaw: service.hook_when == Some(HookWhen::BeforeThaw),
        not_awaited: service.awaited == Some(false),
        ready_line,
        ready_port: ready_port.into(),
        ready_http,
        ready_text,
        restart: match service.restart {
            ServiceRestart::Never => "never",
            ServiceRestart::OnFailure => "on-failure",
            ServiceRestart::Always => "always",
        }
        .to_owned(),
        timeout_ms: service.timeout_s.map_or(DEFAULT_TIMEOUT_MS, |time| time.0),
        limits: service.limits.map(|limits| proto::Limits {
            memory: limits.memory.map_or(0, |size| size.0),
            pids: limits.pids.map_or(0, |count| count.0),
            cpu_millis: limits.cpu.map_or(0, |cpus| cpus.0),
        }),
        name,
    })
}
