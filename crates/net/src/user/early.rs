//! What a guest sent before its network was started.
//!
//! A machine is captured with its card down. Should a packet of the template nevertheless have waited in the card's queue, the fork's machine
//! sends it when it runs, and it would be delivered late, as the fork's. Such a packet has the template's MAC address: a fork has its
//! own before it acknowledges. So everything up to the last frame that is not from the fork's own address is dropped, and
//! what comes behind it stays: a fork's first connection need not wait for its second attempt.
//!
//! If there was a second attempt already, the first one is dropped, with what came before it: Debian 12's passt, which finds both at once, takes
//! them for two connections with the same addresses and ports, and then looks for one of them without end.

use std::{
    collections::HashMap,
    io,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use identity::MacAddress;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionread},
    net::{RecvFlags, recv},
};

/// The bytes of the length before each frame.
const LENGTH: usize = 4;
/// Ethernet's header: destination, source, type.
const HEADER: usize = 14;
/// The longest frame of the stream, in bytes: what passt and QEMU take.
const MAX_FRAME: usize = 65_535 + HEADER + 4;

/// If so much waits, the socket may have been full (at 208 KiB with all that the kernel counts, of which a frame of 1500 bytes is two thirds) and
/// more frames of the same age wait in the guest. Nothing of it is kept then.
const MAY_BE_FULL: usize = 64 * 1024;
/// More than a card's queues hold (at most 1024 frames of 1514 bytes). Who sent so much since sends now.
const MOST: usize = 4 << 20;
/// How long a guest whose socket was full has to send on.
const PAUSE: Duration = Duration::from_millis(20);
/// How long all of this may take.
const LIMIT: Duration = Duration::from_millis(500);

/// Drops what was not sent from `own`, and what was sent before that.
///
/// # Errors
/// The socket's; `UnexpectedEof` if the machine has closed its end; `InvalidData` if what comes is no stream of frames.
pub(super) fn drop_others(socket: BorrowedFd<'_>, own: MacAddress) -> io::Result<()> {
    let deadline = Instant::now() + LIMIT;
    if is(PollFlags::HUP, socket, Duration::ZERO)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let waiting = usize::try_from(ioctl_fionread(socket)?).unwrap_or(usize::MAX);
    if waiting >= MAY_BE_FULL {
        return drop_all(socket, deadline);
    }
    let mut bytes = vec![0; waiting];
    if waiting > 0 {
        let (length, _) = recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        bytes.truncate(length);
    }
    let mut rest = end_of_the_unwanted(&bytes, own)?;
    // The end of the last one may not be here yet.
    while rest > 0 {
        rest -= read(socket, &mut vec![0; rest.min(MAX_FRAME)], deadline)?;
    }
    Ok(())
}

/// Where the last frame ends that is not from `own`, or that begins a connection which a later one begins again. It may be behind the end of `bytes`.
fn end_of_the_unwanted(bytes: &[u8], own: MacAddress) -> io::Result<usize> {
    let (mut at, mut end) = (0, 0);
    let mut begun = HashMap::new();
    while let Some(length) = bytes.get(at..).and_then(|rest| rest.first_chunk::<LENGTH>()) {
        let length = frame_length(*length)?;
        let frame = &bytes[at + LENGTH..];
        let frame = &frame[..length.min(frame.len())];
        at += LENGTH + length;
        // A frame of which not even the source is here is taken for another's.
        if length < HEADER || frame.get(6..12) != Some(&own.octets()) {
            end = at;
        }
        if let Some(connection) = begins(frame)
            && let Some(before) = begun.insert(connection, at)
        {
            end = end.max(before);
        }
    }
    Ok(end)
}

/// The connection that a frame begins: its addresses and ports, as they stand there. `None` if it is no first packet of TCP, or not all of it is here.
fn begins(frame: &[u8]) -> Option<(&[u8], &[u8])> {
    const TCP: u8 = 6;
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let (kind, packet) = (frame.get(12..HEADER)?, &frame[HEADER..]);
    let (addresses, segment) = match *kind {
        [0x08, 0x00] if *packet.get(9)? == TCP => {
            (packet.get(12..20)?, packet.get(usize::from(packet[0] & 0x0f) * 4..)?)
        }
        [0x86, 0xdd] if *packet.get(6)? == TCP => (packet.get(8..40)?, packet.get(40..)?),
        _ => return None,
    };
    (segment.get(13)? & (SYN | ACK) == SYN).then(|| (addresses, &segment[..4]))
}

fn frame_length(bytes: [u8; LENGTH]) -> io::Result<usize> {
    let length = usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX);
    if length > MAX_FRAME { Err(io::ErrorKind::InvalidData.into()) } else { Ok(length) }
}

/// Drops frames until none has come for a while, or as many as there can have been.
fn drop_all(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    let mut dropped = 0;
    let mut frame = vec![0; MAX_FRAME];
    while dropped < MOST && Instant::now() + PAUSE < deadline {
        if !is(PollFlags::IN, socket, PAUSE)? {
            return Ok(());
        }
        let mut length = [0; LENGTH];
        read_all(socket, &mut length, deadline)?;
        let length = frame_length(length)?;
        read_all(socket, &mut frame[..length], deadline)?;
        dropped += LENGTH + length;
    }
    Ok(())
}

fn read_all(socket: BorrowedFd<'_>, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let length = read(socket, bytes, deadline)?;
        bytes = &mut bytes[length..];
    }
    Ok(())
}

fn read(socket: BorrowedFd<'_>, bytes: &mut [u8], deadline: Instant) -> io::Result<usize> {
    loop {
        match recv(socket, &mut *bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((length, _)) => return Ok(length),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !is(PollFlags::IN, socket, left)? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether the socket becomes so within `limit`. It may be hung up in any case.
fn is(so: PollFlags, socket: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    loop {
        let mut waiting = [PollFd::from_borrowed_fd(socket, so)];
        match poll(&mut waiting, Some(&limit)) {
            Ok(_) => return Ok(waiting[0].revents().contains(so)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
        thread,
    };

    use proptest::prelude::*;

    use super::*;

    const OWN: MacAddress = MacAddress::local([2, 1, 1, 1, 1, 1]);
    const OTHER: MacAddress = MacAddress::local([2, 1, 1, 1, 1, 2]);

    fn frame(source: MacAddress, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap().to_be_bytes();
        [&length[..], &[0xff; 6], &source.octets(), &[8, 0], payload].concat()
    }

    /// What is left of what was sent.
    fn left_of(sent: &[u8]) -> Vec<u8> {
        let (mut machine, mut passt) = UnixStream::pair().unwrap();
        machine.write_all(sent).unwrap();
        drop_others(passt.as_fd(), OWN).unwrap();
        drop(machine);
        let mut left = Vec::new();
        passt.read_to_end(&mut left).unwrap();
        left
    }

    #[test]
    fn n3_frames_of_the_template_are_dropped_and_those_of_the_fork_behind_them_stay() {
        let (own, other) = (frame(OWN, b"own"), frame(OTHER, b"other"));
        assert!(left_of(&[]).is_empty());
        assert_eq!(left_of(&own), own);
        assert!(left_of(&other).is_empty());
        assert_eq!(left_of(&[&own[..], &own].concat()), [&own[..], &own].concat());
        assert_eq!(left_of(&[&other[..], &other, &own].concat()), own);
        assert_eq!(left_of(&[&own[..], &other, &own].concat()), own);
        // Too short for a source.
        assert_eq!(left_of(&[&[0, 0, 0, 2, 7, 7], &own[..]].concat()), own);
    }

    /// The first packet of a connection, or one with other flags.
    fn segment(v6: bool, port: u8, flags: u8) -> Vec<u8> {
        let mut tcp = [0; 20];
        (tcp[1], tcp[3], tcp[13]) = (port, 80, flags);
        let payload = if v6 {
            let mut header = [0x60; 40];
            header[6] = 6;
            [&header[..], &tcp].concat()
        } else {
            let mut header = [0x45; 20];
            header[9] = 6;
            [&header[..], &tcp].concat()
        };
        let mut frame = frame(OWN, &payload);
        if v6 {
            frame[LENGTH + 12..LENGTH + HEADER].copy_from_slice(&[0x86, 0xdd]);
        }
        frame
    }

    #[test]
    fn of_connections_that_were_begun_twice_only_the_last_attempt_stays() {
        for v6 in [false, true] {
            let [first, other, more] = [segment(v6, 1, 2), segment(v6, 2, 2), segment(v6, 1, 16)];
            let different = [&first[..], &other, &more].concat();
            assert_eq!(left_of(&different), different, "these are not the same");
            assert_eq!(left_of(&[&other[..], &first, &more, &first].concat()), [&more[..], &first].concat());
            assert_eq!(left_of(&[&first[..], &other, &first, &other].concat()), [&first[..], &other].concat());
        }
        // What ends in the middle of a header is not looked at.
        for length in 0..60 {
            let mut cut = segment(true, 1, 2)[..LENGTH + HEADER + length].to_vec();
            cut[..LENGTH].copy_from_slice(&u32::try_from(HEADER + length).unwrap().to_be_bytes());
            let _ = left_of(&cut.repeat(2));
        }
    }

    #[test]
    fn n3_a_frame_that_is_half_here_is_waited_for() {
        let (mut machine, mut passt) = UnixStream::pair().unwrap();
        let (own, other) = (frame(OWN, b"own"), frame(OTHER, &[7; 1000]));
        let (first, second) = other.split_at(9);
        machine.write_all(first).unwrap();
        thread::scope(|scope| {
            let dropped = scope.spawn(|| drop_others(passt.as_fd(), OWN));
            machine.write_all(second).unwrap();
            machine.write_all(&own).unwrap();
            dropped.join().unwrap().unwrap();
        });
        drop(machine);
        let mut left = Vec::new();
        passt.read_to_end(&mut left).unwrap();
        assert_eq!(left, own);
    }

    #[test]
    fn n3_a_socket_that_was_full_is_emptied_with_what_the_guest_still_held_back() {
        let (mut machine, passt) = UnixStream::pair().unwrap();
        let flood = frame(OTHER, &[7; 1500]).repeat(600);
        thread::scope(|scope| {
            let sender = scope.spawn(|| machine.write_all(&flood));
            while usize::try_from(ioctl_fionread(passt.as_fd()).unwrap()).unwrap() < MAY_BE_FULL {
                thread::yield_now();
            }
            drop_others(passt.as_fd(), OWN).unwrap();
            sender.join().unwrap().unwrap();
        });
        assert_eq!(ioctl_fionread(passt.as_fd()).unwrap(), 0);
    }

    #[test]
    fn a_machine_that_is_gone_is_an_error_whatever_it_sent() {
        let (mut machine, passt) = UnixStream::pair().unwrap();
        machine.write_all(&frame(OWN, b"own")).unwrap();
        drop(machine);
        assert_eq!(drop_others(passt.as_fd(), OWN).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_stream_of_frames_is_an_error_and_not_waited_for() {
        for sent in [&[0xff; 20][..], &[0, 1, 0, 50, 7]] {
            let (mut machine, passt) = UnixStream::pair().unwrap();
            machine.write_all(sent).unwrap();
            assert!(drop_others(passt.as_fd(), OWN).is_err(), "{sent:?}");
        }
    }

    proptest! {
        #[test]
        fn only_whole_frames_are_dropped(frames in proptest::collection::vec((any::<bool>(), 0_usize..60), 0..12)) {
            let all: Vec<_> = frames.iter().map(|&(own, length)| frame(if own { OWN } else { OTHER }, &vec![7; length])).collect();
            let keep = frames.iter().rposition(|(own, _)| !own).map_or(0, |at| at + 1);
            prop_assert_eq!(left_of(&all.concat()), all[keep..].concat());
        }
    }
}
