use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixDatagram, UnixStream},
};

use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
const BUFFER: u32 = 2048;

/// A card, and the other end of its cable: each datagram is a frame.
fn card() -> (Driver, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut driver = Driver::new(Net::new(Cable::Tap(ours.into()), MAC).unwrap());
    driver.start();
    (driver, theirs)
}

/// The same at a stream.
fn streaming_card() -> (Driver, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut driver = Driver::new(Net::new(Cable::Stream(ours.into()), MAC).unwrap());
    driver.start();
    (driver, theirs)
}

/// A frame as it is on a stream.
fn with_length(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap().to_be_bytes(), frame].concat()
}

/// Whether the card has closed its end, in time.
fn is_closed(mut cable: UnixStream) -> bool {
    match cable.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// A frame from the guest, in one buffer; whether the card took it.
fn transmit(driver: &mut Driver, frame: &[u8]) -> bool {
    driver.put(BUFFERS + 12, frame);
    driver.add(1, &[(BUFFERS, 12 + frame.len() as u32, 0)]);
    driver.notify(1);
    driver.used(1).is_some()
}

#[test]
fn what_a_card_offers_does_not_depend_on_what_it_is_connected_to() {
    let stream = || Cable::Stream(UnixStream::pair().unwrap().0.into());
    let tap = || Cable::Tap(UnixDatagram::pair().unwrap().0.into());
    let offered = |cable| Driver::new(Net::new(cable, MAC).unwrap()).offered();
    // VIRTIO_NET_F_MAC and VIRTIO_F_VERSION_1.
    assert_eq!([offered(Cable::Loose), offered(tap()), offered(stream())], [1 << 5 | 1 << 32; 3]);
    // A guest that was captured with a card that is connected to nothing goes on with any.
    let mut template = Driver::new(Net::new(Cable::Loose, MAC).unwrap());
    template.start();
    for cable in [Cable::Loose, tap(), stream()] {
        let mut fork = template.move_to(Net::new(cable, MAC).unwrap());
        assert!(transmit(&mut fork, &[1; 60]));
    }
}

#[test]
fn what_a_card_connected_to_nothing_sends_is_lost() {
    let mut driver = Driver::new(Net::new(Cable::Loose, MAC).unwrap());
    driver.start();
    let _events = driver.events();
    driver.add(0, &[(BUFFERS, BUFFER, WRITE)]);
    driver.notify(0);
    for _ in 0..200 {
        assert!(transmit(&mut driver, &[1; 1500]));
    }
    assert_eq!(driver.used(0), None);
}

#[test]
fn frames_of_a_stream_arrive_in_whatever_pieces_they_come() {
    let (mut driver, mut cable) = streaming_card();
    let _events = driver.events();
    for number in 0..4 {
        driver.add(0, &[(BUFFERS + number * 0x1000, BUFFER, WRITE)]);
    }
    driver.notify(0);
    let three = [with_length(&[7; 1500]), with_length(&[]), with_length(&[8; 60]), with_length(&[9; 61])].concat();
    let (begin, end) = three.split_at(2);
    cable.write_all(begin).unwrap();
    cable.write_all(&end[..1000]).unwrap();
    cable.write_all(&end[1000..]).unwrap();
    assert_eq!(driver.wait_used(0), (0, 1512));
    assert_eq!(driver.wait_used(0), (1, 72));
    assert_eq!(driver.wait_used(0), (2, 73));
    assert_eq!(driver.get(BUFFERS, 13), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 7]);
    assert_eq!(driver.get(BUFFERS + 0x2000 + 72, 2), [9, 0]);
    // One that no buffer takes is lost, and nothing after it.
    cable.write_all(&[with_length(&[1; 60_000]), with_length(&[2; 64])].concat()).unwrap();
    assert_eq!(driver.wait_used(0), (3, 76));
}

#[test]
fn frames_leave_for_a_stream_with_their_lengths() {
    let (mut driver, mut cable) = streaming_card();
    assert!(transmit(&mut driver, &[5; 1500]));
    assert!(transmit(&mut driver, &[6; 60]));
    let mut sent = vec![0; 4 + 1500 + 4 + 60];
    cable.read_exact(&mut sent).unwrap();
    assert_eq!(sent, [with_length(&[5; 1500]), with_length(&[6; 60])].concat());
}

#[test]
fn a_full_stream_stops_the_guest_and_cuts_no_frame_off() {
    let (mut driver, mut cable) = streaming_card();
    let _events = driver.events();
    let frame = |number: u32| -> Vec<u8> { number.to_be_bytes().repeat(15_000) };
    let mut sent = 0;
    while transmit(&mut driver, &frame(sent)) {
        sent += 1;
        assert!(sent < 10_000);
    }
    // The last one is still in its queue, the one before it perhaps half sent.
    for number in 0..=sent {
        let mut bytes = vec![0; 4 + 60_000];
        cable.read_exact(&mut bytes).unwrap();
        assert!(bytes == with_length(&frame(number)), "{number}");
    }
    driver.wait_used(1);
}

#[test]
fn a_stream_with_an_impossible_length_is_closed_and_harms_nobody() {
    for length in [65_554_u32, 1 << 31, u32::MAX] {
        let (mut driver, mut cable) = streaming_card();
        let _events = driver.events();
        driver.add(0, &[(BUFFERS, BUFFER, WRITE)]);
        driver.notify(0);
        cable.write_all(&[with_length(&[7; 60]), length.to_be_bytes().to_vec(), vec![1; 100]].concat()).unwrap();
        assert_eq!(driver.wait_used(0), (0, 72));
        driver.add(0, &[(BUFFERS, BUFFER, WRITE)]);
        driver.notify(0);
        assert!(is_closed(cable), "{length}");
        assert!(transmit(&mut driver, &[1; 60]), "what the guest sends now is lost");
        assert!(!driver.needs_reset());
        assert_eq!(driver.used(0), None);
    }
}

#[test]
fn a_stream_whose_other_end_goes_is_closed_at_once() {
    for cut in [0, 3, 30] {
        let (mut driver, mut cable) = streaming_card();
        let _events = driver.events();
        driver.add(0, &[(BUFFERS, BUFFER, WRITE)]);
        driver.notify(0);
        cable.write_all(&with_length(&[7; 60])[..cut]).unwrap();
        // Half of it, so that this end can see what becomes of the other.
        cable.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(is_closed(cable), "{cut}");
        for _ in 0..100 {
            assert!(transmit(&mut driver, &[1; 1500]));
        }
        assert_eq!(driver.used(0), None, "half a frame is none");
    }
    // A guest that only sends finds out too.
    let (mut driver, cable) = streaming_card();
    drop(cable);
    for _ in 0..100 {
        assert!(transmit(&mut driver, &[1; 1500]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_frames_in_any_pieces_are_the_same_frames(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..20),
        cuts in prop::collection::vec(1_usize..2000, 1..40),
    ) {
        let (mut driver, mut cable) = streaming_card();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| with_length(frame)).collect();
        let frames: Vec<_> = frames.into_iter().filter(|frame| !frame.is_empty()).collect();
        for number in 0..frames.len() as u64 {
            driver.add(0, &[(BUFFERS + number * 0x1000, 0x1000, WRITE)]);
        }
        let _events = driver.events();
        driver.notify(0);
        let (mut rest, mut cuts) = (bytes.as_slice(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            cable.write_all(piece).unwrap();
            rest = after;
        }
        for (number, frame) in (0..).zip(&frames) {
            prop_assert_eq!(driver.wait_used(0), (number, 12 + frame.len() as u32));
            prop_assert_eq!(&driver.get(BUFFERS + u64::from(number) * 0x1000 + 12, frame.len()), frame);
        }
    }
}

#[test]
fn the_address_is_in_the_configuration() {
    let (driver, _cable) = card();
    let mut mac = [0; 6];
    driver.device.lock().unwrap().read(0x100, &mut mac);
    assert_eq!(mac, MAC);
}

#[test]
fn frames_arrive_with_an_empty_header() {
    let (mut driver, cable) = card();
    let _events = driver.events();
    // The second is too short for what comes.
    driver.add(0, &[(BUFFERS, 100, WRITE), (BUFFERS + 100, BUFFER, WRITE)]);
    driver.add(0, &[(BUFFERS + 0x1000, 50, WRITE)]);
    driver.notify(0);
    cable.send(&[7; 1500]).unwrap();
    assert_eq!(driver.wait_used(0), (0, 1512));
    assert_eq!(driver.get(BUFFERS, 13), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 7]);
    assert_eq!(driver.get(BUFFERS + 1511, 2), [7, 0]);
    cable.send(&[8; 39]).unwrap();
    cable.send(&[9; 38]).unwrap();
    assert_eq!(driver.wait_used(0), (2, 50));
    assert_eq!(driver.get(BUFFERS + 0x1000 + 49, 2), [9, 0]);
}

#[test]
fn frames_leave_without_their_header() {
    let (mut driver, cable) = card();
    driver.put(BUFFERS, &[0xff; 12]);
    driver.put(BUFFERS + 12, &[5; 1500]);
    driver.add(1, &[(BUFFERS, 5, 0), (BUFFERS + 5, 1507, 0)]);
    // No frame, less than a header, and too much.
    driver.add(1, &[(BUFFERS, 12, 0)]);
    driver.add(1, &[(BUFFERS, 3, 0)]);
    driver.add(1, &[(BUFFERS, 1 << 20, 0)]);
    driver.add(1, &[(BUFFERS + 1, 12, 0)]);
    driver.notify(1);
    for _ in 0..5 {
        assert!(driver.used(1).is_some());
    }
    let mut frame = [0; 2048];
    assert_eq!(cable.recv(&mut frame).unwrap(), 1500);
    assert_eq!(frame[..1500], [5; 1500]);
    assert!(!driver.needs_reset());
}

#[test]
fn a_full_cable_stops_the_guest_and_a_read_lets_it_go_on() {
    let (mut driver, cable) = card();
    let _events = driver.events();
    let mut sent = 0_u32;
    loop {
        driver.put(BUFFERS + 12, &sent.to_le_bytes());
        driver.add(1, &[(BUFFERS, 12 + 1000, 0)]);
        driver.notify(1);
        sent += 1;
        if driver.used(1).is_none() {
            break;
        }
        assert!(sent < 10_000);
    }
    for number in 0..sent {
        let mut frame = [0; 2048];
        assert_eq!(cable.recv(&mut frame).unwrap(), 1000);
        assert_eq!(frame[..4], number.to_le_bytes());
    }
    driver.wait_used(1);
}
