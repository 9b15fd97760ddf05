//! Framing (being written).
