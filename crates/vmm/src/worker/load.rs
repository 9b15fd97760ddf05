//! Loading the machine that a worker serves.

use std::{
    error::Error,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use memory::Delta;

use super::{Guest, Loading, run::Source};
use crate::{
    machine::{DeviceFiles, Exit, Machine, Ready},
    prefetch::{self, PageList},
    snapshot::{MAX_BYTES, Snapshot},
};

/// Loads the machine: paused, before its first instruction or where it was captured.
///
/// # Errors
/// What speaks against the kernel, the state, or this host.
pub fn load(loading: Loading) -> Result<Machine, Box<dyn Error>> {
    let mut files = DeviceFiles {
        kvm: Some(loading.kvm),
        root_image: loading.root_image,
        ack: loading.ack,
        channels: loading.channels,
        console: None,
        network: loading.network,
    };
    match loading.source {
        Source::Boot { mut kernel, mut initramfs, command_line, console } => {
            files.console = Some(console);
            let config = loading.machine;
            Ok(Machine::boot(config, &loading.memory, &mut kernel, initramfs.as_mut(), &command_line, files)?)
        }
        Source::Restore { state, pages, own } => {
            let snapshot = Snapshot::decode(&read_bounded(state, MAX_BYTES)?)?;
            snapshot.check_machine(&loading.machine)?;
            let pages = pages.map(list).transpose()?.unwrap_or_default();
            let ready = Ready { pages, ahead: loading.ahead };
            let own =
                own.map(|(file, template)| Delta::open(file, loading.machine.memory_bytes, &template)).transpose()?;
            Ok(Machine::restore_with(&snapshot, &loading.memory, own.as_ref(), files, &ready)?)
        }
    }
}

/// A list that can not be read makes a fork slower, and is no reason not to have it.
fn list(pages: File) -> io::Result<PageList> {
    let list = PageList::decode(&read_bounded(pages, prefetch::MAX_BYTES)?);
    Ok(list.unwrap_or_else(|error| {
        eprintln!("the list of pages to have ready is not used: {error}");
        PageList::default()
    }))
}

/// All of a file that is no longer than it may be; one byte more is left for the decoder to refuse.
fn read_bounded(file: File, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Guest for Machine {
    fn memory_bytes(&self) -> u64 {
        self.config().memory_bytes
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        Self::read(self, offset, bytes).map_err(io::Error::other)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Self::write(self, offset, bytes).map_err(io::Error::other)
    }

    fn resume(&mut self) -> io::Result<()> {
        Self::resume(self);
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        Self::pause(self);
        Ok(())
    }

    fn capture(&mut self) -> io::Result<Vec<u8>> {
        self.snapshot().map_err(io::Error::other)?.encode().map_err(io::Error::other)
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn end(&mut self) -> String {
        match self.wait(Some(Duration::ZERO)) {
            Some(Exit::Reset) => "the guest reset it".into(),
            Some(Exit::Shutdown) => "the guest shut it down".into(),
            Some(Exit::Failed(reason)) => reason,
            None => "no reason was given".into(),
        }
    }
}
