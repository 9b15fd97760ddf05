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

#[test]
fn ports_are_announced_with_their_names() {
    let guest = Guest::unopened();
    assert_eq!(guest.driver.read(0x104), 4, "ports 0 to 3");
    assert_eq!(guest.driver.offered() & 2, 2);
}

#[test]
fn messages_wait_until_the_driver_has_buffers() {
    let (host, console) = Host::new();
    let mut driver = Driver::new(console);
    driver.start();
    let events = driver.events();
    let mut guest = Guest { driver, events, host, buffers: BTreeMap::new() };
    guest.say(0, 0, 1);
    guest.say(0, 0, 1);
    guest.fill(CONTROL_RECEIVE);
    for port in 1..=3 {
        assert_eq!(guest.hear(), (port, ADD, 1, vec![]));
    }
    guest.hears_nothing();
}

#[test]
fn acks_go_to_the_pipe() {
    let mut guest = Guest::new();
    assert!(guest.send(ACK_TRANSMIT, b"stage=applied\n"));
    let mut line = [0; 14];
    guest.host.ack.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"stage=applied\n");
}

#[test]
fn a_full_pipe_stops_the_guest_and_loses_nothing() {
    let mut guest = Guest::new();
    let piece = pattern(0x4000);
    let mut sent = 0;
    while guest.send(ACK_TRANSMIT, &piece) {
        sent += 1;
        assert!(sent < 1000);
    }
    assert!(sent >= 3);
    // The one that did not fit, and one behind it.
    assert!(!guest.send(ACK_TRANSMIT, &piece));
    for _ in 0..sent + 2 {
        let mut read = vec![0; piece.len()];
        guest.host.ack.read_exact(&mut read).unwrap();
        assert_eq!(read, piece);
    }
    guest.driver.wait_used(ACK_TRANSMIT);
    guest.driver.wait_used(ACK_TRANSMIT);
}

#[test]
fn a_pipe_without_a_reader_swallows() {
    let mut guest = Guest::new();
    let (reader, _) = io::pipe().unwrap();
    drop(std::mem::replace(&mut guest.host.ack, reader));
    for _ in 0..100 {
        assert!(guest.send(ACK_TRANSMIT, b"stage=applied\n"));
    }
}

#[test]
fn bytes_of_a_host_arrive_in_order_however_slow_the_guest_is() {
    let mut guest = Guest::new();
    let mut host = guest.host();
    let sent = pattern(1 << 20);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || {
        for piece in sent.chunks(7001) {
            host.write_all(piece).unwrap();
        }
        host
    });
    guest.fill(RECEIVE);
    let received = guest.take_exactly(RECEIVE, expected.len());
    assert!(received == expected);
    drop(writer.join().unwrap());
    assert_eq!(guest.hear(), (CHANNEL, OPEN, 0, vec![]));
}

#[test]
fn bytes_of_the_guest_arrive_in_order_however_slow_the_host_is() {
    let mut guest = Guest::new();
    let mut host = guest.host();
    let piece = pattern(0x4000);
    let mut open = 0_usize;
    let mut sent = 0;
    while open == 0 {
        sent += 1;
        open += usize::from(!guest.send(TRANSMIT, &piece));
        assert!(sent < 1000, "a host that does not read stops the guest");
    }
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; 100 * 0x4000];
        for piece in all.chunks_mut(5003) {
            host.read_exact(piece).unwrap();
        }
        all
    });
    guest.driver.wait_used(TRANSMIT);
    for _ in sent..100 {
        if !guest.send(TRANSMIT, &piece) {
            guest.driver.wait_used(TRANSMIT);
        }
    }
    assert!(reader.join().unwrap().chunks(0x4000).all(|read| read == piece));
}

#[test]
fn what_a_host_sent_before_it_hung_up_arrives_before_the_news() {
    let mut guest = Guest::unopened();
    let mut host = guest.host.connect();
    let sent = pattern(20_000);
    host.write_all(&sent).unwrap();
    drop(host);
    assert_eq!(guest.hear(), (CHANNEL, OPEN, 1, vec![]));
    // Neither opened nor with buffers yet; a second host waits behind the first.
    let mut second = guest.host.connect();
    second.write_all(b"second").unwrap();
    guest.hears_nothing();
    guest.say(CHANNEL, OPEN, 1);
    guest.hears_nothing();
    guest.fill(RECEIVE);
    assert!(guest.take_exactly(RECEIVE, sent.len()) == sent);
    assert_eq!(guest.hear(), (CHANNEL, OPEN, 0, vec![]));
    assert_eq!(guest.hear(), (CHANNEL, OPEN, 1, vec![]));
    assert_eq!(guest.take(RECEIVE), b"second");
}

#[test]
fn a_host_that_comes_and_goes_without_a_word_is_noticed_without_buffers() {
    let mut guest = Guest::unopened();
    for _ in 0..3 {
        let host = guest.host();
        drop(host);
        assert_eq!(guest.hear(), (CHANNEL, OPEN, 0, vec![]));
    }
}

#[test]
fn a_port_that_the_guest_closed_keeps_the_hosts_bytes() {
    let mut guest = Guest::new();
    let mut host = guest.host();
    guest.fill(RECEIVE);
    guest.say(CHANNEL, OPEN, 0);
    host.write_all(b"later").unwrap();
    // Something else that the device thread must have done after it.
    let _other = UnixStream::connect(guest.host.directory.path().join("1")).unwrap();
    assert_eq!(guest.hear(), (3, OPEN, 1, vec![]));
    assert_eq!(guest.driver.used(RECEIVE), None);
    guest.say(CHANNEL, OPEN, 1);
    assert_eq!(guest.take(RECEIVE), b"later");
}

#[test]
fn what_the_guest_says_to_nobody_is_swallowed() {
    let mut guest = Guest::new();
    assert!(guest.send(TRANSMIT, b"nobody"));
    let mut host = guest.host();
    assert!(guest.send(TRANSMIT, b"somebody"));
    let mut read = [0; 8];
    host.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"somebody");
    // A host that went in the middle takes its bytes with it, also those it never read.
    while guest.send(TRANSMIT, &pattern(0x4000)) {}
    drop(host);
    guest.driver.wait_used(TRANSMIT);
    assert_eq!(guest.hear(), (CHANNEL, OPEN, 0, vec![]));
    let mut host = guest.host();
    assert!(guest.send(TRANSMIT, b"fresh"));
    let mut read = [0; 5];
    host.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"fresh");
}

#[test]
fn a_paused_machine_touches_no_guest_memory() {
    let mut guest = Guest::new();
    let mut host = guest.host();
    guest.fill(RECEIVE);
    guest.events.pause();
    let before = guest.driver.get(0, LOW_END as usize);
    host.write_all(b"while paused").unwrap();
    let second = UnixStream::connect(guest.host.directory.path().join("1")).unwrap();
    // Long enough for a callback that should not come.
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.driver.get(0, LOW_END as usize) == before);
    guest.events.resume();
    assert_eq!(guest.take(RECEIVE), b"while paused");
    assert_eq!(guest.hear(), (3, OPEN, 1, vec![]));
    drop(second);
}

#[test]
fn a_fork_goes_on_with_open_ports_and_hears_after_its_ack_that_the_host_is_gone() {
    let mut template = Guest::new();
    let _host = template.host();
    template.fill(RECEIVE);
    let mut fork = template.move_on();
    fork.hears_nothing();
    assert!(fork.send(ACK_TRANSMIT, b"stage=applied\n"));
    let mut line = [0; 14];
    fork.host.ack.read_exact(&mut line).unwrap();
    assert_eq!(fork.hear(), (CHANNEL, OPEN, 0, vec![]));
    let mut host = fork.host();
    host.write_all(b"to the fork").unwrap();
    assert_eq!(fork.take(RECEIVE), b"to the fork");
    assert!(fork.send(TRANSMIT, b"from the fork"));
    let mut read = [0; 13];
    host.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"from the fork");
}

#[test]
fn a_fork_hears_of_the_next_host_even_before_its_ack() {
    let mut template = Guest::new();
    let _host = template.host();
    let mut fork = template.move_on();
    let _host = fork.host.connect();
    assert_eq!(fork.hear(), (CHANNEL, OPEN, 0, vec![]));
    assert_eq!(fork.hear(), (CHANNEL, OPEN, 1, vec![]));
    // And again: what was told to its parent counts for the fork of a fork.
    let mut third = fork.move_on();
    let _host = third.host.connect();
    assert_eq!(third.hear(), (CHANNEL, OPEN, 0, vec![]));
    assert_eq!(third.hear(), (CHANNEL, OPEN, 1, vec![]));
}

#[test]
fn bytes_for_the_templates_host_do_not_reach_the_forks() {
    let mut template = Guest::new();
    let host = template.host();
    while template.send(TRANSMIT, &pattern(0x4000)) {}
    let mut fork = template.move_on();
    drop(host);
    let mut host = fork.host.connect();
    assert_eq!(fork.hear(), (CHANNEL, OPEN, 0, vec![]));
    assert_eq!(fork.hear(), (CHANNEL, OPEN, 1, vec![]));
    fork.driver.wait_used(TRANSMIT);
    assert!(fork.send(TRANSMIT, b"mine"));
    let mut read = [0; 4];
    host.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"mine");
}

#[test]
fn a_driver_that_starts_over_finds_the_host_still_there() {
    let mut guest = Guest::new();
    let mut host = guest.host();
    guest.driver.start();
    guest.buffers.clear();
    for queue in [CONTROL_RECEIVE, CONTROL_TRANSMIT, RECEIVE] {
        let (available, used) = (guest.driver.rings[&queue].available_ring(), guest.driver.rings[&queue].used_ring());
        guest.driver.put(available, &[0; 4]);
        guest.driver.put(used, &[0; 4]);
    }
    guest.fill(CONTROL_RECEIVE);
    guest.say(CHANNEL, READY, 1);
    assert_eq!(guest.hear().1, NAME);
    assert_eq!(guest.hear(), (CHANNEL, OPEN, 1, vec![]));
    guest.say(CHANNEL, OPEN, 1);
    guest.fill(RECEIVE);
    host.write_all(b"again").unwrap();
    assert_eq!(guest.take(RECEIVE), b"again");
}

#[test]
fn messages_about_nothing_are_ignored() {
    let mut guest = Guest::new();
    for (port, event, value) in [(0, 3, 1), (9, 3, 1), (u32::MAX, 6, 1), (1, 3, 0), (0, 0, 0), (1, 99, 1), (2, 2, 1)] {
        guest.say(port, event, value);
    }
    // Too short, and none at all.
    guest.driver.add(CONTROL_TRANSMIT, &[(BUFFERS, 7, 0)]);
    guest.driver.add(CONTROL_TRANSMIT, &[(BUFFERS, 8, WRITE)]);
    guest.driver.notify(CONTROL_TRANSMIT);
    guest.hears_nothing();
    assert!(!guest.driver.needs_reset());
}

#[test]
fn buffers_too_small_for_a_message_or_for_anything_end_the_device() {
    let mut guest = Guest::silent();
    guest.driver.start();
    for queue in [CONTROL_RECEIVE, CONTROL_TRANSMIT] {
        let ring = guest.driver.rings[&queue].clone();
        guest.driver.put(ring.available_ring(), &[0; 4]);
        guest.driver.put(ring.used_ring(), &[0; 4]);
    }
    guest.driver.add(CONTROL_RECEIVE, &[(BUFFERS, 7, WRITE)]);
    guest.say(0, 0, 1);
    assert_eq!(guest.driver.device.lock().unwrap().fault(), Some(QueueError::Small));

    let mut guest = Guest::new();
    let _host = guest.host();
    guest.driver.add(RECEIVE, &[(BUFFERS, 8, 0)]);
    guest.driver.notify(RECEIVE);
    (&_host).write_all(b"x").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !guest.driver.needs_reset() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

#[test]
fn states_of_other_ports_are_refused() {
    let console = |names: &[&str]| {
        let ports = names.iter().zip(1..).map(|(name, number)| {
            let (_, writer) = io::pipe().unwrap();
            PortConfig { number, name: (*name).into(), end: HostEnd::Pipe(writer.into()) }
        });
        Console::new(ports.collect()).unwrap()
    };
    let saved = console(&["one", "two"]).save();
    assert_eq!(console(&["one", "two"]).load(&saved), Ok(()));
    assert_eq!(console(&["one"]).load(&saved), Err(LoadError::OtherDevice));
    assert_eq!(console(&["one", "three"]).load(&saved), Err(LoadError::OtherDevice));
    assert_eq!(console(&["one", "two"]).load(&saved[1..]), Err(LoadError::Format));
}

#[test]
fn ports_that_can_not_be_are_refused() {
    for (number, name) in [(0, "zero"), (16, "sixteen"), (1, ""), (1, "nul\0"), (1, &"x".repeat(65))] {
        let (_, writer) = io::pipe().unwrap();
        let port = PortConfig { number, name: name.into(), end: HostEnd::Pipe(writer.into()) };
        assert!(matches!(Console::new(vec![port]), Err(ConsoleError::Port(_))), "{number} {name}");
    }
}
