//! A source of random bytes: the host kernel's.
//!
//! A request is answered at once, so none is ever open in a captured machine.

use super::{Kind, Progress, QueueError, Queues, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [8];

/// Most bytes one request is given; a driver that wants more asks again. Linux asks for 64.
const BYTES_MAX: usize = 1024;

/// The source.
#[derive(Debug, Default)]
pub struct Rng(());

impl Rng {
    /// A source.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        for _ in 0..queues.waiting(queue)? {
            let Some(chain) = queues.next(queue)? else { break };
            let wanted = usize::try_from(chain.writable_bytes()).unwrap_or(BYTES_MAX).min(BYTES_MAX);
            let mut bytes = [0; BYTES_MAX];
            let bytes = bytes.get_mut(..wanted).unwrap_or_default();
            // Not blocking, for that could only be before the host has ever been seeded; then there are none.
            let filled = rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::NONBLOCK).unwrap_or(0);
            let written = chain.write(queues.memory(), 0, bytes.get(..filled).unwrap_or_default())?;
            bytes.fill(0);
            queues.complete(&chain, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(Progress::Done)
    }

    fn reset(&mut self) {}
}
