//! The transport: registers, status, queues, and saved states of foreign origin.
#![no_main]

mod virtio_driver;

use libfuzzer_sys::fuzz_target;
use virtio_driver::{Driver, Step};
use vmm::virtio::Rng;

fuzz_target!(|input: (Vec<u8>, Vec<Step>)| {
    let (saved, steps) = input;
    let mut driver = Driver::new(Box::new(Rng::new()));
    driver.load(&saved);
    driver.run(steps);
});
