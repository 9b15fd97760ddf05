use super::*;

#[test]
fn every_request_gets_other_bytes_and_not_too_many() {
    let mut driver = Driver::new(Rng::new());
    driver.start();
    driver.add(0, &[(BUFFERS, 64, WRITE)]);
    driver.add(0, &[(BUFFERS + 0x1000, 32, WRITE), (BUFFERS + 0x1020, 32, WRITE)]);
    driver.add(0, &[(BUFFERS + 0x2000, 1 << 19, WRITE)]);
    driver.add(0, &[(BUFFERS + 0x2000, 64, 0)]);
    driver.notify(0);
    let written: Vec<_> = std::iter::from_fn(|| driver.used(0)).map(|(_, written)| written).collect();
    assert_eq!(written, [64, 64, 1024, 0]);
    let (one, two) = (driver.get(BUFFERS, 64), driver.get(BUFFERS + 0x1000, 64));
    assert_ne!(one, two);
    assert_ne!(one, [0; 64]);
    assert_ne!(two[32..], [0; 32]);
    assert_eq!(driver.get(BUFFERS + 0x2000 + 1024, 64), [0; 64]);
}

#[test]
fn a_buffer_outside_memory_ends_the_device() {
    for address in [LOW_END - 10, LOW_END, u64::MAX - 5] {
        let mut driver = Driver::new(Rng::new());
        driver.start();
        driver.add(0, &[(address, 64, WRITE)]);
        driver.notify(0);
        assert!(driver.needs_reset(), "{address:#x}");
        assert_eq!(driver.device.lock().unwrap().fault(), Some(QueueError::Address));
    }
}
