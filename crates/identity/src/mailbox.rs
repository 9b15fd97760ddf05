//! The mailbox page: marked guest memory that the host fills before a fork runs.
//!
//! A mailbox is one or more pages of 4096 bytes, each aligned to 4096 bytes in guest-physical memory. Every page
//! describes itself, so the pages of one mailbox may lie anywhere. All numbers are little endian.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 16 | magic | the bytes `OFFSHOOT-MAILBOX` |
//! | 16 | 2 | version | 1 |
//! | 18 | 2 | flags | bit 0: planted by the agent; the others 0 |
//! | 20 | 4 | state | 1 armed, 2 filled, 3 taken |
//! | 24 | 16 | nonce | random, the same on all pages of one mailbox, never all zero, fresh at each arming |
//! | 40 | 4 | page index | from 0 |
//! | 44 | 4 | page count | 1 to 18 |
//! | 48 | 4 | capacity | most payload bytes, 1 to 65536; exactly as many pages as that needs |
//! | 52 | 1 | name length | 1 to 64 |
//! | 53 | 1 | token length | 0 to 128 |
//! | 54 | 2 | reserved | 0 |
//! | 56 | 64 | name | `[A-Za-z0-9._:-]`, the rest 0 |
//! | 120 | 128 | token | any bytes, the rest 0 |
//! | 248 | 4 | header checksum | CRC-32 (IEEE) of bytes 0 to 20 and 24 to 248, in this order: all but the state |
//! | 252 | 4 | payload length | 0 while armed; of the whole payload, on every page |
//! | 256 | 4 | payload checksum | CRC-32 of the whole payload, on every page |
//! | 260 | 32 | ack key | this mailbox's key for acks, on every page |
//! | 292 | 28 | reserved | 0 |
//! | 320 | 3776 | payload | this page's part: bytes `index * 3776` and on |
//!
//! The host first writes bytes 252 and on of every page, then the states, page 0 last. A reader waits until page 0 is
//! `filled`, then wants every page to be `filled` and the checksum to hold; anything else is a torn write. Once it has
//! the payload it zeroes bytes 252 and on of every page and sets the states to `taken`, page 0 first.

use thiserror::Error;
use zeroize::Zeroize;

use crate::{
    key::{AckKey, KEY_LEN},
    name::MailboxName,
    secret::Secret,
};

/// Size and alignment of a mailbox page, in bytes.
pub const PAGE_SIZE: usize = 4096;
/// First bytes of every mailbox page.
pub const MAGIC: [u8; 16] = *b"OFFSHOOT-MAILBOX";
/// Version of the layout.
pub const VERSION: u16 = 1;
/// Payload bytes of one page.
pub const PAYLOAD_PER_PAGE: usize = PAGE_SIZE - offset::PAYLOAD;
/// Largest payload of a mailbox, in bytes.
pub const MAX_CAPACITY: usize = 64 * 1024;
/// Most pages of a mailbox.
pub const MAX_PAGES: usize = MAX_CAPACITY.div_ceil(PAYLOAD_PER_PAGE);
/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 128;
/// Most mailboxes of callers that one fork may be given payloads for.
pub const MAX_CALLER_MAILBOXES: usize = 16;

/// Where the fields are.
pub mod offset {
    /// See the table of the module.
    pub const VERSION: usize = 16;
    /// See the table of the module.
    pub const FLAGS: usize = 18;
    /// See the table of the module.
    pub const STATE: usize = 20;
    /// See the table of the module.
    pub const NONCE: usize = 24;
    /// See the table of the module.
    pub const PAGE_INDEX: usize = 40;
    /// See the table of the module.
    pub const PAGE_COUNT: usize = 44;
    /// See the table of the module.
    pub const CAPACITY: usize = 48;
    /// See the table of the module.
    pub const NAME_LEN: usize = 52;
    /// See the table of the module.
    pub const TOKEN_LEN: usize = 53;
    /// See the table of the module.
    pub const NAME: usize = 56;
    /// See the table of the module.
    pub const TOKEN: usize = 120;
    /// See the table of the module.
    pub const HEADER_CRC: usize = 248;
    /// See the table of the module. From here on the host writes.
    pub const PAYLOAD_LEN: usize = 252;
    /// See the table of the module.
    pub const PAYLOAD_CRC: usize = 256;
    /// See the table of the module.
    pub const ACK_KEY: usize = 260;
    /// See the table of the module.
    pub const PAYLOAD: usize = 320;
}

const FLAG_AGENT: u16 = 1;

/// One page of a mailbox.
pub type Page = [u8; PAGE_SIZE];

/// The nonce of a mailbox.
pub type Nonce = [u8; 16];

/// A mailbox page's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Waits for a payload.
    Armed = 1,
    /// Holds a payload.
    Filled = 2,
    /// The payload was taken and wiped.
    Taken = 3,
}

impl State {
    /// The state as it stands in the page.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 4] {
        (self as u32).to_le_bytes()
    }

    fn from_u32(value: u32) -> Option<Self> {
        [Self::Armed, Self::Filled, Self::Taken].into_iter().find(|&state| state as u32 == value)
    }
}

/// Why a page is not a valid mailbox page, or a mailbox can not be filled or read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MailboxError {
    /// The page does not begin with the magic bytes.
    #[error("the page is not a mailbox page")]
    NotAMailbox,
    /// The layout's version is another one.
    #[error("mailbox page of version {0}; this build knows version {VERSION}")]
    Version(u16),
    /// A field breaks its rule.
    #[error("mailbox page with a bad {0}")]
    Field(&'static str),
    /// A page is in another state than the operation needs.
    #[error("mailbox page is not {0}")]
    State(&'static str),
    /// The payload is longer than the mailbox's capacity.
    #[error("the payload has {len} bytes; mailbox {name} takes {capacity}")]
    TooLong {
        /// The mailbox.
        name: MailboxName,
        /// Bytes given.
        len: usize,
        /// Bytes possible.
        capacity: usize,
    },
    /// The pages do not belong together, or the payload does not match its checksum.
    #[error("the mailbox was written in part")]
    Torn,
}

/// What a mailbox page says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The mailbox's name.
    pub name: MailboxName,
    /// The token a caller must give; empty when none is needed.
    pub token: Vec<u8>,
    /// The mailbox's nonce.
    pub nonce: Nonce,
    /// This page's index.
    pub page_index: usize,
    /// Pages of the mailbox.
    pub page_count: usize,
    /// Most payload bytes.
    pub capacity: usize,
    /// Whether the agent planted it (for itself or for a program that asked).
    pub by_agent: bool,
    /// This page's state.
    pub state: State,
}

/// Whether `page` begins like a mailbox page. Cheap: made for scanning.
#[must_use]
pub fn has_magic(page: &[u8]) -> bool {
    page.starts_with(&MAGIC)
}

/// Makes `pages` an armed mailbox, in place: a copy of a page elsewhere in the guest's memory would be found too.
///
/// # Errors
/// [`MailboxError::Field`] if the capacity, the token or the nonce breaks its rule, or the capacity needs another number of
/// pages; nothing is written then.
pub fn arm(
    pages: &mut [Page],
    name: &MailboxName,
    token: &[u8],
    nonce: Nonce,
    capacity: usize,
    by_agent: bool,
) -> Result<(), MailboxError> {
    let mut header = Header {
        name: name.clone(),
        token: token.to_vec(),
        nonce,
        page_index: 0,
        page_count: pages.len(),
        capacity,
        by_agent,
        state: State::Armed,
    };
    header.check()?;
    for (page_index, page) in pages.iter_mut().enumerate() {
        header.page_index = page_index;
        header.write_to(page);
    }
    Ok(())
}

impl Header {
    /// Reads and checks a page's header.
    ///
    /// # Errors
    /// [`MailboxError`] if the page is not a well-formed mailbox page.
    pub fn parse(page: &Page) -> Result<Self, MailboxError> {
        if !has_magic(page) {
            return Err(MailboxError::NotAMailbox);
        }
        let version = read_u16(page, offset::VERSION);
        if version != VERSION {
            return Err(MailboxError::Version(version));
        }
        if read_u32(page, offset::HEADER_CRC) != header_crc(page) {
            return Err(MailboxError::Field("header checksum"));
        }
        let flags = read_u16(page, offset::FLAGS);
        if flags & !FLAG_AGENT != 0 {
            return Err(MailboxError::Field("flags"));
        }
        let name_len = usize::from(page[offset::NAME_LEN]);
        let token_len = usize::from(page[offset::TOKEN_LEN]);
        if name_len > offset::TOKEN - offset::NAME || token_len > MAX_TOKEN {
            return Err(MailboxError::Field("name or token length"));
        }
        let (name, name_rest) = page[offset::NAME..offset::TOKEN].split_at(name_len);
        let (token, token_rest) = page[offset::TOKEN..offset::HEADER_CRC].split_at(token_len);
        if name_rest.iter().chain(token_rest).chain(&page[54..56]).any(|&byte| byte != 0) {
            return Err(MailboxError::Field("padding"));
        }
        let name = str::from_utf8(name).map_err(|_| MailboxError::Field("name"))?;
        let header = Self {
            name: MailboxName::parse(name).map_err(|_| MailboxError::Field("name"))?,
            token: token.to_vec(),
            nonce: read(page, offset::NONCE),
            page_index: read_u32(page, offset::PAGE_INDEX) as usize,
            page_count: read_u32(page, offset::PAGE_COUNT) as usize,
            capacity: read_u32(page, offset::CAPACITY) as usize,
            by_agent: flags & FLAG_AGENT != 0,
            state: State::from_u32(read_u32(page, offset::STATE)).ok_or(MailboxError::Field("state"))?,
        };
        header.check()?;
        Ok(header)
    }

    /// Whether two pages belong to one mailbox.
    #[must_use]
    pub fn same_mailbox(&self, other: &Self) -> bool {
        self.name == other.name
            && self.token == other.token
            && self.nonce == other.nonce
            && self.page_count == other.page_count
            && self.capacity == other.capacity
            && self.by_agent == other.by_agent
    }

    fn check(&self) -> Result<(), MailboxError> {
        if self.nonce == [0; 16] {
            return Err(MailboxError::Field("nonce"));
        }
        if self.token.len() > MAX_TOKEN {
            return Err(MailboxError::Field("token length"));
        }
        if self.capacity == 0 || self.capacity > MAX_CAPACITY {
            return Err(MailboxError::Field("capacity"));
        }
        if self.page_count != self.capacity.div_ceil(PAYLOAD_PER_PAGE) || self.page_index >= self.page_count {
            return Err(MailboxError::Field("page count or index"));
        }
        Ok(())
    }

    #[allow(clippy::cast_possible_truncation)] // Every number was checked against its small limit.
    fn write_to(&self, page: &mut Page) {
        page.fill(0);
        write(page, 0, &MAGIC);
        write(page, offset::VERSION, &VERSION.to_le_bytes());
        write(page, offset::FLAGS, &(if self.by_agent { FLAG_AGENT } else { 0 }).to_le_bytes());
        write(page, offset::STATE, &self.state.to_bytes());
        write(page, offset::NONCE, &self.nonce);
        write(page, offset::PAGE_INDEX, &(self.page_index as u32).to_le_bytes());
        write(page, offset::PAGE_COUNT, &(self.page_count as u32).to_le_bytes());
        write(page, offset::CAPACITY, &(self.capacity as u32).to_le_bytes());
        page[offset::NAME_LEN] = self.name.as_str().len() as u8;
        page[offset::TOKEN_LEN] = self.token.len() as u8;
        write(page, offset::NAME, self.name.as_str().as_bytes());
        write(page, offset::TOKEN, &self.token);
        let crc = header_crc(page);
        write(page, offset::HEADER_CRC, &crc.to_le_bytes());
    }
}

/// What the host writes into one page: `tail` at [`offset::PAYLOAD_LEN`] first, and when every page has its tail, the
/// state [`State::Filled`] at [`offset::STATE`], page 0 last. The tail is wiped on drop.
#[derive(Debug, Clone)]
pub struct Fill {
    /// Index of the page.
    pub page_index: usize,
    /// Bytes from [`offset::PAYLOAD_LEN`] on: the length and what follows it, up to the end of the payload's part.
    pub tail: Secret,
}

/// The host's side: what to write into the pages of the mailbox that `header` (of any of its pages) describes.
///
/// # Errors
/// [`MailboxError::TooLong`].
#[allow(clippy::cast_possible_truncation)] // The length is at most MAX_CAPACITY.
pub fn fill(header: &Header, payload: &[u8], ack_key: &AckKey) -> Result<Vec<Fill>, MailboxError> {
    if payload.len() > header.capacity {
        return Err(MailboxError::TooLong { name: header.name.clone(), len: payload.len(), capacity: header.capacity });
    }
    let crc = crc32fast::hash(payload);
    Ok((0..header.page_count)
        .map(|page_index| {
            let mut page = [0; PAGE_SIZE];
            write(&mut page, offset::PAYLOAD_LEN, &(payload.len() as u32).to_le_bytes());
            write(&mut page, offset::PAYLOAD_CRC, &crc.to_le_bytes());
            write(&mut page, offset::ACK_KEY, ack_key.expose());
            let part = part_of(payload.len(), page_index);
            // The rest of an armed page is zero already.
            let end = offset::PAYLOAD + part.len();
            write(&mut page, offset::PAYLOAD, &payload[part]);
            let tail = Secret::new(page[offset::PAYLOAD_LEN..end].to_vec());
            page.zeroize();
            Fill { page_index, tail }
        })
        .collect())
}

/// The guest's side: the payload and the ack key, once the mailbox is filled; `None` while it is armed.
///
/// `pages` are the mailbox's pages in the order of their index.
///
/// # Errors
/// [`MailboxError`] if a page is malformed or the write was torn.
pub fn take(pages: &[&Page]) -> Result<Option<(Secret, AckKey)>, MailboxError> {
    let first = Header::parse(pages.first().ok_or(MailboxError::Torn)?)?;
    match first.state {
        State::Armed => return Ok(None),
        State::Filled => {}
        State::Taken => return Err(MailboxError::State("filled")),
    }
    if pages.len() != first.page_count {
        return Err(MailboxError::Torn);
    }
    let len = read_u32(pages[0], offset::PAYLOAD_LEN) as usize;
    let crc = read_u32(pages[0], offset::PAYLOAD_CRC);
    let mut key: [u8; KEY_LEN] = read(pages[0], offset::ACK_KEY);
    if len > first.capacity {
        return Err(MailboxError::Torn);
    }
    let mut payload = Vec::with_capacity(len);
    for (index, page) in pages.iter().enumerate() {
        let header = Header::parse(page)?;
        let whole = header.same_mailbox(&first)
            && header.page_index == index
            && header.state == State::Filled
            && read_u32(page, offset::PAYLOAD_LEN) as usize == len
            && read_u32(page, offset::PAYLOAD_CRC) == crc
            && read::<KEY_LEN>(page, offset::ACK_KEY) == key;
        if !whole {
            return Err(MailboxError::Torn);
        }
        let part = part_of(len, index);
        payload.extend_from_slice(&page[offset::PAYLOAD..offset::PAYLOAD + part.len()]);
    }
    let payload = Secret::new(payload);
    if crc32fast::hash(payload.expose()) != crc {
        return Err(MailboxError::Torn);
    }
    let ack_key = AckKey::new(key);
    key.zeroize();
    Ok(Some((payload, ack_key)))
}

/// Wipes everything the host wrote and marks the page as taken.
pub fn wipe(page: &mut Page) {
    page[offset::PAYLOAD_LEN..].zeroize();
    write(page, offset::STATE, &State::Taken.to_bytes());
}

/// The part of a payload of `len` bytes that page `index` holds.
fn part_of(len: usize, index: usize) -> std::ops::Range<usize> {
    let start = (index * PAYLOAD_PER_PAGE).min(len);
    start..(start + PAYLOAD_PER_PAGE).min(len)
}

fn header_crc(page: &Page) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&page[..offset::STATE]);
    hasher.update(&page[offset::NONCE..offset::HEADER_CRC]);
    hasher.finalize()
}

fn read<const N: usize>(page: &Page, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&page[at..at + N]);
    bytes
}

fn read_u16(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes(read(page, at))
}

fn read_u32(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes(read(page, at))
}

fn write(page: &mut Page, at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}
