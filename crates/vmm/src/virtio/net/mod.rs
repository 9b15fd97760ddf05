//! A network card.
//!
//! No offloads: neither side leaves checksums or cutting to the other, so the header before each frame carries nothing. It
//! is made here in one direction and skipped in the other, and the tap has none (`IFF_TAP | IFF_NO_PI`, no `IFF_VNET_HDR`):
//! what a guest writes there never reaches the host's kernel.
//!
//! What the card is connected to is no part of its state: a template's is connected to nothing, and each fork's to what it is given.

mod cable;

use std::io;

pub use self::cable::Cable;
use self::cable::{LENGTH_BYTES, Plug, Received};
use super::{Kind, Progress, QueueError, Queues, VirtioDevice, read_config_bytes};
use crate::events::{HostEvent, Watcher};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Linux keeps a receive queue full of pages, which a fork copies as it uses them.
const QUEUE_SIZES: [u16; 2] = [64, 64];

const FEATURE_MAC: u64 = 1 << 5;

/// Bytes before each frame. The last two say how many buffers the frame is in: always one.
const HEADER_BYTES: usize = 12;
const HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Longest frame, bytes: what an interface with the greatest MTU can have, with its Ethernet header and a VLAN's tag.
const FRAME_MAX: usize = 65535 + 18;

/// Frames moved by one call in one direction; then it is another device's turn.
const TURN_FRAMES: usize = 128;

/// A network card.
#[derive(Debug)]
pub struct Net {
    plug: Plug,
    mac: [u8; 6],
    /// A frame on its way, after what goes before it: the guest's header, or a stream's length.
    frame: Box<[u8]>,
}

impl Net {
    /// A card with this address. What it is connected to becomes non-blocking.
    ///
    /// # Errors
    /// If the descriptor can not be made so.
    pub fn new(cable: Cable, mac: [u8; 6]) -> io::Result<Self> {
        let frame = vec![0; HEADER_BYTES + FRAME_MAX].into_boxed_slice();
        Ok(Self { plug: Plug::new(cable)?, mac, frame })
    }

    /// Frames from the host. Without a buffer of the guest's none is taken: the host's queue is the one that fills.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        for _ in 0..TURN_FRAMES {
            let Some(chain) = queues.next(RECEIVE)? else { return Ok(Progress::Done) };
            let (header, body) = self.frame.split_at_mut(HEADER_BYTES);
            let count = match self.plug.receive(body) {
                Received::Nothing => return Ok(Progress::Done),
                Received::Piece => continue,
                Received::Frame(count) => count,
            };
            header.copy_from_slice(&HEADER);
            let bytes = self.frame.get(..HEADER_BYTES + count).unwrap_or_default();
            // One that does not fit is lost, as on any network.
            if count > 0 && chain.writable_bytes() >= u64::try_from(bytes.len()).unwrap_or(u64::MAX) {
                let written = chain.write(queues.memory(), 0, bytes)?;
                queues.complete(&chain, u32::try_from(written).unwrap_or_default())?;
            }
        }
        Ok(Progress::More)
    }

    /// Frames from the guest.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        for _ in 0..queues.waiting(TRANSMIT)? {
            let Some(chain) = queues.next(TRANSMIT)? else { break };
            let header = u64::try_from(HEADER_BYTES).unwrap_or_default();
            let bytes = chain.readable_bytes().checked_sub(header).and_then(|bytes| usize::try_from(bytes).ok());
            if let Some(count @ 1..=FRAME_MAX) = bytes {
                let room_and_frame = self.frame.get_mut(..LENGTH_BYTES + count).unwrap_or_default();
                chain.read(queues.memory(), header, room_and_frame.get_mut(LENGTH_BYTES..).unwrap_or_default())?;
                if !self.plug.send(room_and_frame) {
                    break;
                }
            }
            queues.complete(&chain, 0)?;
        }
        Ok(Progress::Done)
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        FEATURE_MAC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.mac, offset, data);
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        match queue {
            RECEIVE => self.receive(queues),
            _ => self.transmit(queues),
        }
    }

    fn attach(&mut self, watcher: Watcher) -> io::Result<()> {
        self.plug.descriptor().map_or(Ok(()), |descriptor| watcher.add(descriptor, 0))
    }

    fn host_event(&mut self, event: HostEvent, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        if let HostEvent::Ready(_, readiness) = event {
            self.plug.ready(readiness);
        }
        self.plug.flush();
        // Never more than a queue full, so there is no more to do after it than the next notification says.
        let _ = self.transmit(queues)?;
        self.receive(queues)
    }

    fn reset(&mut self) {}
}
