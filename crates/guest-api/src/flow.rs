//! How much may be under way on one channel. A stream that nobody takes from must not keep the others waiting, so each has its own part of what the
//! channel may be ahead of its readers, and there are no more streams than parts.

/// Most requests at once on one channel. The guest says so to whoever connects; those above it wait for one to end.
pub const MAX_STREAMS: u32 = 512;

/// What a guest is sent: its memory is small.
pub const TO_GUEST: Windows = Windows::of_streams(64 << 10);
/// What the host is sent.
pub const TO_HOST: Windows = Windows::of_streams(128 << 10);

/// Bytes that may have been sent and not been taken yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// On one stream.
    pub stream: u32,
    /// On all streams of a channel.
    pub channel: u32,
}

impl Windows {
    const fn of_streams(stream: u32) -> Self {
        Self { stream, channel: stream * MAX_STREAMS }
    }
}
