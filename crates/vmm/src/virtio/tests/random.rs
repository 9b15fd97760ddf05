//! Drivers that do anything, for a while: no panic, no hang, no allocation without bound.

use std::os::unix::net::{UnixListener, UnixStream};

use super::*;

/// A small generator, so that a failure can be repeated.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Mostly sensible, sometimes not.
    fn address(&mut self) -> u64 {
        match self.below(16) {
            0 => self.next(),
            1 => LOW_END - self.below(64),
            _ => BUFFERS + self.below(1 << 16),
        }
    }
}

fn torment(driver: &mut Driver, dice: &mut Dice, steps: usize) {
    for _ in 0..steps {
        match dice.below(32) {
            0 => driver.write(dice.below(64) * 4, dice.next() as u32),
            1 => driver.set_status(1 << dice.below(8)),
            2 => {
                let mut data = vec![0; dice.below(9) as usize];
                driver.device.lock().unwrap().read(dice.below(0x1100), &mut data);
                driver.device.lock().unwrap().write(dice.below(0x1100), &data);
            }
            3 => {
                let saved = driver.device.lock().unwrap().save();
                driver.device.lock().unwrap().load(&saved).unwrap();
                driver.device.lock().unwrap().resume();
            }
            _ => {
                let queues = driver.rings.len() as u64;
                let queue = dice.below(queues) as u16;
                let mut writes = 0;
                let buffers: Vec<_> = (0..1 + dice.below(3))
                    .map(|_| {
                        writes = if dice.below(3) == 0 { WRITE } else { writes };
                        let bytes = if dice.below(8) == 0 { dice.next() as u32 } else { dice.below(600) as u32 };
                        (dice.address(), bytes, writes)
                    })
                    .collect();
                // Something that begins like a request.
                let message = [0, 1, 2, 3, 4, 6, 7, 8][dice.below(8) as usize];
                driver.put(BUFFERS + dice.below(1 << 16), &[message, 0, 0, 0, dice.below(8) as u8, 0, 1, 0]);
                driver.add(queue, &buffers);
                driver.notify(queue);
            }
        }
        if driver.needs_reset() && dice.below(4) == 0 || !driver.device.lock().unwrap().is_active() {
            let rings: Vec<_> = driver.rings.values().cloned().collect();
            for ring in rings {
                driver.put(ring.base, &[0; 0x10000]);
            }
            driver.start();
        }
    }
}

#[test]
fn drivers_that_do_anything_break_nothing() {
    for seed in 1..=20 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut disk = Driver::new(Block::new(file, "disk").unwrap());
        disk.start();
        torment(&mut disk, &mut dice, 1000);
        let mut rng = Driver::new(Rng::new());
        rng.start();
        torment(&mut rng, &mut dice, 1000);
    }
}

#[test]
fn hosts_and_drivers_that_do_anything_break_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for seed in 1..=10 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let path = directory.path().join(format!("{seed}"));
        let listener = UnixListener::bind(&path).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut driver = Driver::new(Console::offshoot(writer.into(), vec![listener]).unwrap());
        driver.start();
        let _events = driver.events();
        for _ in 0..20 {
            let host = UnixStream::connect(&path).unwrap();
            host.set_nonblocking(true).unwrap();
            let _ = io::Write::write(&mut &host, &vec![1; dice.below(100_000) as usize]);
            torment(&mut driver, &mut dice, 50);
            let _ = io::Read::read(&mut &host, &mut vec![0; dice.below(100_000) as usize]);
        }
        drop(reader);
        torment(&mut driver, &mut dice, 50);
    }
}
