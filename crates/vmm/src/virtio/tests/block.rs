use std::{io::Write, os::unix::fs::FileExt};

use super::*;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const SECTORS: u64 = 64;

/// Sector n is filled with n, and a bit over is no sector.
fn disk() -> (Driver, std::fs::File) {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8; 512]).unwrap();
    }
    file.write_all(&[0xff; 100]).unwrap();
    let mut driver = Driver::new(Block::new(file.try_clone().unwrap(), "offshoot-root-and-more").unwrap());
    driver.start();
    (driver, file)
}

fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> Option<(u8, u32)> {
    driver.put(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    driver.put(STATUS, &[0xee]);
    let buffers = [&[(HEADER, 16, 0)][..], data, &[(STATUS, 1, WRITE)]].concat();
    driver.add(0, &buffers);
    driver.notify(0);
    let (_, written) = driver.used(0)?;
    Some((driver.get(STATUS, 1)[0], written))
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let (driver, _) = disk();
    assert_eq!(driver.read(0x100), 64);
    assert_eq!(driver.read(0x104), 0);
    assert_eq!(driver.read(0x10c), 254);
    assert_eq!(driver.read(0x114), 512);
    assert_eq!(driver.offered() & (1 << 5), 1 << 5, "read-only");
}

#[test]
fn sectors_are_read_into_the_buffers_in_order() {
    let (mut driver, _) = disk();
    let data = [(DATA, 100, WRITE), (HIGH_START, 412, WRITE), (DATA + 0x1000, 1024, WRITE), (DATA + 0x2000, 0, WRITE)];
    assert_eq!(request(&mut driver, 0, 7, &data), Some((0, 1537)));
    assert_eq!(driver.get(DATA, 101), [&[7; 100][..], &[0]].concat());
    assert_eq!(driver.get(HIGH_START, 413), [&[7; 412][..], &[0]].concat());
    assert_eq!(
        driver.get(DATA + 0x1000, 1025),
        [[8; 512], [9; 512]].concat().into_iter().chain([0]).collect::<Vec<_>>()
    );
}

#[test]
fn other_descriptors_of_the_file_may_be_read_meanwhile() {
    let (mut driver, file) = disk();
    use std::io::{Read, Seek};
    (&file).seek(io::SeekFrom::Start(1000)).unwrap();
    assert_eq!(request(&mut driver, 0, 1, &[(DATA, 512, WRITE)]), Some((0, 513)));
    let mut byte = [0];
    (&file).read_exact(&mut byte).unwrap();
    assert_eq!(byte, [1], "the position is where it was");
}

#[test]
fn requests_past_the_end_fail_with_an_io_error() {
    let (mut driver, file) = disk();
    for sector in [SECTORS, SECTORS - 1, SECTORS + 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(request(&mut driver, 0, sector, &[(DATA, 1024, WRITE)]), Some((1, 1)), "{sector}");
    }
    // Not whole sectors, too many, or not where memory is.
    for (address, bytes) in [(DATA, 100), (DATA, 513), (DATA, 32 << 20), (LOW_END - 256, 512), (u64::MAX - 10, 512)] {
        assert_eq!(request(&mut driver, 0, 0, &[(address, bytes, WRITE)]), Some((1, 1)), "{address:#x} {bytes}");
    }
    file.set_len(512).unwrap();
    assert_eq!(request(&mut driver, 0, 1, &[(DATA, 512, WRITE)]), Some((1, 1)), "an image that was cut off");
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, WRITE)]), Some((0, 513)));
    assert!(!driver.needs_reset());
}

#[test]
fn nothing_can_be_written() {
    let (mut driver, file) = disk();
    driver.put(DATA, &[0xaa; 512]);
    for kind in [1, 11, 13, 5, 2, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[(DATA, 512, 0)]), Some((2, 1)), "{kind}");
    }
    let mut first = [1; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 512]);
}

#[test]
fn identity_and_flush_are_answered() {
    let (mut driver, _) = disk();
    assert_eq!(request(&mut driver, 8, 0, &[(DATA, 20, WRITE)]), Some((0, 21)));
    assert_eq!(driver.get(DATA, 21), b"offshoot-root-and-mo\0");
    assert_eq!(request(&mut driver, 8, 0, &[(DATA + 64, 5, WRITE)]), Some((0, 6)));
    assert_eq!(driver.get(DATA + 64, 6), b"offsh\0");
    assert_eq!(request(&mut driver, 4, 0, &[]), Some((0, 1)));
}

#[test]
fn a_request_without_room_for_its_status_ends_the_device() {
    let (mut driver, _) = disk();
    driver.add(0, &[(HEADER, 16, 0)]);
    driver.notify(0);
    assert!(driver.needs_reset());
    assert_eq!(driver.used(0), None);
    let (mut driver, _) = disk();
    driver.add(0, &[(HEADER, 16, 0), (LOW_END, 1, WRITE)]);
    driver.notify(0);
    assert!(driver.needs_reset());
}

#[test]
fn a_short_header_is_an_io_error() {
    let (mut driver, _) = disk();
    driver.put(STATUS, &[0xee]);
    driver.add(0, &[(HEADER, 15, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    driver.notify(0);
    assert_eq!(driver.used(0).unwrap().1, 1);
    assert_eq!(driver.get(STATUS, 1), [1]);
}

#[test]
fn a_saved_disk_serves_the_request_it_had_not_seen() {
    let (mut driver, file) = disk();
    assert_eq!(request(&mut driver, 0, 3, &[(DATA, 512, WRITE)]), Some((0, 513)));
    driver.put(HEADER, &[&[0; 8][..], &5_u64.to_le_bytes()].concat());
    driver.add(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    let mut moved = driver.move_to(Block::new(file, "").unwrap());
    moved.device.lock().unwrap().resume();
    moved.notify(0);
    assert_eq!(moved.used(0).unwrap().1, 513);
    assert_eq!(moved.get(DATA, 2), [5, 5]);
}

#[test]
fn a_guest_that_asks_for_too_much_at_once_is_served_bit_by_bit() {
    let (_, file) = disk();
    file.set_len(32 << 20).unwrap();
    let mut driver = Driver::new(Block::new(file, "").unwrap());
    driver.start();
    let events = driver.events();
    events.pause();
    driver.put(HEADER, &[0; 16]);
    let mut buffers = vec![(HIGH_START, 1 << 20, WRITE); 18];
    buffers[0] = (HEADER, 16, 0);
    buffers[17] = (STATUS, 1, WRITE);
    let head = driver.add(0, &buffers);
    for _ in 0..5 {
        driver.offer(0, head);
    }
    driver.notify(0);
    let served: Vec<_> = std::iter::from_fn(|| driver.used(0)).collect();
    assert_eq!(served, [(0, (16 << 20) + 1); 4]);
    events.resume();
    assert_eq!(driver.wait_used(0), (0, (16 << 20) + 1));
    assert_eq!(driver.wait_used(0), (0, (16 << 20) + 1));
    assert_eq!(driver.get(STATUS, 1), [0]);
}
