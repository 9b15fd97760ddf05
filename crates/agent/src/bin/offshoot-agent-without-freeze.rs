//! The agent, but it does not freeze its workload: with it the test of "identity before execution" must fail.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    agent::run(agent::Freeze::Off)
}
