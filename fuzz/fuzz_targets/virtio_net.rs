//! The network card: a driver that does anything, and a network that sends and takes what it likes: frames, or a stream of any bytes.
#![no_main]

mod virtio_driver;

use std::{
    io::{Read, Write},
    os::unix::net::{UnixDatagram, UnixStream},
};

use libfuzzer_sys::fuzz_target;
use virtio_driver::{Driver, Step};
use vmm::virtio::{Cable, Net};

/// What the network does before the driver does its steps: sends frames of these lengths, and these bytes, which only a stream does not
/// take for a frame; takes this many.
type Network = (Vec<u16>, Vec<u8>, u8);

/// The other end of the card's cable.
enum Other {
    Frames(UnixDatagram),
    Stream(UnixStream),
}

impl Other {
    fn send(&mut self, frame: &[u8], raw: bool) {
        let _ = match self {
            Self::Frames(socket) => socket.send(frame).map(drop),
            Self::Stream(socket) if raw => socket.write_all(frame),
            Self::Stream(socket) => {
                let length = u32::try_from(frame.len()).expect("short").to_be_bytes();
                socket.write_all(&length).and_then(|()| socket.write_all(frame))
            }
        };
    }

    fn take(&mut self) {
        let mut bytes = [0; 4096];
        let _ = match self {
            Self::Frames(socket) => socket.recv(&mut bytes),
            Self::Stream(socket) => socket.read(&mut bytes),
        };
    }
}

fuzz_target!(|input: (bool, Vec<u8>, Vec<(Network, Vec<Step>)>)| {
    let (stream, saved, turns) = input;
    let (cable, mut network) = if stream {
        let (ours, network) = UnixStream::pair().expect("pair");
        network.set_nonblocking(true).expect("non-blocking");
        (Cable::Stream(ours.into()), Other::Stream(network))
    } else {
        let (ours, network) = UnixDatagram::pair().expect("pair");
        network.set_nonblocking(true).expect("non-blocking");
        (Cable::Tap(ours.into()), Other::Frames(network))
    };
    let mut driver = Driver::new(Box::new(Net::new(cable, [2, 0, 0, 0, 0, 1]).expect("card")));
    driver.load(&saved);
    for ((frames, raw, taken), steps) in turns.into_iter().take(32) {
        for length in frames.into_iter().take(16) {
            network.send(&vec![0x5a; usize::from(length)], false);
        }
        network.send(&raw, true);
        driver.run(steps);
        for _ in 0..taken {
            network.take();
        }
    }
});
