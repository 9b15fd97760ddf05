//! The typed code of every error that reaches a caller, by the command line or the API. Codes are stable: programs rely on them.
//!
//! Errors of the verbs' own level are listed case by case, so that a new case needs a decision here; of deeper ones the
//! kind is enough.

use std::error::Error;

use engine::{DeliverError, EngineError, RehearseError};
use net::{LeaseError, LinkError, UserError};
use store::StoreError;

use crate::{
    acks::AckWaitError,
    bench::BenchError,
    build::BuildError,
    engines::ChoiceError,
    fork::ForkError,
    forks::ForksError,
    guest::{CopyError, GuestError},
    handoff::network::NetworkError,
    home::HomeError,
    limits::LimitError,
    pool::PoolError,
    recipe::RecipeError,
    rehearsal::RehearsalError,
    request::RequestError,
    snapshot::SnapshotError,
    source::SourceError,
    standby::StandbyError,
    verify::VerifyError,
};

/// An error with a code that programs can rely on.
pub trait Coded: Error + Send + Sync + 'static {
    /// Snake case; stable.
    fn code(&self) -> &'static str;

    /// Whether the request itself is wrong, whatever there is: nothing was begun.
    fn is_usage(&self) -> bool {
        false
    }

    /// What to do next, where the message does not say it.
    fn next(&self) -> Option<String> {
        None
    }
}

impl Coded for HomeError {
    fn code(&self) -> &'static str {
        match self {
            Self::NoHome => "no_home",
            Self::Pool(_) => "address_pool_invalid",
            Self::Make { .. } => "directory_unusable",
        }
    }
}

impl Coded for StoreError {
    fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "template_not_found",
            Self::Exists { .. } => "template_exists",
            Self::Locked { .. } => "template_busy",
            Self::InUse { .. } => "template_in_use",
            Self::Broken { .. } => "template_broken",
            Self::File { .. } => "store_failed",
        }
    }

    fn next(&self) -> Option<String> {
        matches!(self, Self::File { .. }).then(|| "offshoot doctor".into())
    }
}

impl Coded for PoolError {
    fn code(&self) -> &'static str {
        match self {
            Self::TooMany(_) => "pool_too_large",
            Self::UserNetwork => "pool_network",
            Self::Ended => "engine_failed",
            Self::Rehearsal(error) => error.code(),
            Self::Engine(error) => error.code(),
            Self::Network(error) => error.code(),
            Self::Begin(error) => error.code(),
            Self::State { .. } => "state_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::TooMany(_) | Self::UserNetwork)
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Engine(error) => error.next(),
            Self::Begin(error) => error.next(),
            _ => None,
        }
    }
}

impl Coded for RehearsalError {
    fn code(&self) -> &'static str {
        match self {
            Self::Letter(error) => error.code(),
            Self::NoMailbox => "template_broken",
            Self::Machine(RehearseError::Deliver(error)) => error.code(),
            Self::Machine(RehearseError::Engine(error)) => error.code(),
            Self::Guest(_) | Self::Late { .. } | Self::Flood => "rehearsal_failed",
            Self::Ended => "engine_failed",
            Self::Stream(_) => "state_failed",
        }
    }
}

impl Coded for BenchError {
    fn code(&self) -> &'static str {
        match self {
            Self::Refused(error) => error.code(),
            Self::Pool(error) => error.code(),
        }
    }

    fn is_usage(&self) -> bool {
        match self {
            Self::Refused(error) => error.is_usage(),
            Self::Pool(error) => error.is_usage(),
        }
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Refused(error) => error.next(),
            Self::Pool(error) => error.next(),
        }
    }
}

impl Coded for EngineError {
    fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } | Self::NoWorker { .. } => "engine_missing",
            Self::Timeout { .. } => "engine_timeout",
            Self::Delta(_) => "snapshot_unusable",
            _ => "engine_failed",
        }
    }

    fn next(&self) -> Option<String> {
        (!matches!(self, Self::Missing { .. })).then(|| "offshoot doctor".into())
    }
}

impl Coded for DeliverError {
    fn code(&self) -> &'static str {
        "delivery_failed"
    }

    fn next(&self) -> Option<String> {
        Some("offshoot doctor".into())
    }
}

impl Coded for LimitError {
    fn code(&self) -> &'static str {
        match self {
            Self::NotPossible { .. } => "limit_not_possible",
        }
    }
}

impl Coded for AckWaitError {
    fn code(&self) -> &'static str {
        match self {
            Self::Failed { .. } => "identity_refused",
            Self::Timeout { .. } => "ack_timeout",
            Self::Ended(_) => "fork_ended",
            Self::Flood => "ack_flood",
            Self::Stream(_) => "ack_channel_failed",
        }
    }
}

impl Coded for RequestError {
    fn code(&self) -> &'static str {
        match self {
            Self::Range { .. } => "out_of_range",
            Self::NameTooLong(_) => "name_too_long",
            Self::TooManyMailboxes(_) => "too_many_mailboxes",
            Self::MailboxTwice(_) => "mailbox_twice",
            Self::MailboxReserved(_) => "mailbox_reserved",
            Self::MailboxUnknown { .. } => "mailbox_not_found",
            Self::MailboxAmbiguous { .. } => "mailbox_ambiguous",
            Self::MailboxToken(_) => "mailbox_token_mismatch",
            Self::NotAnObject(_) => "payload_not_an_object",
            Self::PayloadTooLong { .. } => "payload_too_long",
            Self::IdentityTooLong { .. } => "identity_too_long",
            Self::VariableNotAllowed(_) => "variable_not_allowed",
            Self::Field { .. } => "invalid_field",
        }
    }

    fn is_usage(&self) -> bool {
        match self {
            // What only this template lacks is no wrong usage.
            Self::MailboxUnknown { .. }
            | Self::MailboxAmbiguous { .. }
            | Self::MailboxToken(_)
            | Self::VariableNotAllowed(_)
            | Self::PayloadTooLong { .. }
            | Self::IdentityTooLong { .. } => false,
            _ => true,
        }
    }
}

impl Coded for ForkError {
    fn code(&self) -> &'static str {
        match self {
            Self::Request(error) => error.code(),
            Self::NameTaken(_) => "name_conflict",
            Self::NotSupported { .. } => "not_supported",
            Self::Incompatible { .. } => "template_incompatible",
            Self::Limit(error) => error.code(),
            Self::Engine(error) => error.code(),
            Self::Deliver(error) => error.code(),
            Self::Network(error) => error.code(),
            Self::Ack(error) => error.code(),
            Self::State { .. } => "state_failed",
            Self::Random(_) => "no_random_bytes",
            Self::Name(_) => "invalid_name",
            Self::Source(error) => error.code(),
        }
    }

    fn is_usage(&self) -> bool {
        match self {
            Self::Request(error) => error.is_usage(),
            Self::Network(error) => error.is_usage(),
            _ => false,
        }
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Engine(error) => error.next(),
            Self::Network(error) => error.next(),
            Self::Deliver(error) => error.next(),
            Self::Source(error) => error.next(),
            Self::State { .. } | Self::Random(_) => Some("offshoot doctor".into()),
            _ => None,
        }
    }
}

impl Coded for LinkError {
    fn code(&self) -> &'static str {
        match self {
            Self::Denied { .. } => "network_denied",
            Self::Lease(LeaseError::Exhausted { .. }) => "addresses_exhausted",
            Self::Policy(_) => "network_policy_invalid",
            Self::PortTaken { .. } => "port_taken",
            Self::TooManyNets => "too_many_nets",
            Self::Busy(_) => "network_busy",
            _ => "network_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::Policy(_))
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Lease(LeaseError::Exhausted { .. }) | Self::Exists(_) | Self::Absent(_) => {
                Some("offshoot cleanup".into())
            }
            Self::Denied { .. } | Self::Step { .. } | Self::File { .. } => Some("offshoot doctor".into()),
            _ => None,
        }
    }
}

impl Coded for UserError {
    fn code(&self) -> &'static str {
        match self {
            Self::NeedsTap { .. } => "needs_tap",
            Self::NoPasst => "passt_missing",
            Self::Policy(_) => "network_policy_invalid",
            Self::PortTaken { .. } => "port_taken",
            Self::LowPort { .. } => "port_privileged",
            Self::MachineEnded => "fork_ended",
            Self::Refused { .. } | Self::Step { .. } => "network_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::NeedsTap { .. } | Self::Policy(_))
    }

    fn next(&self) -> Option<String> {
        matches!(self, Self::Refused { .. } | Self::Step { .. }).then(|| "offshoot doctor".into())
    }
}

impl Coded for NetworkError {
    fn code(&self) -> &'static str {
        match self {
            Self::NoCard(_) => "no_network_card",
            Self::NoMeaning { .. } => "no_network",
            Self::User(error) => error.code(),
            Self::OnePortManyForks(_) => "one_port_many_forks",
            Self::Link(error) => error.code(),
            Self::Section(_) => "network_section_invalid",
            Self::NoAck { .. } => "network_ack_timeout",
            Self::Refused(_) => "network_refused",
        }
    }

    fn is_usage(&self) -> bool {
        match self {
            Self::NoMeaning { .. } | Self::OnePortManyForks(_) => true,
            Self::Link(error) => error.is_usage(),
            Self::User(error) => error.is_usage(),
            _ => false,
        }
    }

    fn next(&self) -> Option<String> {
        if let Self::Link(error) = self { error.next() } else { None }
    }
}

impl Coded for ForksError {
    fn code(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "fork_not_found",
            Self::Dead { .. } => "fork_dead",
            Self::InStandby { .. } => "fork_in_standby",
            Self::Interrupted { .. } => "fork_interrupted",
            Self::NoNetwork { .. } => "network_ack_timeout",
            Self::Kill { .. } => "kill_failed",
            Self::State { .. } => "state_failed",
        }
    }

    fn next(&self) -> Option<String> {
        matches!(self, Self::Kill { .. }).then(|| "offshoot cleanup".into())
    }
}

impl Coded for SourceError {
    fn code(&self) -> &'static str {
        match self {
            Self::Busy { .. } => "fork_busy",
            Self::Dead { .. } => "fork_dead",
            Self::TemplateGone { .. } => "template_gone",
            Self::Store(error) => error.code(),
            Self::Engine(error) => error.code(),
            Self::Deliver(error) => error.code(),
            Self::Guest { source, .. } => source.code(),
            Self::NotArmed => "guest_not_armed",
            Self::SecretsOpen => "secrets_not_sealed",
            Self::Scan(_) => "mailboxes_unusable",
            Self::Snapshot(SnapshotError::File { .. }) => "snapshot_file_failed",
            Self::Snapshot(_) => "snapshot_unusable",
            Self::Ack(error) => error.code(),
            Self::Begin { .. } | Self::State { .. } => "state_failed",
        }
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.next(),
            Self::Engine(error) => error.next(),
            Self::Deliver(error) => error.next(),
            Self::Guest { source, .. } => source.next(),
            Self::Dead { .. } | Self::Busy { .. } | Self::TemplateGone { .. } => None,
            Self::SecretsOpen => None,
            Self::Snapshot(SnapshotError::File { .. }) | Self::Begin { .. } | Self::State { .. } => {
                Some("offshoot doctor".into())
            }
            _ => Some("offshoot ls".into()),
        }
    }
}

impl Coded for StandbyError {
    fn code(&self) -> &'static str {
        match self {
            Self::InStandby { .. } => "fork_in_standby",
            Self::Runs { .. } => "fork_runs",
            Self::NetworkPending { .. } => "fork_busy",
            Self::Source(error) => error.code(),
            Self::Limit(error) => error.code(),
            Self::Network(error) => error.code(),
        }
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Source(error) => error.next(),
            Self::Network(error) => error.next(),
            _ => None,
        }
    }
}

impl Coded for VerifyError {
    fn code(&self) -> &'static str {
        match self {
            Self::TooFew(_) => "too_few_forks",
            Self::Fork { source, .. } => source.code(),
            Self::Refused(error) => error.code(),
            Self::Guest { source, .. } => source.code(),
            Self::Answer { .. } => "answer_unreadable",
        }
    }

    fn is_usage(&self) -> bool {
        match self {
            Self::TooFew(_) => true,
            Self::Refused(error) => error.is_usage(),
            _ => false,
        }
    }
}

impl Coded for RecipeError {
    fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "recipe_not_found",
            Self::Read { .. } => "recipe_unreadable",
            _ => "recipe_invalid",
        }
    }
}

impl Coded for BuildError {
    fn code(&self) -> &'static str {
        match self {
            Self::Recipe(error) => error.code(),
            Self::Range { .. } => "out_of_range",
            Self::Store(error) => error.code(),
            Self::Kernel(_) => "kernel_unusable",
            Self::RootImage(_) => "root_image_failed",
            Self::Initramfs(_) => "initramfs_failed",
            Self::NoEngine(ChoiceError::Engine(error)) => error.code(),
            Self::NoEngine(ChoiceError::NoEmulation) => "engine_contradiction",
            Self::Engine { source, .. } => source.code(),
            Self::Guest { source, .. } => source.code(),
            Self::NotClean { .. } => "template_not_clean",
            Self::NotAudited => "template_not_audited",
            Self::NotArmed { .. } => "guest_not_armed",
            Self::Scan(_) => "mailboxes_unusable",
            Self::File { .. } => "build_file_failed",
        }
    }

    fn is_usage(&self) -> bool {
        matches!(self, Self::Range { .. } | Self::NoEngine(ChoiceError::NoEmulation))
    }

    fn next(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.next(),
            Self::Engine { source, .. } | Self::NoEngine(ChoiceError::Engine(source)) => source.next(),
            Self::Kernel(_) | Self::RootImage(_) | Self::Initramfs(_) | Self::File { .. } => {
                Some("offshoot doctor".into())
            }
            Self::NotClean { .. } => {
                Some("cure the recipe as above, or build without --strict; see docs/audit.md".into())
            }
            _ => None,
        }
    }
}

impl Coded for GuestError {
    fn code(&self) -> &'static str {
        match self {
            Self::Busy => "channels_busy",
            Self::NotRunning => "fork_not_running",
            Self::Timeout(_) | Self::NotTaken(_) => "guest_timeout",
            Self::Stalled(_) => "guest_stalled",
            Self::Refused(_) => "guest_refused",
            Self::Held(_) => "fork_busy",
            Self::NoListener(_) => "port_closed",
            Self::Transport(_) => "connection_failed",
            Self::Local(_) => "local_io_failed",
        }
    }

    fn next(&self) -> Option<String> {
        matches!(self, Self::NotRunning | Self::Timeout(_) | Self::Transport(_)).then(|| "offshoot ls".into())
    }
}

impl Coded for CopyError {
    fn code(&self) -> &'static str {
        match self {
            Self::Guest(error) => error.code(),
            Self::Local { .. } => "local_file_failed",
            Self::Hostile { .. } => "hostile_archive",
        }
    }

    fn next(&self) -> Option<String> {
        if let Self::Guest(error) = self { error.next() } else { None }
    }
}
