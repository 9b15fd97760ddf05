//! Memory images: the marker scan, sparse files, filling mailboxes, and patching another process' private pages.
#![forbid(unsafe_code)]

mod letters;
mod patch;
mod scan;
mod sparse;
mod touched;

pub use letters::{Letter, PatchError, PrivateMemory, fill_mailboxes};
pub use patch::ProcessMemory;
pub use scan::{Ambiguous, ExpectedMailbox, Mailbox, PlantedBy, Scan, ScanError, find_mailboxes};
pub use sparse::{data_extents, punch_zero_pages};
pub use touched::{Touched, touched_pages};
