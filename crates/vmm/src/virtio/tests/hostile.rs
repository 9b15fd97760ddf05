//! Drivers that break the rules.

use super::*;

fn rng() -> Driver {
    let mut driver = Driver::new(Rng::new());
    driver.start();
    driver
}

fn fault(driver: &Driver) -> Option<QueueError> {
    let fault = driver.device.lock().unwrap().fault();
    assert_eq!(driver.needs_reset(), fault.is_some());
    if fault.is_some() {
        // The driver is told by a configuration interrupt, and nothing goes on.
        assert_eq!(driver.read(0x60) & 2, 2);
        assert!(!driver.device.lock().unwrap().is_active());
    }
    fault
}

#[test]
fn a_chain_that_is_a_loop_ends_the_device() {
    let mut driver = rng();
    driver.descriptor(0, 0, BUFFERS, 1, WRITE | NEXT, 1);
    driver.descriptor(0, 1, BUFFERS, 1, WRITE | NEXT, 0);
    driver.offer(0, 0);
    driver.notify(0);
    assert_eq!(fault(&driver), Some(QueueError::Endless));
    assert_eq!(driver.used(0), None);
    driver.notify(0);
    driver.start();
    assert_eq!(fault(&driver), None);
}

#[test]
fn a_chain_that_leaves_its_table_ends_the_device() {
    for next in [8, 9, u16::MAX] {
        let mut driver = rng();
        driver.descriptor(0, 0, BUFFERS, 1, WRITE | NEXT, next);
        driver.offer(0, 0);
        driver.notify(0);
        assert_eq!(fault(&driver), Some(QueueError::Endless));
    }
    let mut driver = rng();
    driver.offer(0, 8);
    driver.notify(0);
    assert_eq!(fault(&driver), Some(QueueError::Endless));
}

#[test]
fn a_chain_of_more_than_four_gigabytes_ends_the_device() {
    let mut driver = rng();
    driver.add(0, &[(BUFFERS, u32::MAX, WRITE), (BUFFERS, u32::MAX, WRITE)]);
    driver.notify(0);
    assert_eq!(fault(&driver), Some(QueueError::Endless));
}

#[test]
fn a_huge_buffer_is_used_as_far_as_needed() {
    let mut driver = rng();
    driver.add(0, &[(BUFFERS, u32::MAX, WRITE)]);
    driver.notify(0);
    assert_eq!(fault(&driver), None);
    assert_eq!(driver.used(0).unwrap().1, 1024);
}

#[test]
fn a_buffer_to_read_after_one_to_write_ends_the_device() {
    let mut driver = rng();
    driver.add(0, &[(BUFFERS, 1, WRITE), (BUFFERS, 1, 0)]);
    driver.notify(0);
    assert_eq!(fault(&driver), Some(QueueError::Order));
}

#[test]
fn an_index_that_jumps_ends_the_device() {
    for jump in [9_u16, 0x8000, 0xffff] {
        let driver = rng();
        driver.memory.write_obj(jump, GuestAddress(driver.rings[&0].available_ring() + 2)).unwrap();
        driver.notify(0);
        assert_eq!(fault(&driver), Some(QueueError::Ring), "{jump}");
    }
}

#[test]
fn indirect_tables_are_bounded() {
    const INDIRECT: u16 = 4;
    // Not offered, so nobody should; who does gets no more than a chain's due.
    for (bytes, fill) in [(0_u32, 0_u16), (8, 0), (16, INDIRECT), (65535 * 16, WRITE | NEXT), (!15, NEXT)] {
        let mut driver = rng();
        for entry in 0..2000_u64 {
            let at = BUFFERS + entry * 16;
            driver.put(at, &[0; 12]);
            driver.memory.write_obj(fill, GuestAddress(at + 12)).unwrap();
            driver.memory.write_obj((entry + 1) as u16, GuestAddress(at + 14)).unwrap();
        }
        driver.descriptor(0, 0, BUFFERS, bytes, INDIRECT, 0);
        driver.offer(0, 0);
        driver.notify(0);
        assert_eq!(fault(&driver), Some(QueueError::Endless), "{bytes} {fill}");
    }
}

#[test]
fn rings_on_top_of_each_other_and_of_buffers_harm_only_the_guest() {
    let mut driver = Driver::new(Rng::new());
    driver.begin();
    let ring = Ring { size: 8, base: RINGS, ..Ring::default() };
    driver.describe(0, 8, RINGS, RINGS + 0x8000, RINGS + 0x8000);
    driver.rings.insert(0, ring);
    driver.set_status(4);
    for round in 0..8 {
        driver.add(0, &[(RINGS + round, 512, WRITE)]);
        driver.notify(0);
    }
}
