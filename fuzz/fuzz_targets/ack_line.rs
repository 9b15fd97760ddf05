//! A line from a guest. The harness signs it, so that the fields behind the signature are reached too.
#![no_main]

use identity::{Ack, AckKey, MailboxName, ack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = AckKey::new([5; 32]);
    let parse = |line: &[u8]| Ack::parse(line, |mailbox| Some(key.for_mailbox(mailbox)));
    let _ = parse(bytes);
    let _ = ack::confirmation(bytes, &key);

    let name = MailboxName::identity();
    let mut line = format!("offshoot-ack v=1 mailbox={name} ").into_bytes();
    line.extend_from_slice(bytes);
    let tag = key.for_mailbox(&name).sign(&line);
    line.extend_from_slice(b" hmac=");
    line.extend(tag.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()));
    if let Ok(ack) = parse(&line) {
        assert_eq!(ack.mailbox, name);
        assert!(ack.to_datagram(&key.for_mailbox(&name)).len() <= ack::MAX_DATAGRAM);
        // What was understood can be said again, unless the writer has to cut it.
        let again = ack.to_line(&key.for_mailbox(&name));
        assert!(again.len() <= ack::MAX_LINE);
        let again = parse(again.as_bytes()).expect("our own line");
        assert_eq!((again.stage, &again.fork), (ack.stage, &ack.fork));
    }
});
