//! The serial ports: a driver that does anything, hosts that come, talk and go.
#![no_main]

mod virtio_driver;

use std::{
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

use libfuzzer_sys::fuzz_target;
use virtio_driver::{Driver, Step};
use vmm::virtio::Console;

/// What a host does before the driver does its steps: sends bytes, reads bytes, stays.
type Host = (Vec<u8>, u16, bool);

fuzz_target!(|input: (Vec<u8>, Vec<(Host, Vec<Step>)>)| {
    let (saved, turns) = input;
    // A Rust program's start does this, and libFuzzer's main is none: a host that is gone must be an error, not a signal.
    // SAFETY: to ignore a signal is always allowed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // An abstract name: nothing is left in the file system.
    let address = SocketAddr::from_abstract_name(format!("offshoot-fuzz-{}", std::process::id())).expect("name");
    let listener = UnixListener::bind_addr(&address).expect("bind");
    let (ack, writer) = std::io::pipe().expect("pipe");
    let mut driver = Driver::new(Box::new(Console::offshoot(writer.into(), vec![listener]).expect("console")));
    driver.load(&saved);
    let mut hosts = Vec::new();
    for ((bytes, reads, stays), steps) in turns.into_iter().take(32) {
        let mut host = UnixStream::connect_addr(&address).expect("connect");
        host.set_nonblocking(true).expect("non-blocking");
        let _ = host.write(&bytes);
        driver.run(steps);
        let _ = host.read(&mut vec![0; usize::from(reads)]);
        if stays {
            hosts.push(host);
        }
    }
    drop(ack);
    driver.run(vec![Step::Requested, Step::Again, Step::Requested]);
});
