//! Devices that are not virtio.

mod generation;
mod reset;
mod serial;

pub use generation::Generation;
pub use reset::ResetPort;
pub use serial::{SerialError, SerialPort};
