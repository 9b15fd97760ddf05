//! Finding the mailboxes of a captured template: once, so that no fork ever scans memory.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt};

use identity::{
    MailboxName,
    mailbox::{Header, MAX_CALLER_MAILBOXES, Nonce, PAGE_SIZE, Page, State, has_magic},
};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::sparse::{CHUNK, data_extents};

/// Most well-formed mailbox pages that a template may hold: 17 mailboxes of 18 pages fit many times over.
const MAX_MARKERS: usize = 4096;

/// Who planted a mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlantedBy {
    /// The agent, for itself.
    Agent,
    /// The agent, for a program that asked on its socket.
    Socket,
    /// A program in the guest, by itself.
    #[serde(rename = "self")]
    SelfPlanted,
}

/// A mailbox that the agent said is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedMailbox {
    /// Its name.
    pub name: MailboxName,
    /// Its nonce.
    pub nonce: Nonce,
    /// Who planted it.
    pub planted_by: PlantedBy,
}

/// A mailbox and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mailbox {
    /// Its name.
    pub name: MailboxName,
    /// Most payload bytes.
    pub capacity: usize,
    /// Who planted it.
    pub planted_by: PlantedBy,
    /// The token a caller must give; empty when none is needed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub token: Vec<u8>,
    /// Its nonce: what a fork's memory must show at every place before anything is written.
    pub nonce: Nonce,
    /// Offsets of its pages in the memory file, by page index.
    pub pages: Vec<u64>,
}

impl Mailbox {
    /// Whether `token` is the one it was planted with; compared in constant time.
    #[must_use]
    pub fn accepts_token(&self, token: &[u8]) -> bool {
        self.token.ct_eq(token).into()
    }
}

/// A name that stands for more than one mailbox, or for one that is not whole. It can not be addressed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ambiguous {
    /// The name.
    pub name: MailboxName,
    /// Why, for people.
    pub reason: String,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scan {
    /// Mailboxes that can be addressed, by name.
    pub mailboxes: Vec<Mailbox>,
    /// Names that can not.
    pub ambiguous: Vec<Ambiguous>,
    /// Pages that begin like a mailbox page and are none.
    pub malformed: usize,
}

/// Why a template's mailboxes can not be used.
#[derive(Debug, Error)]
pub enum ScanError {
    /// The memory file can not be read.
    #[error("the template's memory can not be read")]
    Read(#[from] io::Error),
    /// A mailbox of the agent is not where it must be.
    #[error("mailbox {name} of the agent is {what} in the template's memory; build the template again")]
    Agent {
        /// The mailbox.
        name: MailboxName,
        /// "absent", "doubled", "incomplete".
        what: &'static str,
    },
    /// More mailboxes than a fork can be given.
    #[error("the template has {count} mailboxes ({names}); at most {MAX_CALLER_MAILBOXES} are possible")]
    TooMany {
        /// How many.
        count: usize,
        /// Their names.
        names: String,
    },
    /// A flood of markers.
    #[error("the template's memory holds more than {MAX_MARKERS} mailbox pages")]
    Flood,
}

/// Finds every armed mailbox in a template's memory. `expected` are those the agent listed.
///
/// # Errors
/// [`ScanError`]. What is wrong with a mailbox that a program planted by itself is no error: its name is ambiguous then.
pub fn find_mailboxes(file: &File, expected: &[ExpectedMailbox]) -> Result<Scan, ScanError> {
    let mut finder = Finder::default();
    for_each_marker(file, |offset, page| finder.take(offset, page))?;
    finder.finish(expected)
}

/// Takes pages that may be a mailbox's, from wherever they come.
#[derive(Debug, Default)]
pub struct Finder {
    found: BTreeMap<(MailboxName, Nonce), Vec<(Header, u64)>>,
    markers: usize,
    malformed: usize,
}

impl Finder {
    /// Looks at a page; `offset` is its place in the memory.
    ///
    /// # Errors
    /// [`ScanError::Flood`].
    pub fn take(&mut self, offset: u64, page: &Page) -> Result<(), ScanError> {
        if !has_magic(page) {
            return Ok(());
        }
        match Header::parse(page) {
            Ok(header) if header.state == State::Armed => {
                self.markers += 1;
                self.found.entry((header.name.clone(), header.nonce)).or_default().push((header, offset));
            }
            Ok(_) => {}
            Err(_) => self.malformed += 1,
        }
        if self.markers > MAX_MARKERS { Err(ScanError::Flood) } else { Ok(()) }
    }

    /// The mailboxes. `expected` are those the agent listed.
    ///
    /// # Errors
    /// As [`find_mailboxes`].
    pub fn finish(self, expected: &[ExpectedMailbox]) -> Result<Scan, ScanError> {
        collect(self.found, self.malformed, expected)
    }
}

fn collect(
    mut found: BTreeMap<(MailboxName, Nonce), Vec<(Header, u64)>>,
    malformed: usize,
    expected: &[ExpectedMailbox],
) -> Result<Scan, ScanError> {
    let mut scan = Scan { malformed, ..Scan::default() };
    for wanted in expected {
        let agent = |what| ScanError::Agent { name: wanted.name.clone(), what };
        let pages = found.remove(&(wanted.name.clone(), wanted.nonce));
        match assemble(pages.as_deref().unwrap_or_default(), wanted.planted_by) {
            Ok(mailbox) => {
                // A page that calls itself the same is somebody's imitation or a stale copy; the nonce tells them apart.
                found.retain(|(name, _), _| *name != wanted.name || wanted.planted_by == PlantedBy::SelfPlanted);
                scan.mailboxes.push(mailbox);
            }
            Err(what) if wanted.planted_by == PlantedBy::SelfPlanted => {
                scan.ambiguous.push(Ambiguous { name: wanted.name.clone(), reason: format!("its pages are {what}") });
            }
            Err(what) => return Err(agent(what)),
        }
    }
    take_others(found, &mut scan);
    scan.mailboxes.sort_by(|a, b| a.name.cmp(&b.name));
    let callers: Vec<&str> = scan
        .mailboxes
        .iter()
        .map(|mailbox| mailbox.name.as_str())
        .filter(|name| !name.starts_with("offshoot:"))
        .collect();
    if callers.len() > MAX_CALLER_MAILBOXES {
        return Err(ScanError::TooMany { count: callers.len(), names: callers.join(", ") });
    }
    Ok(scan)
}

/// Mailboxes that programs planted by themselves: each name once, and whole.
fn take_others(found: BTreeMap<(MailboxName, Nonce), Vec<(Header, u64)>>, scan: &mut Scan) {
    let mut by_name: BTreeMap<MailboxName, Vec<Vec<(Header, u64)>>> = BTreeMap::new();
    for ((name, _), pages) in found {
        by_name.entry(name).or_default().push(pages);
    }
    for (name, mut sets) in by_name {
        let taken = scan.mailboxes.iter().position(|mailbox| mailbox.name == name);
        let reason = if taken.is_some() || sets.len() > 1 {
            format!("{} mailboxes have this name", sets.len() + usize::from(taken.is_some()))
        } else {
            let pages = sets.remove(0);
            if name.is_reserved() || pages.iter().any(|(header, _)| header.by_agent) {
                // Claims to be the agent's, and the agent does not know it.
                continue;
            }
            match assemble(&pages, PlantedBy::SelfPlanted) {
                Ok(mailbox) if mailbox.token.is_empty() => "it was planted without a token".to_owned(),
                Ok(mailbox) => {
                    scan.mailboxes.push(mailbox);
                    continue;
                }
                Err(what) => format!("its pages are {what}"),
            }
        };
        if let Some(index) = taken {
            scan.mailboxes.remove(index);
        }
        if !scan.ambiguous.iter().any(|ambiguous| ambiguous.name == name) {
            scan.ambiguous.push(Ambiguous { name, reason });
        }
    }
}

/// A mailbox from its pages: each index exactly once, all of one mailbox.
fn assemble(pages: &[(Header, u64)], planted_by: PlantedBy) -> Result<Mailbox, &'static str> {
    let (first, _) = pages.first().ok_or("absent")?;
    let mut offsets = vec![None; first.page_count];
    for (header, offset) in pages {
        if !header.same_mailbox(first) {
            return Err("contradictory");
        }
        if offsets[header.page_index].replace(*offset).is_some() {
            return Err("doubled");
        }
    }
    Ok(Mailbox {
        name: first.name.clone(),
        capacity: first.capacity,
        planted_by,
        token: first.token.clone(),
        nonce: first.nonce,
        pages: offsets.into_iter().collect::<Option<_>>().ok_or("incomplete")?,
    })
}

fn for_each_marker(file: &File, mut take: impl FnMut(u64, &Page) -> Result<(), ScanError>) -> Result<(), ScanError> {
    let mut buffer = vec![0; CHUNK];
    for extent in data_extents(file)? {
        let mut at = extent.start;
        while at < extent.end {
            let count = usize::try_from(extent.end - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut buffer[..count];
            file.read_exact_at(chunk, at)?;
            for (index, page) in chunk.chunks_exact(PAGE_SIZE).enumerate() {
                if has_magic(page)
                    && let Ok(page) = page.try_into()
                {
                    take(at + (index * PAGE_SIZE) as u64, page)?;
                }
            }
            at += count as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use identity::mailbox::{self, MailboxError, PAYLOAD_PER_PAGE, wipe};

    use super::*;

    fn name(text: &str) -> MailboxName {
        MailboxName::parse(text).unwrap()
    }

    /// As many pages as the capacity needs, armed.
    fn arm(
        name: &MailboxName,
        token: &[u8],
        nonce: Nonce,
        capacity: usize,
        by_agent: bool,
    ) -> Result<Vec<Page>, MailboxError> {
        let mut pages = vec![[0; PAGE_SIZE]; capacity.div_ceil(PAYLOAD_PER_PAGE)];
        mailbox::arm(&mut pages, name, token, nonce, capacity, by_agent)?;
        Ok(pages)
    }

    /// A memory file of 256 pages with these pages written from `at` on.
    fn write(file: &File, at: u64, pages: &[Page]) {
        for (index, page) in pages.iter().enumerate() {
            file.write_all_at(page, (at + index as u64) * PAGE_SIZE as u64).unwrap();
        }
    }

    fn image() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(256 * PAGE_SIZE as u64).unwrap();
        file
    }

    fn own() -> (ExpectedMailbox, Vec<Page>) {
        let expected = ExpectedMailbox { name: MailboxName::identity(), nonce: [7; 16], planted_by: PlantedBy::Agent };
        let pages = arm(&expected.name, b"", expected.nonce, 10_000, true).unwrap();
        (expected, pages)
    }

    #[test]
    fn i3_every_page_is_found_in_the_order_of_its_index() {
        let file = image();
        let (expected, mut pages) = own();
        pages.reverse();
        write(&file, 100, &pages);
        write(&file, 9, &arm(&name("app"), b"token", [1; 16], 100, false).unwrap());
        let scan = find_mailboxes(&file, &[expected]).unwrap();
        let places: Vec<_> =
            scan.mailboxes.iter().map(|mailbox| (mailbox.name.as_str(), mailbox.pages.clone())).collect();
        let page = PAGE_SIZE as u64;
        assert_eq!(places, [("app", vec![9 * page]), ("offshoot:identity", vec![102 * page, 101 * page, 100 * page])]);
        assert!(scan.mailboxes[0].accepts_token(b"token"));
        assert!(!scan.mailboxes[0].accepts_token(b"toke"));
        assert!(!scan.mailboxes[0].accepts_token(b"token1"));
    }

    #[test]
    fn the_agents_mailbox_must_be_there_exactly_once() {
        let (expected, pages) = own();
        let error = find_mailboxes(&image(), std::slice::from_ref(&expected)).unwrap_err();
        assert!(matches!(error, ScanError::Agent { what: "absent", .. }));
        let file = image();
        write(&file, 3, &pages);
        write(&file, 50, &pages[..1]);
        let error = find_mailboxes(&file, std::slice::from_ref(&expected)).unwrap_err();
        assert!(matches!(error, ScanError::Agent { what: "doubled", .. }));
        let file = image();
        write(&file, 3, &pages[1..]);
        let error = find_mailboxes(&file, std::slice::from_ref(&expected)).unwrap_err();
        assert!(matches!(error, ScanError::Agent { what: "incomplete", .. }));
    }

    #[test]
    fn i5_an_ambiguous_name_can_not_be_addressed_and_hides_no_other() {
        let file = image();
        let (expected, pages) = own();
        write(&file, 3, &pages);
        write(&file, 20, &arm(&name("twice"), b"t", [1; 16], 100, false).unwrap());
        write(&file, 21, &arm(&name("twice"), b"t", [2; 16], 100, false).unwrap());
        write(&file, 30, &arm(&name("copied"), b"t", [3; 16], 100, false).unwrap());
        write(&file, 31, &arm(&name("copied"), b"t", [3; 16], 100, false).unwrap());
        write(&file, 40, &arm(&name("open"), b"", [4; 16], 100, false).unwrap());
        write(&file, 41, &arm(&name("fine"), b"t", [5; 16], 100, false).unwrap());
        write(&file, 42, &arm(&name("offshoot:identity"), b"", [6; 16], 100, true).unwrap());
        let scan = find_mailboxes(&file, &[expected]).unwrap();
        let names = |names: Vec<&MailboxName>| names.into_iter().map(MailboxName::to_string).collect::<Vec<_>>();
        assert_eq!(names(scan.mailboxes.iter().map(|found| &found.name).collect()), ["fine", "offshoot:identity"]);
        assert_eq!(scan.mailboxes[1].nonce, [7; 16], "the imitation is not taken for the agent's");
        assert_eq!(names(scan.ambiguous.iter().map(|found| &found.name).collect()), ["copied", "open", "twice"]);
    }

    #[test]
    fn what_is_unaligned_taken_or_malformed_is_no_mailbox() {
        let file = image();
        let page = arm(&name("app"), b"t", [1; 16], 100, false).unwrap().remove(0);
        file.write_all_at(&page, 5 * PAGE_SIZE as u64 + 512).unwrap();
        let mut taken = page;
        wipe(&mut taken);
        write(&file, 20, &[taken]);
        let mut malformed = page;
        malformed[60] ^= 1;
        write(&file, 30, &[malformed]);
        let scan = find_mailboxes(&file, &[]).unwrap();
        assert_eq!((scan.mailboxes.len(), scan.ambiguous.len(), scan.malformed), (0, 0, 1));
    }

    #[test]
    fn i5_seventeen_mailboxes_are_one_too_many() {
        let file = image();
        for index in 0..17_u8 {
            write(
                &file,
                u64::from(index),
                &arm(&name(&format!("m{index}")), b"t", [index + 1; 16], 10, false).unwrap(),
            );
        }
        assert!(matches!(find_mailboxes(&file, &[]).unwrap_err(), ScanError::TooMany { count: 17, .. }));
    }
}
