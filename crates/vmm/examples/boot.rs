//! Boots a kernel on a machine of its own, with the serial console on standard output, until the guest ends.
//!
//! `boot KERNEL INITRAMFS COMMAND_LINE [VCPUS [MIBIBYTES [SECONDS]]]`

use std::{
    env,
    error::Error,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use offshoot_vmm::{
    config::MachineConfig,
    machine::{DeviceFiles, Machine},
};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [kernel, initramfs, command_line, numbers @ ..] = arguments.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS COMMAND_LINE [VCPUS [MIBIBYTES [SECONDS]]]".into());
    };
    let number = |index: usize, default: u64| numbers.get(index).map_or(Ok(default), |text| text.parse());
    let config = MachineConfig { vcpus: number(0, 1)?.try_into()?, memory_bytes: number(1, 256)? << 20 };
    let seconds = number(2, 60)?;

    let memory = tempfile::tempfile()?;
    memory.set_len(config.memory_bytes)?;
    let console: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
    let files = DeviceFiles {
        kvm: None,
        root_image: File::open("/dev/null")?,
        ack: File::options().write(true).open("/dev/null")?.into(),
        channels: Vec::new(),
        console: Some(console.into()),
        tap: None,
    };
    let begun = Instant::now();
    let mut machine = Machine::boot(
        config,
        &memory,
        &mut File::open(kernel)?,
        Some(&mut File::open(initramfs)?),
        command_line,
        files,
    )?;
    eprintln!("made in {:?}", begun.elapsed());
    machine.resume();
    let exit = machine.wait(Some(Duration::from_secs(seconds)));
    eprintln!("\nended after {:?}: {exit:?}", begun.elapsed());
    Ok(if exit.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
