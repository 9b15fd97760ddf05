//! A read-only disk over a raw image, shared by a template and all its forks.
//!
//! Requests are served in the vCPU's thread that announces them, straight from the file into guest memory. A guest that
//! waits for a cold page waits in its own thread, as it would for a disk.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsRawFd,
};

use vm_memory::VolatileSlice;

use super::{Chain, Kind, Progress, QueueError, Queues, VirtioDevice, read_config_bytes};
use crate::events::HostEvent;

/// Bytes of a sector: the unit of the protocol, whatever the image's file system uses.
const SECTOR: u64 = 512;

const QUEUE_SIZES: [u16; 1] = [256];

/// Most data buffers of a request: the queue's size less header and status.
const SEGMENTS_MAX: u32 = 254;

/// Most bytes of one request. Far above what drivers ask for (Linux: 1280 KiB), and a bound on the time of one.
const BYTES_MAX: u64 = 16 << 20;

/// Bytes read by one call, about; what is left is for the device thread. No driver has that much on its way, but a guest that
/// did could keep its vCPU from being paused.
const TURN_BYTES: u64 = 64 << 20;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;

/// Request types.
const T_IN: u32 = 0;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

/// Length of the answer to [`T_GET_ID`], bytes.
const ID_BYTES: usize = 20;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// What the status byte of a request says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    image: File,
    sectors: u64,
    id: [u8; ID_BYTES],
    config: [u8; 24],
}

impl Block {
    /// A disk with the image's size (less what is no whole sector). `id` is its serial number as the guest sees it, at
    /// most 20 bytes. The file's position is neither used nor changed, so the descriptor may be shared.
    ///
    /// # Errors
    /// If the image's size can not be found out.
    pub fn new(mut image: File, id: &str) -> io::Result<Self> {
        // The size of a block device is not in its metadata, so a file may have to seek; a shared position is no matter,
        // because nobody reads through it.
        let metadata = image.metadata()?;
        let bytes = if metadata.is_file() { metadata.len() } else { image.seek(SeekFrom::End(0))? };
        let sectors = bytes / SECTOR;
        let mut padded = [0; ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let mut config = [0; 24];
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&512_u32.to_le_bytes());
        Ok(Self { image, sectors, id: padded, config })
    }

    /// Serves one request; what is returned is the number of bytes written for the driver.
    fn serve(&self, chain: &Chain, queues: &Queues<'_>) -> Result<u32, QueueError> {
        let memory = queues.memory();
        // Without a place for the status there is no way to answer.
        let data_bytes = chain.writable_bytes().checked_sub(1).ok_or(QueueError::Small)?;
        let mut header = [0; HEADER_BYTES];
        let (status, written) = if chain.read(memory, 0, &mut header)? < HEADER_BYTES {
            (Status::IoError, 0)
        } else {
            let word =
                |at: usize| header.iter().skip(at).take(4).rev().fold(0, |all, &byte| all << 8 | u32::from(byte));
            let sector = u64::from(word(12)) << 32 | u64::from(word(8));
            match word(0) {
                T_IN => self.read(chain, queues, sector, data_bytes),
                // Nothing is ever written.
                T_FLUSH => (Status::Ok, 0),
                T_GET_ID => {
                    let count = usize::try_from(data_bytes).unwrap_or(ID_BYTES).min(ID_BYTES);
                    match chain.write(memory, 0, self.id.get(..count).unwrap_or_default()) {
                        Ok(written) => (Status::Ok, u32::try_from(written).unwrap_or(0)),
                        Err(_) => (Status::IoError, 0),
                    }
                }
                _ => (Status::Unsupported, 0),
            }
        };
        if chain.write(memory, data_bytes, &[status as u8])? != 1 {
            return Err(QueueError::Small);
        }
        Ok(written.saturating_add(1))
    }

    fn read(&self, chain: &Chain, queues: &Queues<'_>, sector: u64, bytes: u64) -> (Status, u32) {
        let in_range = bytes.is_multiple_of(SECTOR)
            && bytes <= BYTES_MAX
            && sector.checked_add(bytes / SECTOR).is_some_and(|end| end <= self.sectors);
        let (true, Ok(count)) = (in_range, usize::try_from(bytes)) else { return (Status::IoError, 0) };
        let Ok(slices) = chain.writable_slices(queues.memory(), 0, count) else { return (Status::IoError, 0) };
        match read_into(&self.image, sector * SECTOR, &slices) {
            Ok(()) => (Status::Ok, u32::try_from(bytes).unwrap_or(u32::MAX)),
            Err(_) => (Status::IoError, 0),
        }
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        FEATURE_SEG_MAX | FEATURE_READ_ONLY | FEATURE_BLOCK_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let mut moved = 0;
        // What is added meanwhile is announced again.
        for _ in 0..queues.waiting(queue)? {
            if moved >= TURN_BYTES {
                return Ok(Progress::More);
            }
            let Some(chain) = queues.next(queue)? else { break };
            let written = self.serve(&chain, queues)?;
            queues.complete(&chain, written)?;
            moved += u64::from(written);
        }
        Ok(Progress::Done)
    }

    fn host_event(&mut self, _event: HostEvent, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        self.notify(0, queues)
    }

    fn restored(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        self.notify(0, queues)
    }

    fn reset(&mut self) {}
}

/// Fills the slices from a place in a file.
fn read_into(file: &File, mut offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<_> = slices
        .iter()
        .zip(&guards)
        .map(|(slice, guard)| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() })
        .collect();
    let mut rest = &mut vectors[..];
    while let Some(first) = rest.first_mut() {
        if first.iov_len == 0 {
            rest = rest.get_mut(1..).unwrap_or_default();
            continue;
        }
        // IOV_MAX is 1024.
        let count = libc::c_int::try_from(rest.len().min(1024)).unwrap_or(1024);
        let position = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the vectors lie within volatile slices of guest memory, which stays mapped while the guards live, is no
        // Rust object, and is written by the guest at any time anyhow.
        let read = unsafe { libc::preadv(file.as_raw_fd(), rest.as_ptr(), count, position) };
        let Ok(mut read) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if read == 0 {
            // The image was cut off.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset += u64::try_from(read).unwrap_or_default();
        while let Some(vector) = rest.first_mut() {
            let taken = vector.iov_len.min(read);
            vector.iov_base = vector.iov_base.wrapping_byte_add(taken);
            vector.iov_len -= taken;
            read -= taken;
            if vector.iov_len > 0 {
                break;
            }
            rest = rest.get_mut(1..).unwrap_or_default();
        }
    }
    Ok(())
}
