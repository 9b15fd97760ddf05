//! The control queues: what device and driver tell each other about ports.

use serde::{Deserialize, Serialize};

/// Bytes of a message without what may follow it (a name).
pub(super) const MESSAGE_BYTES: usize = 8;

/// Events of the virtio specification 1.2, section 5.3.6.2.
pub(super) mod event {
    pub(in super::super) const DEVICE_READY: u16 = 0;
    pub(in super::super) const PORT_ADD: u16 = 1;
    pub(in super::super) const PORT_READY: u16 = 3;
    pub(in super::super) const PORT_OPEN: u16 = 6;
    pub(in super::super) const PORT_NAME: u16 = 7;
}

/// One message, in either direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) fn from_bytes(bytes: [u8; MESSAGE_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; MESSAGE_BYTES] {
        let [a, b, c, d] = self.port.to_le_bytes();
        let [e, f] = self.event.to_le_bytes();
        let [g, h] = self.value.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

/// What the driver knows about one port, and what it is still to be told when it has a buffer for it.
///
/// Bounded however often a host comes and goes while the driver does not listen: of a host that came and went unseen it is
/// never told, but that the one it knows has gone it is always told, also if the next one is there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct News {
    /// The port exists.
    add: bool,
    /// The port has a name.
    name: bool,
    /// The driver has set the port up, so that it can be told of hosts.
    known: bool,
    /// The last word to the driver was that a host is there.
    told_open: bool,
    /// How often that is to be reversed: up to 1 after "no host", up to 2 after "host".
    reversals: u8,
}

impl News {
    /// Whether a saved one can be.
    pub(super) fn is_possible(self) -> bool {
        self.reversals <= if self.told_open { 2 } else { 1 }
    }

    /// The driver asks which ports there are.
    pub(super) fn device_ready(&mut self) {
        self.add = true;
    }

    /// The driver has set the port up and asks what there is to know.
    pub(super) fn port_ready(&mut self, host: bool) {
        *self = Self { add: false, name: true, known: true, told_open: false, reversals: u8::from(host) };
    }

    /// A host came or went.
    pub(super) fn host(&mut self, there: bool) {
        if !self.known {
            return;
        }
        let last_word = self.told_open ^ (self.reversals % 2 == 1);
        if there == last_word {
            return;
        }
        self.reversals = match (self.told_open, self.reversals) {
            // It is gone and the next one is there.
            (true, 1) => 2,
            // That one is gone as well; or one came and went.
            (true, 2) => 1,
            (false, 1) => 0,
            _ => 1,
        };
    }

    /// What is to be said next about this port: event and value.
    pub(super) fn next(self) -> Option<(u16, u16)> {
        if self.add {
            Some((event::PORT_ADD, 1))
        } else if self.name {
            Some((event::PORT_NAME, 1))
        } else if self.reversals > 0 {
            Some((event::PORT_OPEN, u16::from(!self.told_open)))
        } else {
            None
        }
    }

    /// It was said.
    pub(super) fn said(&mut self) {
        if self.add {
            self.add = false;
        } else if self.name {
            self.name = false;
        } else if self.reversals > 0 {
            self.reversals -= 1;
            self.told_open = !self.told_open;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(news: &mut News) -> Vec<(u16, u16)> {
        std::iter::from_fn(|| {
            let next = news.next();
            news.said();
            next
        })
        .collect()
    }

    #[test]
    fn a_driver_hears_of_port_name_and_host_in_this_order() {
        let mut news = News::default();
        news.host(true);
        assert_eq!(heard(&mut news), []);
        news.device_ready();
        assert_eq!(heard(&mut news), [(event::PORT_ADD, 1)]);
        news.port_ready(true);
        assert_eq!(heard(&mut news), [(event::PORT_NAME, 1), (event::PORT_OPEN, 1)]);
        news.host(false);
        assert_eq!(heard(&mut news), [(event::PORT_OPEN, 0)]);
    }

    #[test]
    fn hosts_that_change_unheard_are_told_of_at_most_twice() {
        let mut news = News::default();
        news.port_ready(false);
        heard(&mut news);
        for _ in 0..5 {
            news.host(true);
            news.host(false);
        }
        assert_eq!(heard(&mut news), []);
        news.host(true);
        assert_eq!(heard(&mut news), [(event::PORT_OPEN, 1)]);
        for _ in 0..5 {
            news.host(false);
            news.host(true);
            assert!(news.is_possible());
        }
        assert_eq!(heard(&mut news), [(event::PORT_OPEN, 0), (event::PORT_OPEN, 1)]);
        for _ in 0..5 {
            news.host(false);
            news.host(true);
        }
        news.host(false);
        assert_eq!(heard(&mut news), [(event::PORT_OPEN, 0)]);
    }
}
