//! The tap: the card's other side, as a file that frames are read from and written to.
#![allow(unsafe_code)]

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    thread,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl, opcode};
use serde::{Deserialize, Serialize};

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
#[derive(Debug)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40, "struct ifreq has 40 bytes on 64-bit Linux");

// include/uapi/linux/if_tun.h. The size in each number is that of an int, whatever is passed.
const TUNSETIFF: Opcode = opcode::write::<u32>(b'T', 202);
const TUNSETPERSIST: Opcode = opcode::write::<u32>(b'T', 203);
const TUNSETOWNER: Opcode = opcode::write::<u32>(b'T', 204);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<u32>(b'T', 216);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

const _: () = assert!(TUNSETIFF == 0x4004_54ca, "_IOW('T', 202, int)");

/// Time for a tap that nobody needs any more to be closed; from fork to exec a process takes a few milliseconds on a busy machine.
const CLOSING_LIMIT: Duration = Duration::from_secs(1);
const CLOSING_PAUSE: Duration = Duration::from_millis(1);

/// The virtio header with the number of buffers (`struct virtio_net_hdr_mrg_rxbuf`), which is what virtio 1 always has.
const VNET_HEADER: u32 = 12;

/// How a tap is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapOptions {
    /// The user who may open it without further privilege.
    pub owner: u32,
    /// Whether each frame begins with a virtio header of 12 bytes (so that checksums and cutting can be left to the host).
    pub vnet_header: bool,
}

/// Makes a tap in the thread's namespace, which stays until it is removed or the namespace ends.
pub(crate) fn make(name: &str, options: TapOptions) -> io::Result<()> {
    let tap = attach(name, options)?;
    let number = |value: u32| value as usize;
    // SAFETY: the kernel takes the user's id as the argument itself.
    unsafe { ioctl(&tap, IntegerSetter::<TUNSETOWNER>::new_usize(number(options.owner))) }?;
    // SAFETY: the kernel takes the truth value as the argument itself.
    unsafe { ioctl(&tap, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }?;
    Ok(())
}

/// The same, for a tap that may be closing: a process that another thread has just forked holds every descriptor of this one until it
/// executes its program.
pub(crate) fn attach_patiently(name: &str, options: TapOptions) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + CLOSING_LIMIT;
    loop {
        match attach(name, options) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(CLOSING_PAUSE);
            }
            other => return other,
        }
    }
}

/// Opens the tap of this name in the thread's namespace; makes one that ends with the file if there is none.
///
/// # Errors
/// `ResourceBusy` if it is open already: a tap has one reader.
pub(crate) fn attach(name: &str, options: TapOptions) -> io::Result<OwnedFd> {
    let tap: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/net/tun")?
        .into();
    let header = if options.vnet_header { IFF_VNET_HDR } else { 0 };
    let mut request = InterfaceRequest { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | header, rest: [0; 22] };
    // The last byte stays NUL.
    let room = &mut request.name[..15];
    room.get_mut(..name.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads a struct ifreq, which is what it is given.
    unsafe { ioctl(tap.as_fd(), Setter::<TUNSETIFF, InterfaceRequest>::new(request)) }?;
    if options.vnet_header {
        // SAFETY: TUNSETVNETHDRSZ reads an int, which is what it is given.
        unsafe { ioctl(tap.as_fd(), Setter::<TUNSETVNETHDRSZ, u32>::new(VNET_HEADER)) }?;
    }
    Ok(tap)
}
