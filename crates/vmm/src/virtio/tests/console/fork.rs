use super::*;

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
fn what_a_full_pipe_did_not_take_is_sent_after_the_capture() {
    let mut template = Guest::new();
    let piece = pattern(0x3000);
    let mut pieces = 1;
    while template.send(ACK_TRANSMIT, &piece) {
        pieces += 1;
    }
    let mut ack = template.host.ack.try_clone().unwrap();
    let mut fork = template.move_on();
    fork.driver.wait_used(ACK_TRANSMIT);
    assert!(fork.send(ACK_TRANSMIT, b"end"));
    let mut all = Vec::new();
    ack.read_to_end(&mut all).unwrap();
    assert_ne!(all.len() % piece.len(), 0, "the capture was in the middle of a piece");
    let mut rest = vec![0; pieces * piece.len() - all.len() + 3];
    fork.host.ack.read_exact(&mut rest).unwrap();
    all.extend(rest);
    assert!(all == [&piece.repeat(pieces)[..], b"end"].concat());
}
