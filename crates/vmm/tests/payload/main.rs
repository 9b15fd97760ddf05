//! Tiny hand-made guests directly on `/dev/kvm`: each kind of state is captured in one machine and put back in another, which then
//! runs on and says what it finds. They run also on hosts whose KVM cannot boot Linux.
//!
//! Without a `/dev/kvm` that opens they fail and say so; `OFFSHOOT_TEST_NO_KVM=1` does without them knowingly.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

#[macro_use]
mod guest;
mod fork;
mod registers;
mod timers;
