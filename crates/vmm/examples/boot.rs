//! Boots a kernel on a machine of its own, with the serial console on standard output, until the guest ends.
//!
//! `boot KERNEL INITRAMFS ROOT_IMAGE COMMAND_LINE [VCPUS [MIBIBYTES [SECONDS]]]`
//!
//! With `SNAPSHOT_AFTER=MILLISECONDS` in the environment it pauses the machine after that time, captures it, and goes on in
//! two copies of it, one after the other, each for `SECONDS`.

use std::{
    env,
    error::Error,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use offshoot_vmm::{
    config::MachineConfig,
    machine::{DeviceFiles, Machine},
    snapshot::Snapshot,
};

fn files(root_image: &str, sockets: &Path, name: &str) -> Result<DeviceFiles, Box<dyn Error>> {
    let console: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
    let channels = (0..8).map(|channel| UnixListener::bind(sockets.join(format!("{name}.{channel}"))));
    Ok(DeviceFiles {
        kvm: None,
        root_image: File::open(root_image)?,
        ack: File::options().write(true).open("/dev/null")?.into(),
        channels: channels.collect::<Result<_, _>>()?,
        console: Some(console.into()),
        tap: None,
    })
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [kernel, initramfs, root_image, command_line, numbers @ ..] = arguments.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS ROOT_IMAGE COMMAND_LINE [VCPUS [MIBIBYTES [SECONDS]]]".into());
    };
    let number = |index: usize, default: u64| numbers.get(index).map_or(Ok(default), |text| text.parse());
    let config = MachineConfig { vcpus: number(0, 1)?.try_into()?, memory_bytes: number(1, 256)? << 20 };
    let limit = Some(Duration::from_secs(number(2, 60)?));
    let sockets = tempfile::tempdir()?;

    let memory = tempfile::tempfile()?;
    memory.set_len(config.memory_bytes)?;
    let begun = Instant::now();
    let mut machine = Machine::boot(
        config,
        &memory,
        &mut File::open(kernel)?,
        Some(&mut File::open(initramfs)?),
        command_line,
        files(root_image, sockets.path(), "template")?,
    )?;
    eprintln!("made in {:?}", begun.elapsed());
    machine.resume();
    if let Ok(after) = env::var("SNAPSHOT_AFTER") {
        thread::sleep(Duration::from_millis(after.parse()?));
        let begun = Instant::now();
        machine.pause();
        let paused = begun.elapsed();
        let state = machine.snapshot()?.encode()?;
        eprintln!("paused in {paused:?}, captured in {:?}: {} bytes", begun.elapsed(), state.len());
        drop(machine);
        for fork in ["first", "second"] {
            let begun = Instant::now();
            let files = files(root_image, sockets.path(), fork)?;
            let mut copy = Machine::restore(&Snapshot::decode(&state)?, &memory, files)?;
            let restored = begun.elapsed();
            copy.resume();
            eprintln!("{fork} copy restored in {restored:?}, runs after {:?}", begun.elapsed());
            eprintln!("{fork} copy: {:?}", copy.wait(limit));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let exit = machine.wait(limit);
    eprintln!("ended after {:?}: {exit:?}", begun.elapsed());
    Ok(if exit.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
