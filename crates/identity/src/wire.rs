//! The identity document as bytes: what a mailbox carries.
//!
//! Not JSON, because of the reader: under emulation every instruction that a fork runs has to be translated first, and
//! a general parser has many (measured: 7 ms of a fork's way to its ack). Here one small function reads every field.
//!
//! All numbers are little endian. *Text* is its length (4 bytes), then its bytes, which are UTF-8; *bytes* likewise
//! without that rule.
//!
//! | field | form |
//! |---|---|
//! | magic | `OFFD` |
//! | format | 4 bytes: 1 ([`FORMAT`]) without a network section, 2 ([`FORMAT_NETWORK`]) with one |
//! | action | 4 bytes: 1 become, 2 continue, 3 rehearse |
//! | wall clock | 8 bytes |
//! | limits | three times (pids, memory, CPU): 4 bytes 0, or 4 bytes 1 and 8 bytes |
//! | id, name, host name, template, machine id, boot id | text each |
//! | entropy, ack key | bytes each |
//! | labels, environment, secrets | 4 bytes: how many; then name (text) and value (text; a secret's: bytes) of each, names strictly ascending |
//! | files | 4 bytes: how many; then path (text), mode (4 bytes) and content (bytes) of each |
//! | network | format 2 only: the section (see [`crate::network`]) |
//!
//! Nothing follows. A document has exactly one form.
//!
//! A guest is captured with the reader of its day. One that knows only format 1 goes on taking every document that has no network section, whose
//! bytes are the same as ever; what it would have to apply and can not is refused by its format's number, with a text that says so.

use std::collections::BTreeMap;

use zeroize::Zeroizing;

use crate::{
    AckKey, Action, ClockNanos, Document, DocumentError, EnvName, File, ForkId, ForkIdentity, ForkName, Limits,
    Network, Secret, SecretName, Tag,
    document::{FORMAT, FORMAT_NETWORK, MAX_ENTRIES},
};

const MAGIC: [u8; 4] = *b"OFFD";

/// The bytes end too early, or are none of the known ones.
#[derive(Debug)]
pub(crate) struct Malformed;

#[derive(Debug)]
enum Refused {
    Malformed,
    Format(u32),
}

impl From<Malformed> for Refused {
    fn from(Malformed: Malformed) -> Self {
        Self::Malformed
    }
}

impl Document {
    /// The document as the bytes of a mailbox, in memory that is wiped on drop.
    #[must_use]
    pub fn to_bytes(&self) -> Secret {
        // Grown in advance: what a vector leaves behind when it grows is not wiped.
        let mut bytes = Vec::with_capacity(self.wire_len());
        bytes.extend_from_slice(&MAGIC);
        push_u32(&mut bytes, self.format);
        push_u32(
            &mut bytes,
            match self.action {
                Action::Become => 1,
                Action::Continue => 2,
                Action::Rehearse => 3,
            },
        );
        bytes.extend_from_slice(&self.wall_clock.0.to_le_bytes());
        for limit in [self.limits.pids, self.limits.memory, self.limits.cpu_millis] {
            push_u32(&mut bytes, u32::from(limit.is_some()));
            bytes.extend(limit.into_iter().flat_map(u64::to_le_bytes));
        }
        for text in self.fork_texts() {
            push(&mut bytes, text.as_bytes());
        }
        push(&mut bytes, self.entropy.expose());
        push(&mut bytes, self.ack_key.expose());
        push_map(&mut bytes, self.labels.len(), self.labels.iter().map(|(k, v)| (k.as_str(), v.as_bytes())));
        push_map(&mut bytes, self.env.len(), self.env.iter().map(|(k, v)| (k.as_str(), v.as_bytes())));
        push_map(&mut bytes, self.secrets.len(), self.secrets.iter().map(|(k, v)| (k.as_str(), v.expose())));
        push_len(&mut bytes, self.files.len());
        for file in &self.files {
            push(&mut bytes, file.path.as_bytes());
            push_u32(&mut bytes, file.mode);
            push(&mut bytes, file.content.expose());
        }
        if let Some(network) = &self.network {
            network.write(&mut bytes);
        }
        Secret::new(bytes)
    }

    /// Reads and checks a document.
    ///
    /// # Errors
    /// [`DocumentError`]; its text never repeats the document's content.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        let mut reader = Reader { rest: bytes };
        match reader.document() {
            Ok(document) => document.check().map(|()| document),
            Err(Refused::Format(format)) => Err(DocumentError::Format(format)),
            Err(Refused::Malformed) => Err(DocumentError::MalformedBytes { at: bytes.len() - reader.rest.len() }),
        }
    }

    fn fork_texts(&self) -> [&str; 6] {
        let fork = &self.fork;
        [
            fork.id.as_str(),
            fork.name.as_str(),
            fork.hostname.as_str(),
            fork.template.as_str(),
            &fork.machine_id,
            &fork.boot_id,
        ]
    }

    /// At least the length of the bytes.
    fn wire_len(&self) -> usize {
        let pair = |name: usize, value: usize| name + value + 12;
        let mut len = 256 + self.entropy.expose().len();
        len += self.fork_texts().iter().map(|text| text.len()).sum::<usize>();
        len += self.labels.iter().map(|(k, v)| pair(k.len(), v.len())).sum::<usize>();
        len += self.env.iter().map(|(k, v)| pair(k.as_str().len(), v.len())).sum::<usize>();
        len += self.secrets.iter().map(|(k, v)| pair(k.as_str().len(), v.expose().len())).sum::<usize>();
        // 160 is what a network section's fields take at most besides its domains.
        len += self.network.iter().flat_map(|network| &network.search).map(|domain| domain.len() + 4).sum::<usize>();
        len += if self.network.is_some() { 160 } else { 0 };
        len + self.files.iter().map(|file| pair(file.path.len(), file.content.expose().len())).sum::<usize>()
    }
}

pub(crate) fn push_u32(bytes: &mut Vec<u8>, number: u32) {
    bytes.extend_from_slice(&number.to_le_bytes());
}

/// What is longer than 4 GiB fits into no mailbox; its length is then wrong, but never read.
pub(crate) fn push_len(bytes: &mut Vec<u8>, len: usize) {
    push_u32(bytes, u32::try_from(len).unwrap_or(u32::MAX));
}

pub(crate) fn push(bytes: &mut Vec<u8>, field: &[u8]) {
    push_len(bytes, field.len());
    bytes.extend_from_slice(field);
}

fn push_map<'a>(bytes: &mut Vec<u8>, len: usize, entries: impl Iterator<Item = (&'a str, &'a [u8])>) {
    push_len(bytes, len);
    for (name, value) in entries {
        push(bytes, name.as_bytes());
        push(bytes, value);
    }
}

pub(crate) struct Reader<'a> {
    pub(crate) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn document(&mut self) -> Result<Document, Refused> {
        if self.take(4)? != MAGIC {
            return Err(Malformed.into());
        }
        let format = self.u32()?;
        if !matches!(format, FORMAT | FORMAT_NETWORK) {
            return Err(Refused::Format(format));
        }
        let action = match self.u32()? {
            1 => Action::Become,
            2 => Action::Continue,
            3 => Action::Rehearse,
            _ => return Err(Malformed.into()),
        };
        let wall_clock = ClockNanos(self.u64()?);
        let limits = Limits { pids: self.limit()?, memory: self.limit()?, cpu_millis: self.limit()? };
        let fork = ForkIdentity {
            id: ForkId::parse(self.text()?).map_err(|_| Malformed)?,
            name: ForkName::parse(self.text()?).map_err(|_| Malformed)?,
            hostname: ForkName::parse(self.text()?).map_err(|_| Malformed)?,
            template: Tag::parse(self.text()?).map_err(|_| Malformed)?,
            machine_id: self.text()?.to_owned(),
            boot_id: self.text()?.to_owned(),
        };
        let entropy = Secret::new(self.bytes()?.to_vec());
        let key = Zeroizing::new(<[u8; 32]>::try_from(self.bytes()?).map_err(|_| Malformed)?);
        let labels = self.map(|reader| Ok((reader.text()?.to_owned(), reader.text()?.to_owned())))?;
        let env =
            self.map(|reader| Ok((EnvName::parse(reader.text()?).map_err(|_| Malformed)?, reader.text()?.to_owned())))?;
        let secrets = self.map(|reader| {
            Ok((SecretName::parse(reader.text()?).map_err(|_| Malformed)?, Secret::new(reader.bytes()?.to_vec())))
        })?;
        let mut files = Vec::new();
        for _ in 0..self.count()? {
            let (path, mode) = (self.text()?.to_owned(), self.u32()?);
            files.push(File { path, mode, content: Secret::new(self.bytes()?.to_vec()) });
        }
        let network = if format == FORMAT_NETWORK { Some(Network::read(self)?) } else { None };
        if !self.rest.is_empty() {
            return Err(Malformed.into());
        }
        let ack_key = AckKey::new(*key);
        Ok(Document {
            format,
            action,
            fork,
            labels,
            env,
            secrets,
            files,
            wall_clock,
            entropy,
            ack_key,
            limits,
            network,
        })
    }

    #[inline(never)]
    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    /// So many bytes, without a length before them.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    /// 1 for what follows, 0 for what does not.
    pub(crate) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed),
        }
    }

    #[inline(never)]
    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| Malformed)?))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| Malformed)?))
    }

    fn limit(&mut self) -> Result<Option<u64>, Malformed> {
        if self.flag()? { self.u64().map(Some) } else { Ok(None) }
    }

    #[inline(never)]
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let len = usize::try_from(self.u32()?).map_err(|_| Malformed)?;
        self.take(len)
    }

    #[inline(never)]
    pub(crate) fn text(&mut self) -> Result<&'a str, Malformed> {
        str::from_utf8(self.bytes()?).map_err(|_| Malformed)
    }

    pub(crate) fn count(&mut self) -> Result<usize, Malformed> {
        let count = usize::try_from(self.u32()?).map_err(|_| Malformed)?;
        if count <= MAX_ENTRIES { Ok(count) } else { Err(Malformed) }
    }

    fn map<K: Ord, V>(
        &mut self,
        entry: impl Fn(&mut Self) -> Result<(K, V), Malformed>,
    ) -> Result<BTreeMap<K, V>, Malformed> {
        let mut map = BTreeMap::new();
        for _ in 0..self.count()? {
            let (name, value) = entry(self)?;
            if map.last_key_value().is_some_and(|(last, _)| *last >= name) {
                return Err(Malformed);
            }
            map.insert(name, value);
        }
        Ok(map)
    }
}
