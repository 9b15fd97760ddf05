//! Memory images: the marker scan, sparse files, filling mailboxes, patching another process' private pages, and the pages
//! that a fork has for itself.
#![forbid(unsafe_code)]

pub mod delta;
mod letters;
mod patch;
mod scan;
mod sparse;
mod touched;

pub use delta::{Delta, DeltaError, DeltaSize, write_delta};
pub use letters::{Letter, PatchError, PrivateMemory, fill_mailboxes, is_filled};
pub use patch::ProcessMemory;
pub use scan::{Ambiguous, ExpectedMailbox, Finder, Mailbox, PlantedBy, Scan, ScanError, find_mailboxes};
pub use sparse::{data_extents, punch_zero_pages};
pub use touched::{Touched, touched_pages};
