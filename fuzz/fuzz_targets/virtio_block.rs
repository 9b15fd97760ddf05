//! Requests to the disk. Whatever is asked, the image stays as it is.
#![no_main]

mod virtio_driver;

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    sync::LazyLock,
};

use libfuzzer_sys::fuzz_target;
use virtio_driver::{Driver, Step};
use vmm::virtio::Block;

static IMAGE: LazyLock<File> = LazyLock::new(|| {
    let mut file = File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd"));
    file.write_all(&[7; 16 << 10]).expect("write");
    file
});

fuzz_target!(|steps: Vec<Step>| {
    let image = IMAGE.try_clone().expect("clone");
    Driver::new(Box::new(Block::new(image, "fuzz").expect("disk"))).run(steps);
    let mut bytes = Vec::new();
    (&*IMAGE).seek(SeekFrom::Start(0)).expect("seek");
    (&*IMAGE).read_to_end(&mut bytes).expect("read");
    assert!(bytes == [7; 16 << 10]);
});
