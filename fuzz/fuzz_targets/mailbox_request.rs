//! A line from guest software that plants a mailbox, and a payload that is brought to it.
#![no_main]

use agent::mailboxes::protocol::{self, Request};
use identity::{ForkId, MailboxName, ack, mailbox};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match protocol::parse(bytes) {
        Ok(Request::Plant { capacity, token, .. }) => {
            assert!((1..=mailbox::MAX_CAPACITY).contains(&capacity) && token.len() <= mailbox::MAX_TOKEN);
        }
        Ok(Request::Announce { capacity, nonce, .. }) => {
            assert!((1..=mailbox::MAX_CAPACITY).contains(&capacity) && nonce.iter().any(|byte| *byte != 0));
        }
        // It is printed as it is, on a port of its own.
        Ok(Request::Relay(line)) => assert!(line.len() <= ack::MAX_LINE && !line.contains(['\n', '\r'])),
        Ok(Request::Answer { .. }) => {}
        Err(refusal) => assert_eq!(protocol::reply(&Err(refusal)).matches('\n').count(), 1),
    }
    let fork = ForkId::parse("0123456789abcdef0123").expect("an id");
    if let Some(line) = protocol::filled(&MailboxName::identity(), &fork, bytes) {
        // One line, whatever is in it.
        assert_eq!(line.expose().iter().position(|byte| *byte == b'\n'), Some(line.expose().len() - 1));
    }
});
