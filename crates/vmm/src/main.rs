//! `offshoot-vmm`: one jailed process that runs one guest. offshoot starts it.

use std::process::ExitCode;

use offshoot_vmm::worker;

fn main() -> ExitCode {
    worker::main(worker::load)
}
