//! Secrets of a fork that is captured while it runs: sealed in place before the capture, so that neither what is on disk of it nor its
//! children have them, and opened again only by the fork that goes on.
//!
//! The host draws a key for each capture and gives the guest its public half with the request to quiesce. The guest draws one of its own,
//! agrees with it on a key (X25519), enciphers every secret where it lies (ChaCha20-Poly1305) and forgets all but the public half of
//! its own. What opens them comes back in the document that tells the fork to go on: it is in no child's document, and until then in
//! no memory of the guest.

use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, Key, KeyInit, Nonce, Tag};
use sha2::{Digest, Sha256};
use thiserror::Error;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::Secret;

/// Bytes of either key.
pub const KEY_LEN: usize = 32;

/// What the host gives with the request to quiesce.
pub type SealKey = [u8; KEY_LEN];

/// The name under which the document that tells a fork to go on carries what opens its secrets. Such a document has no other
/// secrets, and this one is written to no file.
pub const UNSEAL: &str = "UNSEAL";

/// The public half of what opens them, from its bytes; `None` if they are none.
#[must_use]
pub fn public(unseal: &Secret) -> Option<SealKey> {
    let bytes = Zeroizing::new(<[u8; KEY_LEN]>::try_from(unseal.expose()).ok()?);
    Some(PublicKey::from(&StaticSecret::from(*bytes)).to_bytes())
}

/// What is kept of secrets that were sealed; it opens nothing by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    own: [u8; KEY_LEN],
    tags: Vec<[u8; 16]>,
}

/// Why secrets were not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the secrets can not be opened: the key is not theirs, or they were changed")]
pub struct UnsealError;

/// Enciphers each text in place. `random` is used up.
#[must_use]
pub fn seal(key: &SealKey, random: &Zeroizing<[u8; KEY_LEN]>, texts: &mut [Zeroizing<Vec<u8>>]) -> Option<Sealed> {
    let own = StaticSecret::from(**random);
    let public = PublicKey::from(&own).to_bytes();
    let cipher = cipher(&own, key, &public, key);
    let mut tags = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter_mut().enumerate() {
        tags.push(cipher.encrypt_in_place_detached(&nonce(index), b"", text).ok()?.into());
    }
    Some(Sealed { own: public, tags })
}

/// Opens them again, in the same order.
///
/// # Errors
/// [`UnsealError`]; texts before the first that fails are open.
pub fn unseal(key: &Secret, sealed: &Sealed, texts: &mut [Zeroizing<Vec<u8>>]) -> Result<(), UnsealError> {
    let bytes = Zeroizing::new(<[u8; KEY_LEN]>::try_from(key.expose()).map_err(|_| UnsealError)?);
    let own = StaticSecret::from(*bytes);
    if sealed.tags.len() != texts.len() {
        return Err(UnsealError);
    }
    let cipher = cipher(&own, &sealed.own, &sealed.own, &PublicKey::from(&own).to_bytes());
    for (index, (text, tag)) in texts.iter_mut().zip(&sealed.tags).enumerate() {
        let tag = Tag::from_slice(tag);
        cipher.decrypt_in_place_detached(&nonce(index), b"", text, tag).map_err(|_| UnsealError)?;
    }
    Ok(())
}

/// Of what both sides agree on, and both public halves.
fn cipher(own: &StaticSecret, other: &SealKey, guest: &SealKey, host: &SealKey) -> ChaCha20Poly1305 {
    let shared = own.diffie_hellman(&PublicKey::from(*other));
    let mut hash = Sha256::new();
    for part in [b"offshoot seal 1".as_slice(), shared.as_bytes(), guest, host] {
        hash.update(part);
    }
    let mut key = Zeroizing::new([0; KEY_LEN]);
    hash.finalize_into(Key::from_mut_slice(&mut *key));
    ChaCha20Poly1305::new(Key::from_slice(&*key))
}

/// A key is used for one capture.
fn nonce(index: usize) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[..8].copy_from_slice(&(index as u64).to_le_bytes());
    nonce
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn texts() -> Vec<Zeroizing<Vec<u8>>> {
        [b"hunter2".to_vec(), Vec::new(), vec![7; 5000]].map(Zeroizing::new).into()
    }

    fn sealed(unseal: &Secret) -> (Sealed, Vec<Zeroizing<Vec<u8>>>) {
        let mut texts = texts();
        let sealed = seal(&public(unseal).unwrap(), &Zeroizing::new([9; 32]), &mut texts).unwrap();
        (sealed, texts)
    }

    #[test]
    fn i15_only_the_captures_own_key_opens_what_was_sealed() {
        let (key, other) = (Secret::new(vec![1; 32]), Secret::new(vec![2; 32]));
        let (kept, mut closed) = sealed(&key);
        assert!(closed.iter().zip(texts()).all(|(closed, open)| closed.len() == open.len()));
        assert!(!closed[0].windows(7).any(|window| window == b"hunter2"));
        assert_eq!(unseal(&other, &kept, &mut closed.clone()), Err(UnsealError));
        assert_eq!(unseal(&key, &kept, &mut closed[..2]), Err(UnsealError));
        let mut changed = closed.clone();
        changed[2][4999] ^= 1;
        assert_eq!(unseal(&key, &kept, &mut changed), Err(UnsealError));
        unseal(&key, &kept, &mut closed).unwrap();
        assert_eq!(closed, texts());
    }
}
