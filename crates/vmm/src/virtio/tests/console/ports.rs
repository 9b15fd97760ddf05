use super::*;

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
fn ports_that_can_not_be_are_refused() {
    for (number, name) in [(0, "zero"), (16, "sixteen"), (1, ""), (1, "nul\0"), (1, &"x".repeat(65))] {
        let (_, writer) = io::pipe().unwrap();
        let port = PortConfig { number, name: name.into(), end: HostEnd::Pipe(writer.into()) };
        assert!(matches!(Console::new(vec![port]), Err(ConsoleError::Port(_))), "{number} {name}");
    }
}
