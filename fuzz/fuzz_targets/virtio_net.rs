//! The network card: a driver that does anything, frames from a network that sends and takes what it likes.
#![no_main]

mod virtio_driver;

use std::os::unix::net::UnixDatagram;

use libfuzzer_sys::fuzz_target;
use virtio_driver::{Driver, Step};
use vmm::virtio::Net;

/// What the network does before the driver does its steps: sends frames of these lengths, takes this many.
type Network = (Vec<u16>, u8);

fuzz_target!(|input: (Vec<u8>, Vec<(Network, Vec<Step>)>)| {
    let (saved, turns) = input;
    let (ours, network) = UnixDatagram::pair().expect("pair");
    network.set_nonblocking(true).expect("non-blocking");
    let mut driver = Driver::new(Box::new(Net::new(ours.into(), [2, 0, 0, 0, 0, 1]).expect("card")));
    driver.load(&saved);
    for ((frames, taken), steps) in turns.into_iter().take(32) {
        for length in frames.into_iter().take(16) {
            let _ = network.send(&vec![0x5a; usize::from(length)]);
        }
        driver.run(steps);
        for _ in 0..taken {
            let _ = network.recv(&mut [0; 4096]);
        }
    }
});
