//! Servers of the world outside.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, poll};

use crate::world::Place;

/// A client that does not go on is left alone.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a DNS message before its question (RFC 1035, section 4.1.1).
const DNS_HEADER: usize = 12;

/// A server, until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers every request for a page with `SERVER CLIENT`: the address that was asked for, and by whom.
    #[must_use]
    pub fn http(place: &Place) -> Self {
        let any = |address| TcpListener::bind((address, 80));
        let listener = place.within(|| {
            any(std::net::IpAddr::from(Ipv6Addr::UNSPECIFIED)).or_else(|_| any(Ipv4Addr::UNSPECIFIED.into()))
        });
        let listener = listener.expect("port 80 is free in a namespace of our own");
        Self::start(move |stop| {
            while is_ready(listener.as_fd(), stop) {
                // A client that went away is no failure of the server's.
                let _ = listener.accept().and_then(|(stream, from)| answer_page(stream, from));
            }
        })
    }

    /// Knows one name, and its IPv4 address.
    #[must_use]
    pub fn dns(place: &Place, name: &str, address: Ipv4Addr) -> Self {
        let socket = place.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)));
        let socket = socket.expect("port 53 is free in a namespace of our own");
        let mut question = Vec::new();
        for label in name.split('.') {
            question.push(u8::try_from(label.len()).expect("a label is short"));
            question.extend(label.bytes());
        }
        question.push(0);
        Self::start(move |stop| {
            let mut buffer = [0; 512];
            while is_ready(socket.as_fd(), stop) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                if let Some(reply) = dns_reply(&buffer[..length], &question, address) {
                    let _ = socket.send_to(&reply, from);
                }
            }
        })
    }

    fn start(serve: impl FnOnce(BorrowedFd<'_>) + Send + 'static) -> Self {
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        let thread = thread::spawn(move || serve(there.as_fd()));
        Self { stop: Some(here), thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for a client; false when the server is to stop.
pub(crate) fn is_ready(socket: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> bool {
    let mut both = [PollFd::from_borrowed_fd(socket, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    loop {
        match poll(&mut both, None) {
            Err(rustix::io::Errno::INTR) => {}
            polled => {
                polled.expect("sockets can be polled");
                return both[1].revents().is_empty();
            }
        }
    }
}

fn answer_page(mut stream: TcpStream, from: SocketAddr) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && request.len() < 4096 {
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let body = format!("{} {}\n", stream.local_addr()?.ip().to_canonical(), from.ip().to_canonical());
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// One answer to one question for an address; for another name, that there is none of it.
fn dns_reply(query: &[u8], name: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let after = query.get(DNS_HEADER..)?;
    let end = after.iter().position(|&byte| byte == 0)? + 1;
    let question = after.get(..end + 4)?;
    let known = question[..end] == *name;
    let is_a = question[end..end + 2] == [0, 1];
    // An answer to a question that may be repeated; 3: there is no such name.
    let mut reply =
        [&query[..2], &[0x85, if known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(known && is_a), 0, 0, 0, 0]].concat();
    reply.extend(question);
    if known && is_a {
        // The name of the question, an address of the internet, good for no time.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}
