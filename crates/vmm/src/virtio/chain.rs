//! Queues as a device sees them, and the chains of buffers in them.

use std::{
    io,
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use super::QueueError;
use crate::memory::GuestMemory;

/// Most buffers one chain may have. No driver uses more than its queue's size.
const MAX_SEGMENTS: usize = 1024;

/// Bit 0 of the available ring's flags: the driver polls and wants no interrupts.
const NO_INTERRUPT: u16 = 1;

/// The queues of one device during one call.
#[derive(Debug)]
pub struct Queues<'a> {
    memory: &'a GuestMemory,
    /// None: the driver has not made it ready.
    queues: &'a mut [Option<Queue>],
    /// Whether the driver is to be interrupted after this call.
    interrupt: bool,
}

/// One request: a chain of buffers that the driver made available. It stays in its queue until [`Queues::complete`].
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    queue: u16,
    head: u16,
    /// Buffers that the device reads, in order.
    pub readable: Vec<Segment>,
    /// Buffers that the device writes, in order.
    pub writable: Vec<Segment>,
}

/// One buffer. The address is the guest's word: it is checked when it is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// How long it is, bytes.
    pub bytes: u32,
}

impl<'a> Queues<'a> {
    pub(super) fn new(memory: &'a GuestMemory, queues: &'a mut [Option<Queue>]) -> Self {
        Self { memory, queues, interrupt: false }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// The chain that is next in a queue, if there is one. It is the next one until it is completed.
    ///
    /// # Errors
    /// [`QueueError`] if ring or chain are malformed.
    pub fn next(&mut self, index: u16) -> Result<Option<Chain>, QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)).and_then(Option::as_mut) else { return Ok(None) };
        let Some(chain) = queue.iter(self.memory).map_err(|_| QueueError::Ring)?.next() else { return Ok(None) };
        queue.go_to_previous_position();
        Chain::collect(index, chain).map(Some)
    }

    /// How many chains a queue holds. At most its size: one call handles no more than were there when it began, so that
    /// a guest that adds while the device works can not keep it for ever.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn waiting(&self, index: u16) -> Result<u16, QueueError> {
        let Some(queue) = self.queues.get(usize::from(index)).and_then(Option::as_ref) else { return Ok(0) };
        let filled = queue.avail_idx(self.memory, Ordering::Acquire).map_err(|_| QueueError::Ring)?;
        let count = filled.0.wrapping_sub(queue.next_avail());
        if count > queue.size() { Err(QueueError::Ring) } else { Ok(count) }
    }

    /// Gives the next chain of its queue back to the driver, with `written` bytes in its writable buffers.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        let queue = self.queues.get_mut(usize::from(chain.queue)).and_then(Option::as_mut).ok_or(QueueError::Ring)?;
        queue.set_next_avail(queue.next_avail().wrapping_add(1));
        queue.add_used(self.memory, chain.head, written).map_err(|_| QueueError::Ring)?;
        if !self.interrupt {
            // The driver that turns interrupts on looks at the used ring afterwards, we in the other order: with the
            // fence one of both sees the other.
            fence(Ordering::SeqCst);
            let flags: u16 = self
                .memory
                .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|_| QueueError::Ring)?;
            self.interrupt = flags & NO_INTERRUPT == 0;
        }
        Ok(())
    }

    pub(super) fn wants_interrupt(&self) -> bool {
        self.interrupt
    }
}

impl Chain {
    fn collect(queue: u16, chain: DescriptorChain<&GuestMemory>) -> Result<Self, QueueError> {
        let mut collected = Self { queue, head: chain.head_index(), readable: Vec::new(), writable: Vec::new() };
        // The iterator ends in the same way after the last descriptor and before one it can not follow (a loop, an
        // index outside the table): what tells them apart is whether another one was promised.
        let mut promised = true;
        for descriptor in chain {
            promised = descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), bytes: descriptor.len() };
            if descriptor.is_write_only() {
                collected.writable.push(segment);
            } else if collected.writable.is_empty() {
                collected.readable.push(segment);
            } else {
                return Err(QueueError::Order);
            }
            if collected.readable.len() + collected.writable.len() > MAX_SEGMENTS {
                return Err(QueueError::Endless);
            }
        }
        if promised { Err(QueueError::Endless) } else { Ok(collected) }
    }

    /// Bytes that the device may read.
    pub fn readable_bytes(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.bytes)).sum()
    }

    /// Bytes that the device may write.
    pub fn writable_bytes(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.bytes)).sum()
    }

    /// Copies out of the readable buffers, from `offset` in them: as much as there is, `data`'s length at most.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for slice in slices(memory, &self.readable, offset, data.len(), Permissions::Read)? {
            done += slice.copy_to(data.get_mut(done..).unwrap_or_default());
        }
        Ok(done)
    }

    /// Copies into the writable buffers, from `offset` in them: as much as fits.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for slice in slices(memory, &self.writable, offset, data.len(), Permissions::Write)? {
            let part = data.get(done..).unwrap_or_default();
            let part = part.get(..slice.len()).unwrap_or(part);
            slice.copy_from(part);
            done += part.len();
        }
        Ok(done)
    }

    /// The readable buffers from `offset` in them, `limit` bytes at most.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn readable_slices<'m>(
        &self,
        memory: &'m GuestMemory,
        offset: u64,
        limit: usize,
    ) -> Result<Vec<VolatileSlice<'m>>, QueueError> {
        slices(memory, &self.readable, offset, limit, Permissions::Read)
    }

    /// The writable buffers from `offset` in them, `limit` bytes at most.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn writable_slices<'m>(
        &self,
        memory: &'m GuestMemory,
        offset: u64,
        limit: usize,
    ) -> Result<Vec<VolatileSlice<'m>>, QueueError> {
        slices(memory, &self.writable, offset, limit, Permissions::Write)
    }
}

fn slices<'m>(
    memory: &'m GuestMemory,
    segments: &[Segment],
    mut offset: u64,
    limit: usize,
    access: Permissions,
) -> Result<Vec<VolatileSlice<'m>>, QueueError> {
    let mut found = Vec::with_capacity(segments.len());
    let mut left = limit;
    for segment in segments {
        if left == 0 {
            break;
        }
        let bytes = u64::from(segment.bytes);
        if offset >= bytes {
            offset -= bytes;
            continue;
        }
        let start = segment.address.0.checked_add(offset).map(GuestAddress).ok_or(QueueError::Address)?;
        let count = usize::try_from(bytes - offset).map_err(|_| QueueError::Address)?.min(left);
        offset = 0;
        left -= count;
        for slice in memory.get_slices(start, count, access).map_err(|_| QueueError::Address)? {
            found.push(slice.map_err(|_| QueueError::Address)?);
        }
    }
    Ok(found)
}

/// The cause of a failed transfer between guest memory and a descriptor.
pub(super) fn io_error(error: vm_memory::VolatileMemoryError) -> io::Error {
    match error {
        vm_memory::VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other.to_string()),
    }
}
