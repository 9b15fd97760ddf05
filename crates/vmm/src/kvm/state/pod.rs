//! Kernel structures in the state file: their bytes, of exactly their length, so that a file cannot say the same thing in two ways
//! and no short field grows into a large value while it is decoded.

/// For `#[serde(with)]`: one structure.
pub(crate) mod exact {
    use serde::{Deserializer, Serializer, de::Error};
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::Borrowed;

    pub(crate) fn serialize<T: IntoBytes + Immutable, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(value.as_bytes())
    }

    pub(crate) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        let bytes = deserializer.deserialize_bytes(Borrowed)?;
        T::read_from_bytes(bytes).map_err(|_| D::Error::invalid_length(bytes.len(), &"the structure's own length"))
    }
}

/// For `#[serde(with)]`: a vector of structures.
pub(crate) mod slice {
    use serde::{Deserializer, Serializer, de::Error};
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::Borrowed;

    pub(crate) fn serialize<T: IntoBytes + Immutable, S: Serializer>(
        values: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(values.as_bytes())
    }

    pub(crate) fn deserialize<'de, T: FromBytes + IntoBytes + Clone, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        let bytes = deserializer.deserialize_bytes(Borrowed)?;
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(D::Error::invalid_length(bytes.len(), &"a multiple of the structure's length"));
        }
        // Every element stands in the file: what is allocated is never more than the file's own bytes.
        let mut values = vec![T::new_zeroed(); bytes.len() / size_of::<T>()];
        values.as_mut_bytes().copy_from_slice(bytes);
        Ok(values)
    }
}

/// Takes the bytes where they lie in the file.
struct Borrowed;

impl<'de> serde::de::Visitor<'de> for Borrowed {
    type Value = &'de [u8];

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("bytes")
    }

    fn visit_borrowed_bytes<E: serde::de::Error>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
        Ok(bytes)
    }
}
