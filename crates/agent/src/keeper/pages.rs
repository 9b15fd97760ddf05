//! The memory in which a mailbox lies: page-aligned, present and locked, so that its place in the guest's memory is
//! known once it is captured.

use std::{
    io, ptr,
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use identity::{
    AckKey, MailboxName, Secret,
    mailbox::{self, MailboxError, Nonce, PAGE_SIZE, Page, State, offset},
};
use rustix::mm::{MapFlags, ProtFlags};
use zeroize::Zeroize;

/// A mailbox's pages. Nobody in the guest but their owner writes to them; the host does, while the guest is stopped.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<Page>,
    count: usize,
}

// SAFETY: the memory belongs to this value alone, is not bound to a thread, and is changed only through `&mut self`;
// the one exception, the host's writing, happens while no thread of the guest runs.
unsafe impl Send for Pages {}
// SAFETY: as above; `&self` gives only reads.
unsafe impl Sync for Pages {}

impl Pages {
    /// Memory for a mailbox of `capacity` bytes, not armed yet.
    ///
    /// # Errors
    /// If there is no memory, or it can not be locked.
    pub fn new(capacity: usize) -> io::Result<Self> {
        let count = capacity.div_ceil(mailbox::PAYLOAD_PER_PAGE).max(1);
        let len = count * PAGE_SIZE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let memory =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        let start = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let pages = Self { start, count };
        // SAFETY: the mapping just made. A fork of the agent (a process being started) must not share the pages: a write
        // would then move the original somewhere else.
        unsafe {
            rustix::mm::mlock(memory, len)?;
            rustix::mm::madvise(memory, len, rustix::mm::Advice::LinuxDontFork)?;
        }
        Ok(pages)
    }

    /// Makes the pages an armed mailbox with this nonce.
    ///
    /// # Errors
    /// If the fields break a rule of the format, or the capacity is not the one the memory was made for.
    pub fn arm(&mut self, name: &MailboxName, token: &[u8], nonce: Nonce, capacity: usize) -> Result<(), MailboxError> {
        mailbox::arm(self.pages_mut(), name, token, nonce, capacity, true)
    }

    /// Makes the pages, whose payload was taken, the armed mailbox that they were before: same name, same nonce.
    ///
    /// # Errors
    /// If they have never been one.
    pub fn arm_again(&mut self) -> Result<(), MailboxError> {
        let [first, ..] = self.pages_mut() else { return Err(MailboxError::NotAMailbox) };
        let header = mailbox::Header::parse(first)?;
        if header.state != State::Taken {
            return Err(MailboxError::State("taken"));
        }
        mailbox::arm(self.pages_mut(), &header.name, &header.token, header.nonce, header.capacity, header.by_agent)
    }

    /// Whether the host has filled the mailbox. Cheap enough to spin on.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        // SAFETY: the first page's state, four bytes aligned to four, within the mapping.
        let state = unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u8>().add(offset::STATE).cast()) };
        u32::from_le(state.load(Ordering::Acquire)) == State::Filled as u32
    }

    /// Takes what the host wrote, and wipes it from the pages whatever it was. `None` while the mailbox is armed.
    ///
    /// # Errors
    /// If the write was torn or the pages are malformed.
    pub fn take(&mut self) -> Result<Option<(Secret, AckKey)>, MailboxError> {
        if !self.is_filled() {
            return Ok(None);
        }
        let pages = self.pages_mut();
        let taken = mailbox::take(&pages.iter().collect::<Vec<_>>());
        pages.iter_mut().for_each(mailbox::wipe);
        taken
    }

    fn pages_mut(&mut self) -> &mut [Page] {
        // SAFETY: the mapping has `count` pages, all present, and `&mut self` makes this the only reference. The host
        // writes only between arming and filled, and only while the guest is stopped; is_filled's load orders that
        // before every later read.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // No marker may stay behind in memory that is given back.
        self.pages_mut().iter_mut().for_each(Zeroize::zeroize);
        // SAFETY: the mapping was made by `new` and nobody refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.count * PAGE_SIZE) };
    }
}

/// A fresh nonce.
///
/// # Errors
/// If the kernel gives no random bytes.
pub fn fresh_nonce() -> io::Result<Nonce> {
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce)
        .map_err(|error| io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)))?;
    Ok(nonce)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn write(pages: &mut Pages, payload: &[u8]) {
        let header = mailbox::Header::parse(&pages.pages_mut()[0]).unwrap();
        let fills = mailbox::fill(&header, payload, &AckKey::new([7; 32])).unwrap();
        for fill in &fills {
            let tail = fill.tail.expose();
            pages.pages_mut()[fill.page_index][offset::PAYLOAD_LEN..][..tail.len()].copy_from_slice(tail);
        }
        for fill in fills.iter().rev() {
            pages.pages_mut()[fill.page_index][offset::STATE..][..4].copy_from_slice(&State::Filled.to_bytes());
        }
    }

    #[test]
    fn i15_a_taken_payload_is_gone_from_the_pages() {
        let name = MailboxName::identity();
        let mut pages = Pages::new(10_000).unwrap();
        pages.arm(&name, b"", fresh_nonce().unwrap(), 10_000).unwrap();
        assert!(pages.take().unwrap().is_none());
        let payload = [b'x'; 9_000];
        write(&mut pages, &payload);
        let (taken, key) = pages.take().unwrap().unwrap();
        assert_eq!(taken.expose(), payload);
        assert_eq!(key.expose(), &[7; 32]);
        assert!(pages.pages_mut().iter().all(|page| page[offset::PAYLOAD_LEN..].iter().all(|&byte| byte == 0)));
        assert!(pages.take().unwrap().is_none(), "a taken mailbox is not taken twice");
    }

    #[test]
    fn a_taken_mailbox_is_armed_again_as_it_was_and_no_other() {
        let mut pages = Pages::new(10_000).unwrap();
        assert!(pages.arm_again().is_err(), "it was no mailbox yet");
        pages.arm(&MailboxName::identity(), b"", fresh_nonce().unwrap(), 10_000).unwrap();
        let before = pages.pages_mut().to_vec();
        assert!(pages.arm_again().is_err(), "it is armed");
        for payload in [&b"a rehearsal"[..], &[b'x'; 9_000]] {
            write(&mut pages, payload);
            assert!(pages.arm_again().is_err(), "nobody has taken it");
            assert_eq!(pages.take().unwrap().unwrap().0.expose(), payload);
            pages.arm_again().unwrap();
            assert!(pages.pages_mut() == before, "byte for byte what was captured");
        }
        assert!(pages.take().unwrap().is_none());
    }

    #[test]
    fn i15_a_torn_payload_is_wiped_too() {
        let mut pages = Pages::new(8_000).unwrap();
        pages.arm(&MailboxName::identity(), b"", fresh_nonce().unwrap(), 8_000).unwrap();
        write(&mut pages, &[b'x'; 8_000]);
        pages.pages_mut()[1][offset::PAYLOAD] ^= 1;
        assert_eq!(pages.take().err(), Some(MailboxError::Torn));
        assert!(pages.pages_mut().iter().all(|page| page[offset::PAYLOAD_LEN..].iter().all(|&byte| byte == 0)));
    }

    #[test]
    fn each_arming_has_another_nonce() {
        assert_ne!(fresh_nonce().unwrap(), fresh_nonce().unwrap());
    }
}
