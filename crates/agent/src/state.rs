//! What the parts of the agent share.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Instant,
};

use identity::{Document, EnvName, ForkId, ForkIdentity, Limits};
use tokio::sync::watch;

use crate::{
    Freeze,
    keeper::Keeper,
    payload::{Delivery, Expected, Payload},
    service::Supervisor,
    workload::Workload,
};

/// Where the sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A template that is being warmed.
    Template,
    /// Frozen, and waiting for an identity or for the capture.
    Quiesced,
    /// An identity has come and is being applied.
    Applying,
    /// As before, but that its network could not be applied: frozen, and waiting for the host to have it applied again.
    NetworkPending,
    /// A fork (or the source of a branch) that runs.
    Running,
    /// An identity could not be applied: nothing was thawed, and nothing will be; or a service, or the runtime, did not take it after the thaw.
    Failed,
}

impl Phase {
    /// The phase as the control channel says it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Quiesced => "quiesced",
            Self::Applying => "applying",
            Self::NetworkPending => "network-pending",
            Self::Running => "running",
            Self::Failed => "failed",
        }
    }
}

/// Who this fork is: the document without what must not stay in memory (secrets, files, entropy, keys).
#[derive(Debug, Clone)]
pub struct Identity {
    /// Id, name, host name, template…
    pub fork: ForkIdentity,
    /// The caller's labels.
    pub labels: BTreeMap<String, String>,
    /// The caller's environment, and the payload's.
    pub env: BTreeMap<EnvName, String>,
    /// Limits of the workload.
    pub limits: Limits,
    /// What the recipe's fields are; `None` as long as that is still to come.
    pub payload: Option<Payload>,
}

impl Identity {
    /// What of `document` may stay.
    #[must_use]
    pub fn of(document: &Document, expected: Option<&Expected>) -> Self {
        Self {
            payload: expected.map_or_else(|| Some(Payload::new()), |expected| expected.payload_of(&document.labels)),
            fork: document.fork.clone(),
            labels: document.labels.clone(),
            env: document.env.clone(),
            limits: document.limits,
        }
    }
}

/// What the parts of the agent share. There is one, made by [`crate::boot`].
#[derive(Debug)]
pub struct AgentState {
    booted: Instant,
    freeze: Freeze,
    workload: Workload,
    keeper: Keeper,
    supervisor: OnceLock<Arc<Supervisor>>,
    expected: OnceLock<Arc<Expected>>,
    /// Told of changes of what [`AgentState::told`] answers.
    changes: watch::Sender<()>,
    now: Mutex<Now>,
}

/// What the local endpoint may tell of who this is.
#[derive(Debug, Clone)]
pub enum Told {
    /// Nobody, and nobody has to wait.
    NotComing,
    /// It will come.
    Waiting,
    /// It is being captured, or takes on an identity: what is true is known when that has ended.
    Changing,
    /// Complete.
    Applied(Arc<Identity>),
}

#[derive(Debug)]
struct Now {
    phase: Phase,
    identity: Option<Arc<Identity>>,
    recipe_env: BTreeMap<String, String>,
}

impl AgentState {
    /// The state of a template that has just booted, with its supervisor.
    #[must_use]
    pub fn new(workload: Workload, keeper: Keeper, freeze: Freeze) -> Arc<Self> {
        let state = Arc::new(Self {
            booted: Instant::now(),
            freeze,
            workload,
            keeper,
            supervisor: OnceLock::new(),
            expected: OnceLock::new(),
            changes: watch::Sender::new(()),
            now: Mutex::new(Now { phase: Phase::Template, identity: None, recipe_env: BTreeMap::new() }),
        });
        let _ = state.supervisor.set(Arc::new(Supervisor::new(&state)));
        state
    }

    /// When the agent started.
    #[must_use]
    pub fn booted(&self) -> Instant {
        self.booted
    }

    /// Whether the workload is frozen before a capture.
    #[must_use]
    pub fn freeze(&self) -> Freeze {
        self.freeze
    }

    /// What starts processes.
    #[must_use]
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// What quiesces, and applies identities.
    #[must_use]
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// What keeps the services.
    #[must_use]
    #[allow(clippy::missing_panics_doc, clippy::expect_used)]
    pub fn supervisor(&self) -> &Arc<Supervisor> {
        self.supervisor.get().expect("set by new, before anybody has the state")
    }

    /// Where the sandbox is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.now().phase
    }

    /// Who this fork is; `None` in a template.
    #[must_use]
    pub fn identity(&self) -> Option<Arc<Identity>> {
        self.now().identity.clone()
    }

    /// Sets the recipe's environment, which everything in the workload gets.
    pub fn set_recipe_environment(&self, env: BTreeMap<String, String>) {
        self.now().recipe_env = env;
    }

    /// What the recipe expects of payloads.
    #[must_use]
    pub fn expected(&self) -> Option<&Arc<Expected>> {
        self.expected.get()
    }

    /// Sets it, once; false if it is set.
    pub(crate) fn expect(&self, expected: Expected) -> bool {
        self.expected.set(Arc::new(expected)).is_ok()
    }

    /// What may be told of who this is. All of it is from one moment.
    #[must_use]
    pub fn told(&self) -> Told {
        let now = self.now();
        match (now.phase, &now.identity) {
            (Phase::Template, _) if self.expected().is_none_or(|expected| expected.delivery == Delivery::Off) => {
                Told::NotComing
            }
            (Phase::Template, _) => Told::Waiting,
            (Phase::Running, Some(identity)) if identity.payload.is_some() => Told::Applied(Arc::clone(identity)),
            (Phase::Running, _) => Told::Waiting,
            _ => Told::Changing,
        }
    }

    /// Wakes who waits for a change of what is told. Not done where the change is made: that is on a fork's way to its ack.
    pub(crate) fn announce_change(&self) {
        if self.expected().is_some() {
            self.changes.send_replace(());
        }
    }

    /// Wakes at changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// What a fork's identity is with its payload. `None` if this is another fork, or its identity is complete.
    pub(crate) fn completed(&self, fork: &ForkId, payload: Payload) -> Option<Arc<Identity>> {
        let before = self.identity().filter(|identity| identity.fork.id == *fork && identity.payload.is_none())?;
        let mut identity = Identity::clone(&before);
        self.expected()?.set_variables(&payload, &mut identity.env);
        identity.payload = Some(payload);
        Some(Arc::new(identity))
    }

    /// The environment that a new process of the workload gets: the recipe's, then the identity's, then `OFFSHOOT_*`.
    /// It is made anew each time, so a variable that the identity does not have is not there. `HOME` depends on the user, and is added where a process is
    /// started.
    #[must_use]
    pub fn environment(&self) -> BTreeMap<String, String> {
        let now = self.now();
        environment(&now.recipe_env, self.expected().map(Arc::as_ref), now.identity.as_deref())
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.now().phase = phase;
    }

    /// Changes the phase if it still is `from`.
    pub(crate) fn change_phase(&self, from: Phase, to: Phase) -> bool {
        let mut now = self.now();
        let as_expected = now.phase == from;
        if as_expected {
            now.phase = to;
        }
        as_expected
    }

    pub(crate) fn set_identity(&self, identity: Arc<Identity>) {
        self.now().identity = Some(identity);
    }

    pub(crate) fn forget_identity(&self) {
        self.now().identity = None;
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn environment(
    recipe: &BTreeMap<String, String>,
    expected: Option<&Expected>,
    identity: Option<&Identity>,
) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> =
        [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
    env.extend(recipe.iter().map(|(name, value)| (name.clone(), value.clone())));
    // A recipe can not pretend to be a fork.
    env.retain(|name, _| {
        !IDENTITY_VARIABLES.contains(&name.as_str()) && !expected.is_some_and(|expected| expected.owns(name))
    });
    if let Some(identity) = identity {
        env.extend(identity.env.iter().map(|(name, value)| (name.as_str().to_owned(), value.clone())));
        let fork = &identity.fork;
        let values = [fork.id.as_str(), fork.name.as_str(), fork.hostname.as_str(), fork.template.as_str()];
        env.extend(IDENTITY_VARIABLES.iter().zip(values).map(|(name, value)| ((*name).to_owned(), value.to_owned())));
    }
    env
}

/// The variables that say who a fork is: id, name, host name, template.
pub const IDENTITY_VARIABLES: [&str; 4] = ["OFFSHOOT_ID", "OFFSHOOT_NAME", "OFFSHOOT_HOSTNAME", "OFFSHOOT_TEMPLATE"];
