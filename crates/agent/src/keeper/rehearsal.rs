//! A rehearsal, in a machine that is set aside for a fork to come: all that an identity does before its thaw is done once, so that the fork's
//! own finds nothing that runs for the first time. Then everything is put back, and the same mailbox waits again.
//!
//! ```text
//! armed ─▶ filled: rehearse ─▶ applied, but not thawed ─▶ "rehearsed" ─▶ put back ─▶ armed (same nonce) ─▶ "offshoot-armed" ─▶ stopped
//!                              nobody of the workload has run
//! ```
//!
//! A machine that could not put everything back says that it failed and is of no use; it is not armed again.

use std::{fs, io, sync::Arc};

use super::{Parts, apply::Failed, lock, prepare::Blanks};
use crate::{
    Freeze,
    boot::mounts,
    state::{AgentState, Phase},
};

/// What a rehearsal changes and no open file remembers, as it was captured.
#[derive(Debug)]
pub(super) struct Captured {
    hostname: Vec<u8>,
    boot_id: String,
}

impl Captured {
    /// Before the capture. `None` where a rehearsal would leave something behind: without the freeze the workload would see it; what could not
    /// be opened ahead is replaced by an identity, and so is an earlier one.
    pub(super) fn look(freeze: Freeze, is_template: bool, blanks: &Blanks) -> io::Result<Option<Self>> {
        if freeze != Freeze::On || !is_template || !blanks.are_complete() {
            return Ok(None);
        }
        let hostname = rustix::system::uname().nodename().to_bytes().to_vec();
        let boot_id = fs::read_to_string(mounts::BOOT_ID)?.trim_end().to_owned();
        Ok(Some(Self { hostname, boot_id }))
    }
}

/// Puts everything back as it was captured, and arms the mailbox again.
pub(super) fn put_back(state: &Arc<AgentState>, parts: &Parts) -> Result<(), Failed> {
    let step = |step: &'static str| move |error: io::Error| Failed(format!("{step} after a rehearsal: {error}"));
    parts.handoff.take_back().map_err(|error| Failed(format!("the network after a rehearsal: {error}")))?;
    let mut prepared = lock(&parts.prepared);
    let captured = prepared.captured.as_ref().ok_or_else(|| Failed("no rehearsal was prepared".into()))?;
    rustix::system::sethostname(&captured.hostname).map_err(|error| step("the host name")(error.into()))?;
    parts.kernel.set_boot_id(&captured.boot_id).map_err(step("the boot id"))?;
    prepared.blanks = std::mem::take(&mut prepared.filled);
    prepared.written.clear();
    prepared.blanks.empty().map_err(step("emptying the files"))?;
    state.forget_identity();
    state.set_phase(Phase::Quiesced);
    // Last: from here on it may be filled.
    lock(&parts.own).arm_again().map_err(|error| Failed(format!("arming the mailbox after a rehearsal: {error}")))
}
