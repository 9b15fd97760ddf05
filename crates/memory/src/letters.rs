//! Filling the mailboxes of a guest that does not run: every marker is checked before the first byte is written.

use std::io;

use identity::{
    AckKey, MailboxName,
    mailbox::{Fill, Header, MailboxError, PAGE_SIZE, Page, State, fill, offset},
};
use thiserror::Error;

use crate::Mailbox;

/// Why nothing (or, for [`PatchError::Write`], not everything) was written. The machine must be destroyed.
#[derive(Debug, Error)]
pub enum PatchError {
    /// The process does not map the file as it should.
    #[error("the machine's process has no private mapping of its template's memory: {0}")]
    Mapping(&'static str),
    /// Its memory can not be reached.
    #[error("the memory of the machine's process can not be reached")]
    Open(#[source] io::Error),
    /// A marker is not where the capture found it.
    #[error("the marker of mailbox {name} is not where the template says ({reason}); build the template again")]
    Marker {
        /// The mailbox.
        name: MailboxName,
        /// What was found.
        reason: String,
    },
    /// A payload does not fit.
    #[error(transparent)]
    Payload(#[from] MailboxError),
    /// A write failed half-way.
    #[error("writing the mailboxes failed")]
    Write(#[source] io::Error),
}

/// A mailbox, its payload and its ack key.
pub type Letter<'a> = (&'a Mailbox, &'a [u8], &'a AckKey);

/// The private memory of a guest that does not run, by offset in its template's memory file.
pub trait PrivateMemory {
    /// Bytes of guest memory.
    fn size(&self) -> u64;

    /// Reads whole pages; the offsets are page-aligned and lie inside. As many pages as offsets, in their order.
    ///
    /// # Errors
    /// What reading fails of.
    fn read_pages(&self, offsets: &[u64]) -> io::Result<Vec<Page>>;

    /// Writes in the order given; each range lies within one page that was read before.
    ///
    /// # Errors
    /// What writing fails of: the memory may be half-written then.
    fn write_in_order(&self, writes: &[(u64, &[u8])]) -> io::Result<()>;
}

/// Fills mailboxes, all or nothing: every marker of every mailbox is checked before the first byte is written.
///
/// # Errors
/// [`PatchError`]; after [`PatchError::Write`] the memory is half-written, and the machine must be destroyed.
pub fn fill_mailboxes(memory: &impl PrivateMemory, letters: &[Letter<'_>]) -> Result<(), PatchError> {
    let mut plan: Vec<(u64, Fill)> = Vec::new();
    for ((mailbox, payload, ack_key), pages) in letters.iter().zip(read(memory, letters)?) {
        let header = check(mailbox, &pages)?;
        for part in fill(&header, payload, ack_key)? {
            plan.push((place(memory, mailbox, part.page_index)?, part));
        }
    }
    let at = |page: u64, field: usize| page + field as u64;
    let filled = State::Filled.to_bytes();
    let mut writes: Vec<(u64, &[u8])> =
        plan.iter().map(|(page, part)| (at(*page, offset::PAYLOAD_LEN), part.tail.expose())).collect();
    // Page 0 of each mailbox is what its reader waits for, so it is last.
    for later in [true, false] {
        let pages = plan.iter().filter(|(_, part)| (part.page_index > 0) == later);
        writes.extend(pages.map(|(page, _)| (at(*page, offset::STATE), filled.as_slice())));
    }
    memory.write_in_order(&writes).map_err(PatchError::Write)
}

/// Whether the mailbox is there and has been filled, and its owner has not taken the payload yet.
///
/// # Errors
/// [`PatchError`].
pub fn is_filled(memory: &impl PrivateMemory, mailbox: &Mailbox) -> Result<bool, PatchError> {
    let page = memory.read_pages(&[place(memory, mailbox, 0)?]).map_err(PatchError::Open)?;
    let header = page.first().and_then(|page| Header::parse(page).ok());
    Ok(header.is_some_and(|header| header.nonce == mailbox.nonce && header.state == State::Filled))
}

/// The pages of every letter's mailbox, read at once: reading may be a question to another process.
fn read(memory: &impl PrivateMemory, letters: &[Letter<'_>]) -> Result<Vec<Vec<Page>>, PatchError> {
    let mut places = Vec::new();
    for (mailbox, ..) in letters {
        for index in 0..mailbox.pages.len() {
            places.push(place(memory, mailbox, index)?);
        }
    }
    let mut pages = memory.read_pages(&places).map_err(PatchError::Open)?.into_iter();
    let pages: Vec<Vec<Page>> =
        letters.iter().map(|(mailbox, ..)| pages.by_ref().take(mailbox.pages.len()).collect()).collect();
    Ok(pages)
}

/// Whether every page of the mailbox is there, armed, and the one that was captured.
fn check(mailbox: &Mailbox, pages: &[Page]) -> Result<Header, PatchError> {
    let marker = |reason: String| PatchError::Marker { name: mailbox.name.clone(), reason };
    let mut first: Option<Header> = None;
    if pages.len() != mailbox.pages.len() {
        return Err(marker("not all of it could be read".into()));
    }
    for (index, page) in pages.iter().enumerate() {
        let header = Header::parse(page).map_err(|error| marker(error.to_string()))?;
        let right = header.name == mailbox.name
            && header.nonce == mailbox.nonce
            && header.capacity == mailbox.capacity
            && header.page_count == mailbox.pages.len()
            && header.page_index == index;
        if !right {
            return Err(marker("another mailbox is there".into()));
        }
        if header.state != State::Armed {
            return Err(marker("it is not armed".into()));
        }
        first.get_or_insert(header);
    }
    first.ok_or_else(|| marker("it has no pages".into()))
}

/// Where a mailbox's page is.
fn place(memory: &impl PrivateMemory, mailbox: &Mailbox, index: usize) -> Result<u64, PatchError> {
    let page = PAGE_SIZE as u64;
    mailbox
        .pages
        .get(index)
        .copied()
        .filter(|place| place.is_multiple_of(page))
        .filter(|place| place.checked_add(page).is_some_and(|end| end <= memory.size()))
        .ok_or_else(|| PatchError::Marker {
            name: mailbox.name.clone(),
            reason: "its place is outside of the memory".into(),
        })
}
