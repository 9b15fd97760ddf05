//! What the supervisor needs of the rest of the agent, and nothing more: in tests it is a few plain processes.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use identity::ForkId;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    pipe::{PipeFlags, pipe_with},
};

use crate::{
    payload::{Expected, Payload},
    state::{AgentState, IDENTITY_VARIABLES, Identity},
    workload::{Process, Start, StartError},
};

pub(crate) trait World: Debug + Send + Sync {
    fn start(&self, start: Start) -> Result<Process, StartError>;
    fn environment(&self) -> BTreeMap<String, String>;
    fn identity(&self) -> Option<Arc<Identity>>;
    fn set_recipe_environment(&self, env: BTreeMap<String, String>);
    /// What the recipe expects of payloads.
    fn expected(&self) -> Option<Arc<Expected>>;
    /// Completes the fork's identity; `None` if it is another fork by now, or complete.
    fn complete(&self, fork: &ForkId, payload: Payload) -> io::Result<Option<Arc<Identity>>>;
}

impl World for Weak<AgentState> {
    fn start(&self, start: Start) -> Result<Process, StartError> {
        // The state lives as long as the agent.
        self.upgrade().ok_or(StartError::Frozen)?.workload().start(start)
    }

    fn environment(&self) -> BTreeMap<String, String> {
        self.upgrade().map(|state| state.environment()).unwrap_or_default()
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.upgrade()?.identity()
    }

    fn set_recipe_environment(&self, env: BTreeMap<String, String>) {
        if let Some(state) = self.upgrade() {
            state.set_recipe_environment(env);
        }
    }

    fn expected(&self) -> Option<Arc<Expected>> {
        self.upgrade()?.expected().cloned()
    }

    fn complete(&self, fork: &ForkId, payload: Payload) -> io::Result<Option<Arc<Identity>>> {
        let Some(state) = self.upgrade() else { return Ok(None) };
        let Some(identity) = state.completed(fork, payload) else { return Ok(None) };
        state.keeper().write_payload(&identity)?;
        state.set_identity(Arc::clone(&identity));
        state.announce_change();
        Ok(Some(identity))
    }
}

/// The environment of a service: what everything gets, and its own; but who the fork is, and what its caller set, wins.
pub(crate) fn environment(world: &dyn World, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut env = world.environment();
    let (identity, expected) = (world.identity(), world.expected());
    for (name, value) in own {
        let given = |identity: &Arc<Identity>| identity.env.keys().any(|key| key.as_str() == name);
        let of_payload = expected.as_ref().is_some_and(|expected| expected.owns(name));
        if !IDENTITY_VARIABLES.contains(&name.as_str()) && !of_payload && !identity.as_ref().is_some_and(given) {
            env.insert(name.clone(), value.clone());
        }
    }
    env
}

/// A pipe whose first end is non-blocking and ours to read, and whose second is the child's to write.
pub(crate) fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// A pipe whose first end is non-blocking and ours to write, and whose second is the child's to read.
pub(crate) fn input_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Two ends of a socket, the first non-blocking and ours, the second the child's.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}
