//! The keyboard controller, for the one thing a guest without a keyboard asks of it: a reset.

use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use crate::{bus::BusDevice, ending::Ending, machine::Exit};

#[derive(Debug)]
struct Reset(Arc<Ending>);

impl Trigger for Reset {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.end(Exit::Reset);
        Ok(())
    }
}

/// Ports 0x60 to 0x64. A reset ends the machine.
pub struct ResetPort(I8042Device<Reset>);

impl std::fmt::Debug for ResetPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResetPort").finish_non_exhaustive()
    }
}

impl ResetPort {
    /// A controller that ends this machine.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(I8042Device::new(Reset(ending)))
    }
}

impl BusDevice for ResetPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            let Ok(()) = self.0.write(offset, *byte);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_ends_the_machine() {
        let ending = Arc::new(Ending::new().unwrap());
        let mut port = ResetPort::new(ending.clone());
        for (offset, data) in [(0, vec![0xfe]), (4, vec![0xff]), (4, vec![0xfe, 0xfe]), (4, vec![])] {
            port.write(offset, &data);
            assert_eq!(ending.exit(), None);
        }
        let mut status = [0xff];
        port.read(4, &mut status);
        assert_eq!(status, [0], "nothing to wait for");
        port.write(4, &[0xfe]);
        assert_eq!(ending.exit(), Some(Exit::Reset));
    }
}
