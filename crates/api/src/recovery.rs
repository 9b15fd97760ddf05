//! What a daemon does first: what a crash left behind is undone, the dead are reaped, and who lives is taken up again.

use host::{Home, cleanup, forks};
use serde_json::json;
use store::Store;

use crate::events::Hub;

/// What was found at the start.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// Forks that live.
    pub(crate) adopted: usize,
    /// What was removed.
    pub(crate) reaped: usize,
    /// What could not be removed.
    pub(crate) left: usize,
    /// Forks whose records can not be read, and that may live.
    pub(crate) unclear: usize,
}

/// Removes whatever is dead or half made, with everything it held. What lives or may live, what is being made by somebody else, and what is not ours is
/// not touched.
pub(crate) fn recover(home: &Home, store: &Store, hub: &Hub) -> std::io::Result<Recovered> {
    let mut recovered = Recovered::default();
    let plan = cleanup::plan(home, store)?;
    for unclear in plan.unclear {
        recovered.unclear += 1;
        tracing::warn!(what = unclear.what, reason = unclear.reason, "left alone, it may live; see `offshoot cleanup`");
    }
    for leftover in plan.leftovers {
        match cleanup::carry_out(home, &leftover) {
            Ok(()) => {
                recovered.reaped += 1;
                tracing::info!(what = leftover.what, reason = leftover.reason, "removed");
                if let Some(id) = leftover.fork() {
                    hub.say("fork.reaped", id.as_str(), json!({ "what": leftover.what, "reason": leftover.reason }));
                }
            }
            Err(error) => {
                recovered.left += 1;
                tracing::warn!(what = leftover.what, %error, "could not be removed; see `offshoot cleanup`");
            }
        }
    }
    recovered.adopted = forks::list(home).map_err(std::io::Error::other)?.iter().filter(|fork| fork.is_alive()).count();
    Ok(recovered)
}
