//! Loading the machine that a worker serves.

use std::{
    error::Error,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{Guest, Loading};

/// A machine's place.
#[derive(Debug)]
pub struct Loaded(OwnedFd);

/// Loads it.
///
/// # Errors
/// Always.
pub fn load(_: Loading) -> Result<Loaded, Box<dyn Error>> {
    Err("this build has no machine yet".into())
}

impl Guest for Loaded {
    fn memory_bytes(&self) -> u64 {
        0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resume(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn pause(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn capture(&mut self) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn end(&mut self) -> String {
        String::new()
    }
}
