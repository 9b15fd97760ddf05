//! A worker whose machine is memory alone, to try jail and protocol where there is no KVM, and to see it end when it does
//! what it must not: when it is resumed, it makes the system call whose number the memory's first four bytes hold.

use std::{
    error::Error,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
};

use offshoot_vmm::{
    memory::{self, GuestMemory, Sharing},
    worker::{self, Guest, Loading},
};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

fn main() -> ExitCode {
    worker::main(load)
}

#[derive(Debug)]
struct Idle {
    memory: GuestMemory,
    bytes: u64,
    ended: OwnedFd,
    said: String,
}

fn load(loading: Loading) -> Result<Idle, Box<dyn Error>> {
    let sharing = if loading.is_template() { Sharing::Shared } else { Sharing::Private };
    let file: File = loading.memory;
    let bytes = loading.machine.memory_bytes;
    let memory = memory::map(&file, bytes, sharing)?;
    let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    Ok(Idle { memory, bytes, ended, said: String::new() })
}

impl Guest for Idle {
    fn memory_bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read_slice(bytes, GuestAddress(offset)).map_err(io::Error::other)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_slice(bytes, GuestAddress(offset)).map_err(io::Error::other)
    }

    /// What the guest does: a system call, or none for 0xffff_ffff.
    fn resume(&mut self) -> io::Result<()> {
        let number: u32 = self.memory.read_obj(GuestAddress(0)).map_err(io::Error::other)?;
        if number == u32::MAX {
            return Ok(());
        }
        // SAFETY: none of the calls that the tests ask for does anything to memory.
        let answer = unsafe { libc::syscall(number.into(), 0, 0, 0, 0, 0, 0) };
        self.said = format!("it answered {answer}");
        rustix::io::write(&self.ended, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn capture(&mut self) -> io::Result<Vec<u8>> {
        Ok(b"the state".to_vec())
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    fn end(&mut self) -> String {
        self.said.clone()
    }
}
