use std::os::unix::net::UnixDatagram;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
const BUFFER: u32 = 2048;

/// A card, and the other end of its cable: each datagram is a frame.
fn card() -> (Driver, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut driver = Driver::new(Net::new(ours.into(), MAC).unwrap());
    driver.start();
    (driver, theirs)
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
