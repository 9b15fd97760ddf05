//! What a worker does when asked, and what it refuses.

use super::*;

#[test]
fn a_delivery_reaches_the_private_memory_and_not_the_file() {
    let (worker, mut client) = Worker::start(Purpose::Fork);
    assert_eq!(client.read(8192, 4), [0; 4]);
    client.write(8192, b"mine");
    assert_eq!(client.read(8190, 8), b"\0\0mine\0\0");
    let mut file = [0; 4];
    worker.memory.read_exact_at(&mut file, 8192).unwrap();
    assert_eq!(file, [0; 4]);
}

#[test]
fn a_delivery_with_one_bad_place_writes_nothing() {
    let (_worker, mut client) = Worker::start(Purpose::Fork);
    for offset in [MEMORY, MEMORY - 3, u64::MAX, u64::MAX - 3] {
        let writes = vec![Write { offset: 4096, bytes: b"good" }, Write { offset, bytes: b"bad!" }];
        assert!(client.refused(&deliver(&[], writes)).contains("outside"));
        assert!(client.refused(&Request::Read(vec![Range { offset, len: 4 }])).contains("outside"));
    }
    assert_eq!(client.read(4096, 4), [0; 4]);
}

#[test]
fn a_delivery_to_another_memory_than_expected_writes_nothing() {
    let (_worker, mut client) = Worker::start(Purpose::Fork);
    client.write(8192, b"marker");
    let right = Write { offset: 8192, bytes: b"marker" };
    let letter = vec![Write { offset: 4096, bytes: b"letter" }];
    for wrong in [Write { offset: 8192, bytes: b"Marker" }, Write { offset: 8193, bytes: b"marker" }] {
        assert!(client.refused(&deliver(&[right, wrong], letter.clone())).contains("captured"));
    }
    let outside = Write { offset: MEMORY - 3, bytes: b"\0\0\0\0" };
    assert!(client.refused(&deliver(&[right, outside], letter.clone())).contains("outside"));
    assert_eq!(client.read(4096, 6), [0; 6]);
    client.done(&deliver(&[right], letter));
    assert_eq!(client.read(4096, 6), b"letter");
}

#[test]
fn what_has_run_is_neither_read_nor_written() {
    let (_worker, mut client) = Worker::start(Purpose::Fork);
    assert!(client.refused(&Request::Pause).contains("does not run"));
    assert!(client.refused(&Request::Capture).contains("not paused"));
    client.done(&Request::Resume);
    for paused in [false, true] {
        if paused {
            client.done(&Request::Pause);
        }
        assert!(client.refused(&deliver(&[], vec![Write { offset: 0, bytes: b"x" }])).contains("has run"));
        assert!(client.refused(&Request::Read(vec![Range { offset: 0, len: 1 }])).contains("has run"));
    }
    assert_eq!(client.phase(), is(Phase::Paused));
    // It goes on, and may be stopped again.
    client.done(&Request::Resume);
    assert!(client.refused(&Request::Resume).contains("already"));
    assert!(client.refused(&deliver(&[], vec![Write { offset: 0, bytes: b"x" }])).contains("has run"));
    client.done(&Request::Pause);
}

#[test]
fn a_template_is_never_written() {
    let (_worker, mut client) = Worker::start(Purpose::Template);
    assert!(client.refused(&deliver(&[], vec![Write { offset: 0, bytes: b"x" }])).contains("template"));
}

#[test]
fn a_capture_goes_to_the_descriptor_that_came_along() {
    let (mut worker, mut client) = Worker::start(Purpose::Template);
    client.done(&Request::Resume);
    client.done(&Request::Pause);
    assert!(client.refused(&Request::Capture).contains("descriptor"));
    let state = tempfile::NamedTempFile::new().unwrap();
    client.ask(&Request::Capture, Some(state.as_file())).unwrap().unwrap();
    assert_eq!(fs::read(state.path()).unwrap(), b"the state");
    // A pipe that nobody reads is an error, and not the worker's end.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let refused = client.ask(&Request::Capture, Some(&File::from(OwnedFd::from(writer)))).unwrap().unwrap_err();
    assert!(refused.contains("written"), "{refused}");
    client.done(&Request::Quit);
    assert!(worker.end().success());
}

#[test]
fn bytes_that_are_no_message_cost_the_connection_and_nothing_else() {
    let (mut worker, mut client) = Worker::start(Purpose::Spare);
    client.write(8192, b"mine");
    drop(client);
    let many = |byte| [byte; 64].to_vec();
    let hostile: [Vec<u8>; 7] = [
        many(0xff),
        many(0),
        b"{\"execute\":\"quit\"}\n".to_vec(),
        [&2_u32.to_le_bytes()[..], &[99, 0]].concat(),
        [&3_u32.to_le_bytes()[..], &[1, 0, 0]].concat(),
        [&2_u32.to_le_bytes()[..], &[1, 200]].concat(),
        // A list of 2^34 ranges, in six bytes.
        [&8_u32.to_le_bytes()[..], &[1, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 1]].concat(),
    ];
    for bytes in hostile {
        let mut stranger = Client::connect(&worker.dir);
        stranger.0.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        // Closed with bytes of ours unread, a connection is reset.
        let _ = stranger.0.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{bytes:?} was answered");
        assert!(worker.is_alive());
    }
    let mut client = Client::connect(&worker.dir);
    assert_eq!(client.read(8192, 4), b"mine");
    // Cut off in the middle of a message.
    client.0.write_all(&[9, 0]).unwrap();
    drop(client);
    assert_eq!(Client::connect(&worker.dir).phase(), is(Phase::Loaded));
}
