//! The guest's network in network namespaces of these tests' own: a switch, and machines whose card is one end of a wire to it.
#![allow(clippy::unwrap_used)]

mod applied;
mod confirmed;
mod rig;
mod taken;
