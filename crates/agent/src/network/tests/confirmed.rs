//! The ack's datagram: sent until it is confirmed, and confirmed by nothing but its confirmation.

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use identity::{Ack, AckKey, ForkId, MailboxName, Stage, ack};

use super::rig::{GATEWAY, PATIENCE, Switch, may_run, section, until, v4};
use crate::network::{AckSender, Letter, Outcome};

fn letter(key: u8) -> Letter {
    let key = AckKey::new([key; 32]);
    let ack = Ack {
        stage: Stage::Applied,
        mailbox: MailboxName::identity(),
        fork: ForkId::parse("0123456789abcdef0123").unwrap(),
        steps: Vec::new(),
        reason: None,
    };
    let line = ack.to_datagram(&key);
    let confirmation = ack::confirmation(line.as_bytes(), &key).unwrap();
    Letter { line, confirmation, to: (GATEWAY, 28518).into() }
}

fn next(host: &UdpSocket) -> (String, std::net::SocketAddr) {
    let mut buffer = [0; 2048];
    let (len, from) = host.recv_from(&mut buffer).unwrap();
    (String::from_utf8(buffer[..len].to_vec()).unwrap(), from)
}

#[test]
fn n2_an_ack_is_sent_until_exactly_its_confirmation_comes() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    let acks = fork.space.run(|| AckSender::start().unwrap());
    assert_eq!(acks.outcome(), Outcome::None);
    assert!(!acks.send_again((GATEWAY, 28518).into()));
    fork.becomes(11);
    let begun = Instant::now();
    // Nobody listens yet: that is no reason to stop.
    acks.send(letter(1));
    assert!(begun.elapsed() < Duration::from_secs(1), "sending does not wait");
    let (host, other) = switch.space.run(|| {
        let host = UdpSocket::bind((GATEWAY, 28518)).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        (host, UdpSocket::bind((GATEWAY, 28519)).unwrap())
    });
    let (line, from) = next(&host);
    assert_eq!((line, from.ip()), (letter(1).line, v4(11).into()));
    let right = letter(1).confirmation;
    for wrong in [
        letter(2).confirmation,
        right[..right.len() - 1].to_owned(),
        format!("{right} "),
        letter(1).line,
        String::new(),
    ] {
        host.send_to(wrong.as_bytes(), from).unwrap();
    }
    other.send_to(right.as_bytes(), from).unwrap();
    // It is sent again after each of them, so none was taken.
    next(&host);
    next(&host);
    assert_eq!(acks.outcome(), Outcome::Waiting);
    host.send_to(right.as_bytes(), from).unwrap();
    until("the ack is confirmed", || acks.outcome() == Outcome::Confirmed);
    // What was under way is read; then there is silence.
    host.set_nonblocking(true).unwrap();
    while host.recv_from(&mut [0; 2048]).is_ok() {}
    std::thread::sleep(Duration::from_millis(1200));
    assert!(host.recv_from(&mut [0; 2048]).is_err());
    // At the host's wish it is sent again, and has to be confirmed again.
    assert!(acks.send_again((GATEWAY, 28518).into()));
    assert_eq!(acks.outcome(), Outcome::Waiting);
    until("it comes again", || host.recv_from(&mut [0; 2048]).is_ok());
    acks.forget();
    assert_eq!(acks.outcome(), Outcome::None);
    assert_eq!(section(11).ack, Some(letter(1).to));
}

#[test]
fn n2_the_pauses_between_two_datagrams_grow() {
    if !may_run() {
        return;
    }
    let switch = Switch::new();
    let fork = switch.machine();
    fork.becomes(11);
    let acks = fork.space.run(|| AckSender::start().unwrap());
    let host = switch.space.run(|| UdpSocket::bind((GATEWAY, 28518)).unwrap());
    acks.send(letter(1));
    let mut times = Vec::new();
    for _ in 0..6 {
        next(&host);
        times.push(Instant::now());
    }
    // 20 + 40 + 80 + 160 + 320 ms.
    let taken = times[5] - times[0];
    assert!(taken >= Duration::from_millis(600), "{taken:?}");
}
