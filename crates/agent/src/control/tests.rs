//! The server over a real session, without a guest.
