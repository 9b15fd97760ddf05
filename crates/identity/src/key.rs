//! The per-fork key that authenticates acks.

use std::fmt;

use hmac::{Hmac, Mac};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::{document::base64_bytes, name::MailboxName};

/// Length of an ack key and of an ack's tag, in bytes (HMAC-SHA256).
pub const KEY_LEN: usize = 32;

/// A fork's ack key. It does not print and is wiped on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct AckKey([u8; KEY_LEN]);

impl AckKey {
    /// A key from bytes that must come from a cryptographic random source.
    #[must_use]
    pub fn new(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// The key of one mailbox of this fork: guest software that has one mailbox's key can answer for no other.
    #[must_use]
    pub fn for_mailbox(&self, mailbox: &MailboxName) -> Self {
        let mut label = b"mailbox:".to_vec();
        label.extend_from_slice(mailbox.as_str().as_bytes());
        Self(self.sign(&label))
    }

    /// HMAC-SHA256 of `message`.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; KEY_LEN] {
        self.mac(message).finalize().into_bytes().into()
    }

    /// Whether `tag` is this key's HMAC-SHA256 of `message`; compares in constant time.
    #[must_use]
    pub fn verify(&self, message: &[u8], tag: &[u8]) -> bool {
        self.mac(message).verify_slice(tag).is_ok()
    }

    /// The raw bytes, for the one place that writes them into a mailbox page.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    #[allow(clippy::missing_panics_doc, clippy::expect_used)]
    fn mac(&self, message: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        mac.update(message);
        mac
    }
}

impl fmt::Debug for AckKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AckKey(..)")
    }
}

impl Serialize for AckKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        base64_bytes::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for AckKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = zeroize::Zeroizing::new(base64_bytes::deserialize(deserializer)?);
        let key: [u8; KEY_LEN] =
            bytes.as_slice().try_into().map_err(|_| D::Error::custom("an ack key has 32 bytes"))?;
        Ok(Self(key))
    }
}
