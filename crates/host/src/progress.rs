//! What a long step tells whoever waits for it.

/// One report of a long step. A later report replaces an earlier one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, for people: "Unpacking the root file system".
    pub step: String,
    /// How much of it is done, where that is known.
    pub done: Option<u64>,
    /// Out of how much, in the same unit.
    pub total: Option<u64>,
}

impl Progress {
    /// A step of unknown length.
    #[must_use]
    pub fn step(step: impl Into<String>) -> Self {
        Self { step: step.into(), done: None, total: None }
    }

    /// A step of which a part is done.
    #[must_use]
    pub fn of(step: impl Into<String>, done: u64, total: u64) -> Self {
        Self { step: step.into(), done: Some(done), total: Some(total) }
    }
}
