//! Randomness of a frozen runtime, replaced where it lies.
//!
//! A runtime that keeps the states of its generators at known places says so at the quiesce. In a fork the agent fills them
//! with the kernel's fresh random bytes before the thaw: no thread of the runtime, however early, draws what another fork
//! draws, and the ack need not wait until the runtime has run.

use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::{Mode, OFlags},
    rand::{GetRandomFlags, getrandom},
};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{answer, runtime::Report};

/// Most places, and most bytes of all together. Python's and numpy's largest state has 2.5 KiB.
const MAX_PLACES: usize = 1024;
const MAX_BYTES: usize = 1 << 20;

/// What is filled in a fork, and what may then be reported.
#[derive(Debug)]
pub(crate) struct InPlace {
    memory: OwnedFd,
    /// Addresses and lengths.
    places: Vec<(u64, usize)>,
    random: Zeroizing<Vec<u8>>,
    /// Absent once it was given: this is for one identity.
    report: Option<Report>,
    filled: bool,
}

impl InPlace {
    /// Reads what the runtime `pid` said: `{"memory":[[address,length],…],"report":{…}}`. The memory is the workload's own, so
    /// a wrong address harms nobody else.
    ///
    /// # Errors
    /// If it is not of that form, asks for too much, or names memory that is not there.
    pub(crate) fn open(pid: i32, raw: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Said<'a> {
            memory: Vec<(u64, usize)>,
            #[serde(borrow)]
            report: &'a serde_json::value::RawValue,
        }
        let said: Said<'_> = serde_json::from_str(raw).map_err(|_| "it is not of the expected form".to_owned())?;
        let bytes = said.memory.iter().try_fold(0_usize, |sum, (_, len)| sum.checked_add(*len).filter(|_| *len > 0));
        let bytes = bytes.filter(|&bytes| bytes <= MAX_BYTES && said.memory.len() <= MAX_PLACES);
        let mut random = Zeroizing::new(vec![0; bytes.ok_or("it asks for too much")?]);
        let report = answer::report(said.report.get()).map_err(|error| error.to_string())?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let memory = rustix::fs::open(format!("/proc/{pid}/mem"), flags, Mode::empty()).map_err(|e| e.to_string())?;
        for &(address, len) in &said.memory {
            match rustix::io::pread(&memory, &mut random[..len], address) {
                Ok(read) if read == len => {}
                _ => return Err("it names memory that is not there".to_owned()),
            }
        }
        Ok(Self { memory, places: said.memory, random, report: Some(report), filled: false })
    }

    /// Fills all of it; false if that was for an earlier identity.
    ///
    /// # Errors
    /// What the kernel says; some of it may be filled.
    pub(crate) fn fill(&mut self) -> io::Result<bool> {
        if self.report.is_none() {
            return Ok(false);
        }
        // What a rehearsal has filled is no fork's.
        self.filled = false;
        let mut filled = 0;
        while filled < self.random.len() {
            filled += getrandom(&mut self.random[filled..], GetRandomFlags::empty())?;
        }
        let mut rest = &self.random[..];
        for &(address, len) in &self.places {
            let (bytes, after) = rest.split_at(len);
            if rustix::io::pwrite(&self.memory, bytes, address)? != len {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = after;
        }
        self.filled = true;
        Ok(true)
    }

    /// What may be reported, once, if it was filled.
    pub(crate) fn take_report(&mut self) -> Option<Report> {
        self.filled.then(|| self.report.take())?
    }
}
