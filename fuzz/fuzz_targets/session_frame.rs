//! Bytes of a stream from the other side, in pieces of any size, and frames of our own between them.
#![no_main]

use guest_api::session::{Acceptor, Decoder, Event, Frame, Kind, MAX_PAYLOAD, encode};
use libfuzzer_sys::fuzz_target;

/// What comes before the frame, the size of the pieces, and the frame: kind, session, payload.
type Input<'a> = (&'a [u8], u8, u8, u64, &'a [u8]);

fuzz_target!(|input: Input<'_>| {
    let (garbage, pieces, kind, session, payload) = input;
    let pieces = usize::from(pieces).max(1);
    let kind = [Kind::Hello, Kind::HelloAck, Kind::Data, Kind::Close][usize::from(kind % 4)];
    let payload = &payload[..payload.len().min(MAX_PAYLOAD)];
    let sent = Frame { kind, session, payload: payload.to_vec() };
    let mut encoded = Vec::new();
    encode(sent.kind, sent.session, &sent.payload, &mut encoded);
    // Twice the frame, escaped, is the most: header, payload, and a flag on each side.
    assert!(encoded.len() <= 2 * (13 + payload.len()) + 2);

    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for piece in garbage.chunks(pieces).chain(encoded.chunks(pieces)) {
        decoder.push(piece, |frame| frames.push(frame));
    }
    // Whatever came before, the frame arrives; and nothing comes out that did not come in.
    assert_eq!(frames.last(), Some(&sent));
    let bytes: usize = frames.iter().map(|frame| frame.payload.len() + 13).sum();
    assert!(bytes <= garbage.len() + encoded.len());
    assert!(frames.iter().all(|frame| frame.payload.len() <= MAX_PAYLOAD));

    let mut acceptor = Acceptor::default();
    let mut last = None;
    for piece in garbage.chunks(pieces).chain(encoded.chunks(pieces)) {
        last = acceptor.push(piece).pop().or(last);
    }
    let expected = match kind {
        Kind::Hello => Event::Opened(sent.session),
        Kind::Data => Event::Data(sent.session, sent.payload),
        Kind::Close => Event::Closed(sent.session),
        // The guest's own word, which it does not listen to.
        Kind::HelloAck => return,
    };
    assert_eq!(last, Some(expected));
});
