//! The program in the guest, as pid 1 (`/init`). Everything is in the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    agent::run(agent::Freeze::On)
}
