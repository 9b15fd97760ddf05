//! Boots a kernel with offshoot's initramfs on a machine of its own, waits until the agent in it answers, and forks it.
//!
//! `boot KERNEL INITRAMFS ROOT_IMAGE COMMAND_LINE [VCPUS [MIBIBYTES [SECONDS [FORKS]]]]`
//!
//! The serial console goes to standard output, what happens and how long it took to standard error. `SECONDS` is the longest
//! time that an answer may take.

use std::{
    env,
    error::Error,
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use offshoot_vmm::{
    config::MachineConfig,
    kvm,
    machine::{DeviceFiles, Machine, Prepared},
    snapshot::Snapshot,
};

type Failure = Box<dyn Error>;

fn files(root_image: &str, directory: &Path) -> Result<DeviceFiles, Failure> {
    let console: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
    let channels = (0..8).map(|channel| UnixListener::bind(channel_path(directory, channel)));
    Ok(DeviceFiles {
        kvm: None,
        root_image: File::open(root_image)?,
        ack: File::options().write(true).open("/dev/null")?.into(),
        channels: channels.collect::<Result<_, _>>()?,
        console: Some(console.into()),
        network: None,
    })
}

fn channel_path(directory: &Path, channel: u32) -> PathBuf {
    directory.join(channel.to_string())
}

/// Begins a session with the agent, and waits for its answer: the first two frames of the guest API.
fn ask(machine: &Machine, channel: &Path, session: u8, limit: Duration) -> Result<(), Failure> {
    let mut stream = UnixStream::connect(channel)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let frame = |kind| [0x7e, kind, session, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x7e];
    let begun = Instant::now();
    let mut answer = Vec::new();
    let mut part = [0; 64];
    stream.write_all(&frame(1))?;
    while !answer.windows(15).any(|window| window == frame(2)) {
        if let Some(exit) = machine.wait(Some(Duration::ZERO)) {
            return Err(format!("the guest ended: {exit:?}").into());
        }
        match stream.read(&mut part) {
            Ok(0) => return Err("the machine closed the channel".into()),
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(_) if begun.elapsed() < limit => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [kernel, initramfs, root_image, command_line, numbers @ ..] = arguments.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS ROOT_IMAGE COMMAND_LINE [VCPUS [MIBIBYTES [SECONDS [FORKS]]]]".into());
    };
    let number = |index: usize, default: u64| numbers.get(index).map_or(Ok(default), |text| text.parse());
    let config = MachineConfig { vcpus: number(0, 1)?.try_into()?, memory_bytes: number(1, 256)? << 20 };
    let limit = Duration::from_secs(number(2, 60)?);
    let (forks, directory) = (number(3, 0)?, tempfile::tempdir()?);

    let memory = tempfile::tempfile()?;
    memory.set_len(config.memory_bytes)?;
    let begun = Instant::now();
    let mut kernel = File::open(kernel)?;
    let mut initramfs = File::open(initramfs)?;
    let devices = files(root_image, directory.path())?;
    let mut template = Machine::boot(config, &memory, &mut kernel, Some(&mut initramfs), command_line, devices)?;
    eprintln!("made in {:?}", begun.elapsed());
    template.resume();
    ask(&template, &channel_path(directory.path(), 0), 1, limit)?;
    eprintln!("the agent answered after {:?}", begun.elapsed());
    if forks == 0 {
        return Ok(());
    }

    let begun = Instant::now();
    template.pause();
    let paused = begun.elapsed();
    let state = template.snapshot()?.encode()?;
    eprintln!("paused after {paused:?}, captured after {:?}: {} bytes", begun.elapsed(), state.len());
    drop(template);
    for fork in 0..forks {
        let directory = tempfile::tempdir()?;
        let devices = files(root_image, directory.path())?;
        let begun = Instant::now();
        let prepared = Prepared::new(kvm::open(None)?, config)?;
        let ready = begun.elapsed();
        let begun = Instant::now();
        let mut copy = prepared.restore(
            &Snapshot::decode(&state)?,
            &memory,
            None,
            devices,
            &offshoot_vmm::machine::Ready::default(),
        )?;
        let restored = begun.elapsed();
        copy.resume();
        let running = begun.elapsed();
        ask(&copy, &channel_path(directory.path(), 1), 2, limit)?;
        let answered = begun.elapsed();
        let begun = Instant::now();
        ask(&copy, &channel_path(directory.path(), 2), 3, limit)?;
        let again = begun.elapsed();
        let begun = Instant::now();
        drop(copy);
        let ended = begun.elapsed();
        eprintln!(
            "fork {fork}: prepared in {ready:?}; restored after {restored:?}, runs after {running:?}, answered after {answered:?}; again in {again:?}; ended in {ended:?}"
        );
    }
    Ok(())
}
