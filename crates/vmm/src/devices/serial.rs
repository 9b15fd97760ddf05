//! The serial port: the guest's console, for output only.

use std::{
    convert::Infallible,
    fmt,
    fs::File,
    io::{self, Write},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::{
    Serial, Trigger,
    serial::{NoEvents, SerialState},
};

use crate::{bus::BusDevice, irq::Interrupt};

/// Most bytes of console output that are kept: a guest must not fill the host's disk.
const MAX_OUTPUT: u64 = 16 << 20;

/// Why a port's state was refused.
#[derive(Debug, Error)]
pub enum SerialError {
    /// Not written by [`SerialPort::save`].
    #[error("the serial port's state is damaged")]
    Format(#[from] postcard::Error),
    /// More input than the port holds.
    #[error("the serial port's state has {0} bytes of input")]
    Input(usize),
}

/// A 16550A.
pub struct SerialPort(Serial<Line, NoEvents, Output>);

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

struct Output {
    file: Option<File>,
    left: u64,
}

impl Write for Output {
    /// Never fails and never waits for more than the file does: what cannot be written is dropped.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.file {
            let count = bytes.len() as u64;
            if count <= self.left && file.write_all(bytes).is_ok() {
                self.left -= count;
            } else {
                self.file = None;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The registers, in a form of our own: the library's may change.
#[derive(Serialize, Deserialize)]
struct State {
    registers: [u8; 9],
    input: Vec<u8>,
}

impl SerialPort {
    /// A port that writes to `output`: a regular file, or something that does not block. The first 16 MiB are kept.
    pub fn new(interrupt: Arc<dyn Interrupt>, output: Option<File>) -> Self {
        Self(Serial::new(Line(interrupt), Output { file: output, left: MAX_OUTPUT }))
    }

    /// The registers, for [`SerialPort::load`].
    ///
    /// # Errors
    /// [`SerialError::Format`]; not seen.
    pub fn save(&self) -> Result<Vec<u8>, SerialError> {
        let state = self.0.state();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        Ok(postcard::to_allocvec(&State { registers, input: state.in_buffer })?)
    }

    /// A port with the registers that were saved. Raises an interrupt that is pending once more, so it belongs before the
    /// interrupt controllers' state is loaded.
    ///
    /// # Errors
    /// [`SerialError`].
    pub fn load(state: &[u8], interrupt: Arc<dyn Interrupt>, output: Option<File>) -> Result<Self, SerialError> {
        let State { registers, input } = postcard::from_bytes(state)?;
        let count = input.len();
        let state = SerialState {
            baud_divisor_low: registers[0],
            baud_divisor_high: registers[1],
            interrupt_enable: registers[2],
            interrupt_identification: registers[3],
            line_control: registers[4],
            line_status: registers[5],
            modem_control: registers[6],
            modem_status: registers[7],
            scratch: registers[8],
            in_buffer: input,
        };
        let output = Output { file: output, left: MAX_OUTPUT };
        Serial::from_state(&state, Line(interrupt), NoEvents, output).map(Self).map_err(|_| SerialError::Input(count))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // The only error left is a full input buffer in loopback mode: the guest loses its own byte.
            let _ = self.0.write(offset, *byte);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[derive(Debug)]
    struct Nothing;

    impl Interrupt for Nothing {
        fn trigger(&self) {}
    }

    #[test]
    fn output_goes_to_the_file_and_stops_at_the_limit() {
        let file = tempfile::tempfile().unwrap();
        let mut port = SerialPort::new(Arc::new(Nothing), Some(file.try_clone().unwrap()));
        for byte in b"hello" {
            port.write(0, &[*byte]);
        }
        port.write(0, b"not a byte");
        let mut seen = [0; 5];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"hello");
        port.0.writer_mut().left = 1;
        for byte in b"12345" {
            port.write(0, &[*byte]);
        }
        assert_eq!(file.metadata().unwrap().len(), 6);
        let mut status = [0];
        port.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for more");
    }

    #[test]
    fn registers_survive_and_damaged_state_is_refused() {
        let mut port = SerialPort::new(Arc::new(Nothing), None);
        port.write(7, &[0x5a]);
        let state = port.save().unwrap();
        let mut scratch = [0];
        SerialPort::load(&state, Arc::new(Nothing), None).unwrap().read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
        assert!(SerialPort::load(&state[..5], Arc::new(Nothing), None).is_err());
        let full = postcard::to_allocvec(&State { registers: [0; 9], input: vec![0; 1000] }).unwrap();
        assert!(matches!(SerialPort::load(&full, Arc::new(Nothing), None), Err(SerialError::Input(1000))));
    }
}
