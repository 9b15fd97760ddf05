//! Requests for random bytes.
#![no_main]

mod virtio_driver;

use libfuzzer_sys::fuzz_target;
use virtio_driver::{Driver, Step};
use vmm::virtio::Rng;

fuzz_target!(|steps: Vec<Step>| Driver::new(Box::new(Rng::new())).run(steps));
