use super::*;

/// A device that records what it is asked.
#[derive(Debug, Default)]
struct Probe {
    log: Arc<Mutex<Vec<String>>>,
}

impl VirtioDevice for Probe {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 4]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[1, 2, 3, 4, 5], offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.log.lock().unwrap().push(format!("activate {features:#x}"));
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        while let Some(chain) = queues.next(queue)? {
            self.log.lock().unwrap().push(format!("{queue}: {} {}", chain.readable_bytes(), chain.writable_bytes()));
            queues.complete(&chain, 0)?;
        }
        Ok(Progress::Done)
    }

    fn reset(&mut self) {
        self.log.lock().unwrap().push("reset".into());
    }
}

fn probe() -> (Driver, Arc<Mutex<Vec<String>>>) {
    let probe = Probe::default();
    let log = Arc::clone(&probe.log);
    (Driver::new(probe), log)
}

fn said(log: &Mutex<Vec<String>>) -> Vec<String> {
    std::mem::take(&mut log.lock().unwrap())
}

#[test]
fn the_registers_say_what_the_device_is() {
    let (driver, _) = probe();
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 4);
    assert_eq!(driver.offered(), 1 << 32 | 0b101);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    let sizes: Vec<_> = [0, 1, 2, u32::MAX]
        .map(|queue| {
            driver.write(0x30, queue);
            driver.read(0x34)
        })
        .into();
    assert_eq!(sizes, [8, 4, 0, 0]);
}

#[test]
fn registers_are_read_whole_and_config_in_any_piece() {
    let (driver, _) = probe();
    let mut device = driver.device.lock().unwrap();
    let mut read = |offset, bytes: usize| {
        let mut data = vec![0xaa; bytes];
        device.read(offset, &mut data);
        data
    };
    assert_eq!(read(0, 2), [0; 2]);
    assert_eq!(read(2, 4), [0; 4]);
    assert_eq!(read(0, 8), [0; 8]);
    assert_eq!(read(0x101, 2), [2, 3]);
    assert_eq!(read(0x100, 8), [1, 2, 3, 4, 5, 0, 0, 0]);
    assert_eq!(read(0x105, 1), [0]);
    assert_eq!(read(u64::MAX, 4), [0; 4]);
    device.write(0x100, &[9; 4]);
    device.write(0x70, &[1]);
    let mut data = [0];
    device.read(0x100, &mut data);
    assert_eq!(data, [1]);
    assert!(!device.is_active());
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [1 << 32 | 0b10, 0b101, 0, 1 << 33 | 1 << 32, u64::MAX] {
        let (driver, log) = probe();
        driver.set_status(3);
        driver.accept_features(features);
        assert_eq!(driver.status(), 3, "{features:#x}");
        // Nor can the driver go on as if.
        driver.set_status(4);
        assert_eq!(driver.status(), 3);
        assert!(said(&log).is_empty());
        // It may choose again.
        driver.accept_features(1 << 32);
        assert_eq!(driver.status(), 11);
        driver.accept_features(1 << 32 | 1);
        driver.set_status(4);
        assert_eq!(said(&log), ["activate 0x100000000"]);
    }
}

#[test]
fn a_chain_comes_back_with_an_interrupt() {
    let (mut driver, log) = probe();
    driver.start();
    said(&log);
    let head = driver.add(1, &[(BUFFERS, 100, 0), (BUFFERS, 28, 0), (BUFFERS, 7, WRITE)]);
    driver.notify(1);
    assert_eq!(said(&log), ["1: 128 7"]);
    assert_eq!(driver.used(1), Some((u32::from(head), 0)));
    assert_eq!(driver.read(0x60), 1);
    assert_eq!(*driver.line.edges.lock().unwrap(), 1);
    driver.write(0x64, 2);
    assert_eq!(driver.read(0x60), 1);
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let (mut driver, _) = probe();
    driver.start();
    driver.memory.write_obj(1_u16, GuestAddress(driver.rings[&0].available_ring())).unwrap();
    driver.add(0, &[(BUFFERS, 1, 0)]);
    driver.notify(0);
    assert!(driver.used(0).is_some());
    assert_eq!(driver.read(0x60), 0);
    assert_eq!(*driver.line.edges.lock().unwrap(), 0);
}

#[test]
fn nothing_is_served_before_the_driver_is_ready_or_after_it_failed() {
    let (mut driver, log) = probe();
    driver.begin();
    driver.set_up(0, 8);
    driver.add(0, &[(BUFFERS, 1, 0)]);
    driver.notify(0);
    assert!(said(&log).iter().all(|entry| entry == "reset"));
    driver.set_status(4);
    said(&log);
    for queue in [1, 2, 0x1_0000, u32::MAX] {
        driver.write(0x50, queue);
    }
    assert!(said(&log).is_empty(), "queues that are not there");
    driver.set_status(128);
    driver.notify(0);
    assert!(said(&log).is_empty());
    assert_eq!(driver.used(0), None);
}

#[test]
fn queues_are_set_up_only_between_features_and_ready() {
    let (mut driver, _) = probe();
    driver.set_up(0, 8);
    assert_eq!(driver.read(0x44), 0, "before the features are agreed on");
    driver.begin();
    driver.set_up(0, 8);
    // A ready queue does not move: its rings were checked where they are.
    driver.describe(0, 4, 0x7fff_0000, 2, 4);
    driver.set_status(4);
    driver.add(0, &[(BUFFERS, 1, 0)]);
    driver.notify(0);
    assert!(driver.used(0).is_some());
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 0);
}

#[test]
fn queues_that_can_not_be_are_refused() {
    let (base, available, used) = (RINGS, RINGS + 0x1000, RINGS + 0x2000);
    let top = LOW_END - 16;
    for (size, descriptors, available, used) in [
        (0, base, available, used),
        (3, base, available, used),
        (16, base, available, used),
        (0x1_0008, base, available, used),
        (u32::MAX, base, available, used),
        (8, base + 8, available, used),
        (8, base, available + 1, used),
        (8, base, available, used + 2),
        (8, top, available, used),
        (8, base, top, used),
        (8, base, available, top),
        (8, LOW_END, available, used),
        (8, !15, available, used),
        (8, base, u64::MAX - 1, used),
        (8, base, available, !3),
        (8, base, 0, used),
    ] {
        let (driver, _) = probe();
        driver.begin();
        driver.describe(0, size, descriptors, available, used);
        assert_eq!(driver.read(0x44), 0, "{size:#x} {descriptors:#x} {available:#x} {used:#x}");
        assert!(driver.needs_reset());
        driver.begin();
        driver.describe(0, 8, base, base + 0x1000, base + 0x2000);
        assert_eq!(driver.read(0x44), 1, "a reset heals it");
    }
}

#[test]
fn a_reset_forgets_everything() {
    let (mut driver, log) = probe();
    driver.start();
    driver.add(0, &[(BUFFERS, 1, 0)]);
    driver.notify(0);
    driver.write(0x70, 0);
    assert_eq!(said(&log).last().unwrap(), "reset");
    assert_eq!((driver.status(), driver.read(0x60)), (0, 0));
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 0);
    driver.notify(0);
    assert!(said(&log).is_empty());
}

#[test]
fn a_status_bit_is_not_taken_back() {
    let (mut driver, log) = probe();
    driver.start();
    said(&log);
    driver.write(0x70, 3);
    assert_eq!(driver.status(), 15);
    driver.write(0x70, 64);
    assert_eq!(driver.status(), 15, "only the device says so");
    driver.write(0x70, 15);
    assert!(said(&log).is_empty(), "the device is activated once");
}

#[test]
fn a_change_of_the_configuration_has_a_new_generation() {
    let (mut driver, _) = probe();
    driver.start();
    assert_eq!(driver.read(0xfc), 0);
    driver.device.lock().unwrap().config_changed();
    assert_eq!(driver.read(0xfc), 1);
    assert_eq!(driver.read(0x60), 2);
}

#[test]
fn a_loaded_device_goes_on_where_the_saved_one_was() {
    let (mut driver, _) = probe();
    driver.start();
    for _ in 0..5 {
        driver.add(0, &[(BUFFERS, 1, 0)]);
    }
    driver.notify(0);
    while driver.used(0).is_some() {}
    driver.add(0, &[(BUFFERS, 2, 0)]);
    let probe = Probe::default();
    let log = Arc::clone(&probe.log);
    let mut moved = driver.move_to(probe);
    assert_eq!((moved.status(), moved.read(0x60)), (15, 1));
    assert_eq!(*moved.line.edges.lock().unwrap(), 0, "nothing happens before it runs");
    moved.device.lock().unwrap().resume();
    assert_eq!(*moved.line.edges.lock().unwrap(), 1, "the interrupt that was open is raised again");
    moved.device.lock().unwrap().resume();
    assert_eq!(*moved.line.edges.lock().unwrap(), 1);
    moved.notify(0);
    assert_eq!(said(&log), ["activate 0x100000005", "0: 2 0"]);
    assert!(moved.used(0).is_some());
    assert_eq!(moved.used(0), None);
}

#[test]
fn states_that_can_not_be_are_refused() {
    let (mut driver, _) = probe();
    driver.start();
    let good = driver.device.lock().unwrap().save();
    let (other, _) = probe();
    let load = |bytes: &[u8]| other.device.lock().unwrap().load(bytes);
    assert_eq!(load(&[]), Err(LoadError::Format));
    assert_eq!(load(&good[..good.len() - 1]), Err(LoadError::Format));
    assert_eq!(load(&[&good[..], &[0]].concat()), Err(LoadError::Format));
    // Every byte wrong in every bit: refused or taken, without a panic; and what is taken can be used.
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            let (mut victim, _) = probe();
            if victim.device.lock().unwrap().load(&bytes).is_ok() {
                victim.rings.clone_from(&driver.rings);
                victim.device.lock().unwrap().resume();
                victim.add(0, &[(BUFFERS, 1, 0)]);
                victim.notify(0);
            }
        }
    }
    let rng = Driver::new(Rng::new());
    assert_eq!(rng.device.lock().unwrap().load(&good), Err(LoadError::OtherDevice));
    assert_eq!(load(&good), Ok(()));
}
