//! Memory images: the marker scan, sparse files, and patching another process' private pages.
#![forbid(unsafe_code)]

mod patch;
mod scan;
mod sparse;

pub use patch::{PatchError, ProcessMemory};
pub use scan::{Ambiguous, ExpectedMailbox, Mailbox, PlantedBy, Scan, ScanError, find_mailboxes};
pub use sparse::{data_extents, punch_zero_pages};
