//! The ack line: parsed as fields, and believed only when it is signed.
#![allow(clippy::unwrap_used)]

use offshoot_identity::{
    Ack, AckError, AckKey, ForkId, MailboxName, Stage, Step,
    ack::{MAX_DATAGRAM, MAX_LINE, confirmation},
};
use proptest::prelude::*;

fn name(text: &str) -> MailboxName {
    MailboxName::parse(text).unwrap()
}

fn ack(mailbox: &str) -> Ack {
    Ack {
        stage: Stage::Applied,
        mailbox: name(mailbox),
        fork: ForkId::parse("0123456789abcdef0123").unwrap(),
        steps: vec![Step { name: "clock".into(), outcome: "set".into(), micros: 41 }],
        reason: None,
    }
}

fn key() -> AckKey {
    AckKey::new([5; 32])
}

fn parse(line: &[u8]) -> Result<Ack, AckError> {
    Ack::parse(line, |mailbox| Some(key().for_mailbox(mailbox)))
}

/// A line with these fields and a right signature: what is refused then is the form, not the signature.
fn signed(fields: &str) -> Vec<u8> {
    use std::fmt::Write as _;
    let mut line = format!("offshoot-ack v=1 {fields}");
    let tag = key().for_mailbox(&name("foo")).sign(line.as_bytes());
    line.push_str(" hmac=");
    for byte in tag {
        write!(line, "{byte:02x}").unwrap();
    }
    line.into_bytes()
}

#[test]
fn i9_an_ack_for_foobar_is_no_ack_for_foo() {
    let line = ack("foobar").to_line(&key().for_mailbox(&name("foobar")));
    assert_eq!(parse(line.as_bytes()).unwrap().mailbox, name("foobar"));
    // The key of one mailbox answers for no other.
    let forged = ack("foo").to_line(&key().for_mailbox(&name("foobar")));
    assert_eq!(parse(forged.as_bytes()), Err(AckError::Forged));
    // Renamed afterwards.
    let renamed = line.replace("mailbox=foobar", "mailbox=foo");
    assert_eq!(parse(renamed.as_bytes()), Err(AckError::Forged));
}

#[test]
fn i9_an_ack_of_another_fork_is_forged() {
    let other = AckKey::new([6; 32]).for_mailbox(&name("foo"));
    assert_eq!(parse(ack("foo").to_line(&other).as_bytes()), Err(AckError::Forged));
    let right = ack("foo").to_line(&key().for_mailbox(&name("foo")));
    assert_eq!(Ack::parse(right.as_bytes(), |_| None), Err(AckError::Forged));
}

#[test]
fn malformed_doubled_unknown_and_absent_fields_are_refused_even_when_signed() {
    let fork = "fork=0123456789abcdef0123";
    assert!(parse(&signed(&format!("stage=applied mailbox=foo {fork}"))).is_ok());
    for bad in [
        format!("stage=applied mailbox=foo mailbox=foo {fork}"),
        format!("stage=applied mailbox=foo {fork} extra=1"),
        format!("stage=done mailbox=foo {fork}"),
        format!("mailbox=foo {fork}"),
        format!("stage=applied {fork}"),
        "stage=applied mailbox=foo".into(),
        "stage=applied mailbox=foo fork=../x".into(),
        format!("stage=applied  mailbox=foo {fork}"),
        format!("stage=applied mailbox=foo {fork} "),
        format!("stage=applied mailbox {fork}"),
        format!("stage=applied mailbox=foo {fork} steps="),
        format!("stage=applied mailbox=foo {fork} steps=clock:set"),
        format!("stage=applied mailbox=foo {fork} steps=clock:set:-1"),
        format!("stage=applied mailbox=foo {fork} steps=clock:set:1:2"),
        format!("stage=applied mailbox=foo {fork} reason=%4"),
        format!("stage=applied mailbox=foo {fork} reason=%+1"),
        format!("stage=applied mailbox=foo {fork} hmac=00"),
    ] {
        assert!(matches!(parse(&signed(&bad)), Err(AckError::Field(_))), "{bad}");
    }
}

#[test]
fn what_is_no_ack_is_said_to_be_none() {
    for bad in [&b""[..], b"hello", b"offshoot-ack v=2 stage=applied", b"offshoot-ack v=12 hmac=", b"\xff\xfe"] {
        assert!(matches!(parse(bad), Err(AckError::NotAnAck | AckError::Field(_))), "{bad:?}");
    }
    assert_eq!(parse(&vec![b'a'; MAX_LINE + 1]), Err(AckError::TooLong));
}

#[test]
fn the_longest_ack_stays_within_its_line() {
    let step = |index: u64| Step { name: "ü".repeat(40), outcome: "=".repeat(40), micros: index };
    let long = Ack {
        stage: Stage::Failed,
        steps: (0..200).map(step).collect(),
        reason: Some("\u{1F600}".repeat(5_000)),
        ..ack(&"m".repeat(64))
    };
    let line = long.to_line(&key().for_mailbox(&long.mailbox));
    assert!(line.len() <= MAX_LINE, "{}", line.len());
    let read = parse(line.as_bytes()).unwrap();
    assert_eq!((read.stage, read.mailbox), (Stage::Failed, long.mailbox));
    assert!(!read.steps.is_empty() && read.reason.is_some());
}

#[test]
fn a_first_step_too_long_for_the_line_is_left_out_whole() {
    let step = Step { name: "hook".into(), outcome: "x".repeat(MAX_LINE), micros: 1 };
    let line = Ack { steps: vec![step], ..ack("foo") }.to_line(&key().for_mailbox(&name("foo")));
    assert_eq!(parse(line.as_bytes()).unwrap().steps, []);
}

#[test]
fn n2_the_longest_ack_fits_a_datagram_and_is_believed() {
    let step = Step { name: "network".into(), outcome: "set".into(), micros: 1 };
    for stage in [Stage::Applied, Stage::NetworkPending, Stage::Rehearsed, Stage::Failed] {
        let reason = Some("\u{1F600}".repeat(5_000));
        let long = Ack { stage, steps: vec![step.clone(); 200], reason, ..ack(&"m".repeat(64)) };
        let line = long.to_datagram(&key().for_mailbox(&long.mailbox));
        assert!(line.len() <= MAX_DATAGRAM, "{}", line.len());
        let read = parse(line.as_bytes()).unwrap();
        assert_eq!((read.stage, read.fork, read.steps), (stage, long.fork, Vec::new()));
    }
}

#[test]
fn n2_an_ack_has_one_confirmation_and_it_is_no_ack() {
    let key = key().for_mailbox(&name("foo"));
    let line = ack("foo").to_datagram(&key);
    let confirmed = confirmation(line.as_bytes(), &key).unwrap();
    assert!(confirmed.starts_with("offshoot-ack-confirmed v=1 of="));
    assert!(parse(confirmed.as_bytes()).is_err(), "what one side says can not be sent back as the other's");
    // Another fork, another key, another stage: another confirmation.
    let other = Ack { fork: ForkId::parse("f".repeat(20).as_str()).unwrap(), ..ack("foo") }.to_datagram(&key);
    assert_ne!(confirmation(other.as_bytes(), &key), Some(confirmed.clone()));
    assert_ne!(confirmation(line.as_bytes(), &AckKey::new([9; 32])), Some(confirmed));
    for bad in [&b""[..], b"offshoot-ack v=1", b"x hmac=00", b"\xff hmac="] {
        assert_eq!(confirmation(bad, &key), None);
    }
}

proptest! {
    #[test]
    fn a_line_reads_back_as_it_was_written(
        mailbox in "[A-Za-z0-9._:-]{1,64}",
        steps in prop::collection::vec(("\\PC{1,12}", "[ -~]{1,12}", any::<u64>()), 0..8),
        reason in prop::option::of("\\PC{1,30}"),
        applied in any::<bool>(),
    ) {
        let steps = steps.into_iter().map(|(name, outcome, micros)| Step { name, outcome, micros }).collect();
        let stage = if applied { Stage::Applied } else { Stage::Failed };
        let ack = Ack { stage, steps, reason, ..ack(&mailbox) };
        let line = ack.to_line(&key().for_mailbox(&ack.mailbox));
        prop_assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "one printable line");
        prop_assert_eq!(parse(line.as_bytes()), Ok(ack));
    }

    #[test]
    fn a_changed_line_is_never_believed(at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let mut line = ack("foo").to_line(&key().for_mailbox(&name("foo"))).into_bytes();
        let at = at.index(line.len());
        line[at] ^= flip;
        prop_assert!(parse(&line).is_err());
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), prefixed in any::<bool>()) {
        let mut line = if prefixed { b"offshoot-ack v=1 ".to_vec() } else { Vec::new() };
        line.extend(bytes);
        prop_assert!(parse(&line).is_err());
    }
}
