//! What the kernel is told at resume: time, randomness, names. Descriptors are opened before the capture.

use std::{
    borrow::Cow,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use identity::ClockNanos;
use rustix::{
    fs::{Mode, OFlags},
    time::{ClockId, Timespec},
};
use zeroize::Zeroize;

use crate::boot::mounts;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
const RESEED: libc::c_ulong = 0x5207;

/// Bytes of entropy that are credited: what a document carries.
const ENTROPY: usize = identity::document::ENTROPY_LEN;

/// `struct rand_pool_info`.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    bytes: i32,
    buffer: [u8; ENTROPY],
}

/// Descriptors for the resume.
#[derive(Debug)]
pub struct Kernel {
    random: OwnedFd,
    boot_id: OwnedFd,
}

impl Kernel {
    /// Opens them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        let open = |path, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
        Ok(Self { random: open("/dev/urandom", OFlags::RDWR)?, boot_id: open(mounts::BOOT_ID, OFlags::WRONLY)? })
    }

    /// Sets the wall clock.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_clock(&self, now: ClockNanos) -> io::Result<Cow<'static, str>> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let tv_sec = i64::try_from(now.0 / 1_000_000_000).map_err(invalid)?;
        let tv_nsec = i64::try_from(now.0 % 1_000_000_000).map_err(invalid)?;
        rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?;
        Ok("set".into())
    }

    /// Credits the bytes to the kernel's generator and makes it take them at once. Only both together make two forks
    /// differ: a plain write is not credited, and without the reseed the generator goes on from the shared state.
    ///
    /// # Errors
    /// If one of the two was refused.
    pub fn add_entropy(&self, entropy: &[u8]) -> io::Result<Cow<'static, str>> {
        let mut info = PoolInfo { entropy_bits: 0, bytes: 0, buffer: [0; ENTROPY] };
        if entropy.len() != ENTROPY {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        info.buffer.copy_from_slice(entropy);
        info.bytes = i32::try_from(ENTROPY).unwrap_or_default();
        info.entropy_bits = info.bytes * 8;
        // SAFETY: the kernel reads the structure, whose buffer is as long as it says, and keeps no reference.
        let credited = unsafe { libc::ioctl(self.random.as_raw_fd(), ADD_ENTROPY, &raw const info) };
        let error = io::Error::last_os_error();
        info.buffer.zeroize();
        if credited != 0 {
            return Err(io::Error::new(error.kind(), format!("crediting: {error}")));
        }
        // SAFETY: the request takes no argument.
        if unsafe { libc::ioctl(self.random.as_raw_fd(), RESEED) } != 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("credited, but reseeding: {error}")));
        }
        Ok("credited+reseeded".into())
    }

    /// Sets what the workload sees as the kernel's boot id. The file is bind-mounted, so it is written in place; the
    /// workload is frozen, and the new content is as long as the old.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_boot_id(&self, id: &str) -> io::Result<Cow<'static, str>> {
        let line = [id, "\n"].concat();
        if rustix::io::pwrite(&self.boot_id, line.as_bytes(), 0)? != line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok("set".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_those_of_the_kernels_header() {
        // _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
        assert_eq!(ADD_ENTROPY, (1 << 30) | (8 << 16) | (0x52 << 8) | 3);
        assert_eq!(RESEED, (0x52 << 8) | 7);
        assert_eq!(size_of::<PoolInfo>(), 8 + ENTROPY);
    }
}
