mod fork;
mod ports;

use std::{
    collections::VecDeque,
    io::{PipeReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
};

use super::*;

const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
/// Queues of `offshoot.ack` (1) and `offshoot.ctl.0` (2).
const ACK_TRANSMIT: u16 = 5;
const RECEIVE: u16 = 6;
const TRANSMIT: u16 = 7;

const ACK: u32 = 1;
const CHANNEL: u32 = 2;

const ADD: u16 = 1;
const READY: u16 = 3;
const OPEN: u16 = 6;
const NAME: u16 = 7;

/// Bytes of a receive buffer.
const BUFFER: u32 = 1024;
/// Receive buffers of a queue.
const COUNT: u64 = 4;

/// A guest with a console of an ack port and two channels.
struct Guest {
    driver: Driver,
    /// Ready since the start or the move; dropped first, so that no callback outlives the test's end.
    events: EventLoop,
    host: Host,
    /// Which buffers are in which receive queue, in order.
    buffers: BTreeMap<u16, VecDeque<u64>>,
}

/// What the ports are connected to.
struct Host {
    directory: tempfile::TempDir,
    ack: PipeReader,
}

impl Host {
    fn new() -> (Self, Console) {
        let directory = tempfile::tempdir().unwrap();
        let listeners = [0, 1].map(|n| UnixListener::bind(directory.path().join(n.to_string())).unwrap());
        let (ack, writer) = io::pipe().unwrap();
        (Self { directory, ack }, Console::offshoot(writer.into(), listeners.into()).unwrap())
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("0")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

impl Guest {
    /// A guest that has set up all ports and opened them.
    fn new() -> Self {
        let mut guest = Self::unopened();
        for port in [ACK, CHANNEL] {
            guest.say(port, OPEN, 1);
        }
        guest
    }

    fn unopened() -> Self {
        let mut guest = Self::silent();
        guest.say(0, 0, 1);
        for port in 1..=3 {
            assert_eq!(guest.hear(), (port, ADD, 1, vec![]));
        }
        for (port, name) in [(ACK, "offshoot.ack"), (CHANNEL, "offshoot.ctl.0"), (3, "offshoot.ctl.1")] {
            guest.say(port, READY, 1);
            assert_eq!(guest.hear(), (port, NAME, 1, [name.as_bytes(), &[0]].concat()));
            if port == ACK {
                assert_eq!(guest.hear(), (port, OPEN, 1, vec![]), "a pipe is always open");
            }
        }
        guest
    }

    /// A guest that has said nothing yet.
    fn silent() -> Self {
        let (host, console) = Host::new();
        let mut driver = Driver::new(console);
        driver.start();
        let events = driver.events();
        let mut guest = Self { driver, events, host, buffers: BTreeMap::new() };
        guest.fill(CONTROL_RECEIVE);
        guest
    }

    /// The machine is saved and goes on in another process, where nobody is connected.
    fn move_on(self) -> Self {
        let (host, console) = Host::new();
        self.events.pause();
        let driver = self.driver.move_to(console);
        drop(self.events);
        let events = driver.events();
        Self { driver, events, host, buffers: self.buffers }
    }

    fn area(queue: u16) -> u64 {
        BUFFERS + u64::from(queue) * 0x8000
    }

    /// Gives a receive queue its buffers.
    fn fill(&mut self, queue: u16) {
        for number in 0..COUNT {
            self.give(queue, Self::area(queue) + number * u64::from(BUFFER));
        }
        self.driver.notify(queue);
    }

    fn give(&mut self, queue: u16, address: u64) {
        self.driver.add(queue, &[(address, BUFFER, WRITE)]);
        self.buffers.entry(queue).or_default().push_back(address);
    }

    /// The bytes of a receive queue's next buffer, which is given back.
    fn take(&mut self, queue: u16) -> Vec<u8> {
        let (_, bytes) = self.driver.wait_used(queue);
        let address = self.buffers.get_mut(&queue).unwrap().pop_front().unwrap();
        let data = self.driver.get(address, bytes as usize);
        self.give(queue, address);
        self.driver.notify(queue);
        data
    }

    fn take_exactly(&mut self, queue: u16, bytes: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < bytes {
            data.extend(self.take(queue));
        }
        assert_eq!(data.len(), bytes);
        data
    }

    /// The next message: port, event, value, and what follows.
    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let message = self.take(CONTROL_RECEIVE);
        let number = |at: usize| u16::from_le_bytes([message[at], message[at + 1]]);
        (u32::from(number(0)), number(4), number(6), message[8..].to_vec())
    }

    fn hears_nothing(&mut self) {
        assert_eq!(self.driver.used(CONTROL_RECEIVE), None);
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let address = Self::area(CONTROL_TRANSMIT);
        self.driver.put(address, &[&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat());
        self.driver.add(CONTROL_TRANSMIT, &[(address, 8, 0)]);
        self.driver.notify(CONTROL_TRANSMIT);
        assert!(self.driver.used(CONTROL_TRANSMIT).is_some(), "Linux spins until the device has it");
    }

    /// Puts bytes into a transmit queue; whether they are gone at once.
    fn send(&mut self, queue: u16, bytes: &[u8]) -> bool {
        let address = Self::area(queue);
        self.driver.put(address, bytes);
        let (one, two) = ((bytes.len() / 2) as u32, bytes.len().div_ceil(2) as u32);
        self.driver.add(queue, &[(address, one, 0), (address + u64::from(one), two, 0)]);
        self.driver.notify(queue);
        self.driver.used(queue).is_some()
    }

    /// A host that is connected, and of which the guest knows.
    fn host(&mut self) -> UnixStream {
        let host = self.host.connect();
        assert_eq!(self.hear(), (CHANNEL, OPEN, 1, vec![]));
        host
    }
}

/// Bytes that are not the same anywhere.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).take(bytes).collect()
}
