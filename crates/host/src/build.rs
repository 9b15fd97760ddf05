//! `build`: boots a template, warms it up, freezes it, and captures memory and devices.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use engine::{AckStream, BootSpec, CONSOLE, Engine, EngineError, Machine};
use guest_api::proto;
use identity::{MailboxName, Tag};
use memory::{ExpectedMailbox, PlantedBy};
use store::{Building, Manifest, Store, StoreError};
use thiserror::Error;

use crate::{
    audit::{Findings, FindingsError},
    confine,
    engines::{self, ChoiceError, Forced},
    fault,
    guest::{GuestChannel, GuestError},
    home::Home,
    image::{initramfs, kernel, rootfs},
    progress::Progress,
    recipe::{Recipe, RecipeError},
    verify,
};

/// Time for the guest to boot and its agent to answer: 3 s under emulation on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Time for the agent to freeze the workload and arm its mailboxes.
const QUIESCE_LIMIT: Duration = Duration::from_secs(60);
/// What the agent writes to the ack port once it waits for its identity and nothing else is left to do in the guest.
pub(crate) const ARMED: &[u8] = b"offshoot-armed\n";

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// A recipe's name, or the path of a recipe or root file system.
    pub recipe: String,
    /// The template's tag.
    pub tag: Tag,
    /// Guest memory in bytes, instead of the recipe's.
    pub memory: Option<u64>,
    /// Virtual CPUs, instead of the recipe's.
    pub vcpus: Option<u32>,
    /// A kernel instead of the distribution's.
    pub kernel: Option<PathBuf>,
    /// Engine and acceleration, instead of what probes find.
    pub forced: Forced,
    /// Whether a finding of the audit is an error.
    pub strict: bool,
}

/// Why a template was not built. Nothing of it is left.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The recipe can not be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A number is out of its range.
    #[error("{what} must be from {min} to {max}, not {given}")]
    Range {
        /// What.
        what: &'static str,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
        /// Given.
        given: u64,
    },
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No kernel.
    #[error("there is no guest kernel")]
    Kernel(#[from] kernel::KernelError),
    /// No root image.
    #[error("the root image could not be made")]
    RootImage(#[from] rootfs::RootError),
    /// No initramfs.
    #[error("the initramfs could not be made")]
    Initramfs(#[from] initramfs::InitramfsError),
    /// No engine.
    #[error(transparent)]
    NoEngine(#[from] ChoiceError),
    /// The machine.
    #[error("the template's machine failed{}", console_text(console))]
    Engine {
        /// The cause.
        #[source]
        source: EngineError,
        /// The end of the guest's console.
        console: String,
    },
    /// The agent did not do its part.
    #[error("the agent in the template failed while {during}{}", console_text(console))]
    Guest {
        /// What was going on.
        during: &'static str,
        /// The cause.
        #[source]
        source: GuestError,
        /// The end of the guest's console.
        console: String,
    },
    /// It is wanted without findings, and has some.
    #[error("the audit of the template has {count} {}; nothing of it is left", if *count == 1 { "finding" } else { "findings" })]
    NotClean {
        /// How many.
        count: usize,
        /// What they are.
        source: Box<FindingsError>,
    },
    /// It is wanted without findings, and nobody has looked.
    #[error(
        "the agent of the template does not audit it: it is older than this program, or does not freeze its workload"
    )]
    NotAudited,
    /// The agent did not arm.
    #[error("the agent did not come to rest after the freeze{}", console_text(console))]
    NotArmed {
        /// The end of the guest's console.
        console: String,
    },
    /// The mailboxes in memory are not as they must be.
    #[error("the template's mailboxes can not be used")]
    Scan(#[from] memory::ScanError),
    /// A file.
    #[error("{step} failed")]
    File {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn console_text(console: &str) -> String {
    if console.is_empty() { String::new() } else { format!("; the guest's console ends with:\n{console}") }
}

/// Builds a template.
///
/// # Errors
/// [`BuildError`]; nothing is left behind.
pub fn build(
    home: &Home,
    store: &Store,
    request: &BuildRequest,
    progress: &mut dyn FnMut(Progress),
) -> Result<Manifest, BuildError> {
    let started = Instant::now();
    let recipe = Recipe::load(&request.recipe)?;
    let machine = machine(request, &recipe)?;
    // The lock of the tag comes before any costly work: a second builder is told at once.
    let building = store.begin(&request.tag)?;
    let kernel = kernel::ensure(&home.cache, request.kernel.as_deref(), progress)?;
    let root = rootfs::ensure(&home.cache, &recipe, progress)?;
    let initramfs = initramfs::build(&home.cache, &initramfs::agent_binary()?, &kernel)?;
    let engine = engines::for_build(home, request.forced, &kernel.image)?;
    fault::point("build.images", None).map_err(file("making the images"))?;
    link_or_copy(&root.path, &building.root_image()).map_err(file("copying the root image"))?;

    let run = building.dir().join("run");
    fs::create_dir(&run).map_err(file("making the machine's directory"))?;
    let attempt = Attempt {
        run: &run,
        building: &building,
        engine: engine.as_ref(),
        machine,
        recipe: &recipe,
        strict: request.strict,
    };
    let captured = attempt.boot_and_capture(&kernel.image, &initramfs, progress)?;
    fault::point("build.captured", None).map_err(file("the capture"))?;

    progress(Progress::step("finding the mailboxes"));
    let memory = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(building.memory_file())
        .map_err(file("opening the template's memory"))?;
    let scan = memory::find_mailboxes(&memory, &captured.expected)?;
    memory::punch_zero_pages(&memory).map_err(file("making the template's memory sparse"))?;
    fs::remove_dir_all(&run).map_err(file("removing the machine's directory"))?;
    progress(Progress::step("writing the template"));
    let template_id = building.id().to_owned();
    let manifest = building.commit(store::Contents {
        engine: engine.info().clone(),
        machine,
        kernel: kernel.version.clone(),
        recipe: recipe.name.clone(),
        mailboxes: scan.mailboxes,
        ambiguous: scan.ambiguous,
        probes: recipe.probes.clone(),
        allow_env: recipe.allow_env.clone(),
        devtools_port: recipe.devtools_port,
        facts: captured.facts,
        warnings: captured.warnings,
        findings: captured.findings.list,
        findings_left_out: captured.findings.left_out,
        frozen_monotonic_ns: captured.frozen_monotonic_ns,
        frozen_wall_ns: captured.frozen_wall_ns,
        rehearses: captured.rehearses,
        ack_limit_ms: recipe.ack_limit_ms(),
        build_millis: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        group: confine::of_template(&template_id),
        memory_writable: !engine.capabilities().read_only_template,
    })?;
    fault::point("build.committed", None).map_err(file("writing the template"))?;
    Ok(manifest)
}

fn machine(request: &BuildRequest, recipe: &Recipe) -> Result<Machine, BuildError> {
    let memory_bytes = request.memory.unwrap_or(recipe.memory);
    let vcpus = request.vcpus.unwrap_or(recipe.vcpus);
    let range = |what, given, min, max| {
        if (min..=max).contains(&given) { Ok(()) } else { Err(BuildError::Range { what, min, max, given }) }
    };
    range("--memory in MiB", memory_bytes >> 20, 96, 64 << 10)?;
    range("--vcpus", u64::from(vcpus), 1, 8)?;
    Ok(Machine { memory_bytes: memory_bytes >> 20 << 20, vcpus, network: recipe.network })
}

struct Attempt<'a> {
    run: &'a Path,
    building: &'a Building,
    engine: &'a dyn Engine,
    machine: Machine,
    recipe: &'a Recipe,
    strict: bool,
}

struct Captured {
    expected: Vec<ExpectedMailbox>,
    facts: std::collections::BTreeMap<String, String>,
    warnings: Vec<String>,
    findings: Findings,
    frozen_monotonic_ns: u64,
    frozen_wall_ns: u64,
    rehearses: bool,
}

impl Attempt<'_> {
    fn boot_and_capture(
        &self,
        kernel: &Path,
        initramfs: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Captured, BuildError> {
        progress(Progress::step(format!(
            "booting the guest ({} {})",
            self.engine.info().name,
            self.engine.info().accel
        )));
        let mut vm = self
            .engine
            .boot(&BootSpec {
                dir: self.run,
                machine: self.machine,
                kernel,
                initramfs,
                root_image: &self.building.root_image(),
                memory_file: &self.building.memory_file(),
                confinement: confine::of_build(self.building.id()),
            })
            .map_err(|source| self.engine_error(source))?;
        fault::point("build.booted", Some(vm.process())).map_err(file("booting"))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(file("starting the connection to the guest"))?;
        let (captured, channel) = runtime.block_on(self.warm_and_quiesce(progress))?;
        // The port is closed while the guest can still take note of it: forks then begin with it closed.
        drop(channel);
        drop(runtime);
        if !wait_armed(vm.ack_stream()) {
            return Err(BuildError::NotArmed { console: self.console() });
        }
        fault::point("build.quiesced", Some(vm.process())).map_err(file("quiescing"))?;

        progress(Progress::step("capturing memory and devices"));
        vm.pause().map_err(|source| self.engine_error(source))?;
        fault::point("build.paused", Some(vm.process())).map_err(file("pausing"))?;
        vm.capture(&self.building.state_file()).map_err(|source| self.engine_error(source))?;
        Ok(captured)
    }

    async fn warm_and_quiesce(
        &self,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Captured, GuestChannel), BuildError> {
        let failed = |during| move |source| self.guest_error(during, source);
        let mut channel =
            GuestChannel::connect(self.run, BOOT_LIMIT).await.map_err(failed("waiting for the guest to boot"))?;
        progress(Progress::step("warming up"));
        channel
            .warm(self.recipe.warm_request(), |message| progress(Progress::step(format!("warming up: {message}"))))
            .await
            .map_err(failed("warming up"))?;
        let mut facts = verify::facts(&mut channel).await.map_err(failed("asking for its facts"))?;
        for (name, code) in &self.recipe.probes {
            let value = verify::probe(&mut channel, code).await.map_err(failed("asking the runtime"))?;
            facts.insert(name.clone(), value);
        }
        progress(Progress::step("freezing"));
        let reply = channel.quiesce(None, QUIESCE_LIMIT).await.map_err(failed("freezing"))?;
        let findings = Findings::of(&reply);
        if self.strict {
            check_strictly(&findings, reply.audited)?;
        }
        let expected = reply.mailboxes.iter().map(expected).collect::<Result<_, GuestError>>();
        let captured = Captured {
            expected: expected.map_err(failed("listing its mailboxes"))?,
            facts,
            warnings: warnings(&reply, &findings),
            findings,
            frozen_monotonic_ns: reply.frozen_monotonic_ns,
            frozen_wall_ns: reply.frozen_wall_ns,
            rehearses: reply.can_rehearse,
        };
        Ok((captured, channel))
    }

    fn engine_error(&self, source: EngineError) -> BuildError {
        BuildError::Engine { source, console: self.console() }
    }

    fn guest_error(&self, during: &'static str, source: GuestError) -> BuildError {
        BuildError::Guest { during, source, console: self.console() }
    }

    /// The last lines of the guest's console, without what could disturb a terminal.
    fn console(&self) -> String {
        let text = fs::read(self.run.join(CONSOLE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4000)..]).into_owned();
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|character| !character.is_control()).collect::<String>())
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }
}

/// What was noticed, as text: who reads only that, reads of the findings too.
fn warnings(reply: &proto::QuiesceReply, findings: &Findings) -> Vec<String> {
    let noticed = reply.warnings.iter().take(100).map(|text| text.chars().take(500).collect());
    noticed.chain(findings.list.iter().map(ToString::to_string)).collect()
}

fn check_strictly(findings: &Findings, audited: bool) -> Result<(), BuildError> {
    match FindingsError::of(findings) {
        Some(source) => Err(BuildError::NotClean { count: findings.count(), source }),
        None if audited => Ok(()),
        None => Err(BuildError::NotAudited),
    }
}

/// Waits for the line with which the keeper says that it now only waits for its identity; false if it does not come.
pub(crate) fn wait_armed(stream: &AckStream) -> bool {
    let armed = |stream: &AckStream| -> io::Result<bool> {
        let mut seen = Vec::new();
        let mut byte = [0];
        while seen.len() < 1 << 16 {
            if stream.read(&mut byte, QUIESCE_LIMIT)? == 0 {
                return Ok(false);
            }
            seen.push(byte[0]);
            if seen.ends_with(ARMED) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    armed(stream).unwrap_or(false)
}

/// A mailbox that the agent listed.
pub(crate) fn expected(planted: &proto::PlantedMailbox) -> Result<ExpectedMailbox, GuestError> {
    let refused = |what: &str| GuestError::Refused(format!("it listed a mailbox with a bad {what}"));
    Ok(ExpectedMailbox {
        name: MailboxName::parse(&planted.name).map_err(|_| refused("name"))?,
        nonce: planted.nonce.as_slice().try_into().map_err(|_| refused("nonce"))?,
        planted_by: match planted.planted_by.as_str() {
            "agent" => PlantedBy::Agent,
            "socket" => PlantedBy::Socket,
            "self" => PlantedBy::SelfPlanted,
            _ => return Err(refused("planter")),
        },
    })
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        // Another file system, or one without links.
        Err(_) => fs::copy(from, to).map(drop),
    }
}

fn file(step: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::File { step, source }
}
