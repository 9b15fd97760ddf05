//! The host's side: one session as a byte stream.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::UnixStream,
    time::timeout,
};

use super::{Decoder, Frame, Kind, MAX_PAYLOAD, encode};

/// How long an answer to a `Hello` is awaited before it is sent again. The guest answers each.
const AGAIN: Duration = Duration::from_millis(1000);

/// Bytes that are taken from the socket at once.
const READ: usize = 64 * 1024;

/// Encoded bytes that may wait for the socket before a write has to wait too.
const WAITING: usize = 64 * 1024;

/// An open session, from the host's side. It ends when either side ends it, or the socket does; dropping it tells the
/// guest, as far as the socket takes that at once.
///
/// It reads only when it is read, so a slow user stops the guest, and nothing is held but what one read of the socket
/// brought.
#[derive(Debug)]
pub struct Session {
    socket: UnixStream,
    number: u64,
    decoder: Decoder,
    /// Received and not yet handed on; of the first, [`Self::taken`] bytes already are.
    received: VecDeque<Frame>,
    taken: usize,
    buffer: Box<[u8]>,
    /// Encoded and not yet sent; of these, [`Self::sent`] bytes already are.
    waiting: Vec<u8>,
    sent: usize,
    /// The guest's side is over.
    ended: bool,
    /// This side is over.
    closed: bool,
}

/// Opens a session from the host's side. `number` must be fresh and random.
///
/// # Errors
/// `TimedOut` if the guest does not answer within `limit`; else what the socket says.
pub async fn connect(socket: UnixStream, number: u64, limit: Duration) -> io::Result<Session> {
    let mut session = Session {
        socket,
        number,
        decoder: Decoder::default(),
        received: VecDeque::new(),
        taken: 0,
        buffer: vec![0; READ].into_boxed_slice(),
        waiting: Vec::new(),
        sent: 0,
        ended: false,
        closed: false,
    };
    timeout(limit, session.hello()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(session)
}

impl Session {
    async fn hello(&mut self) -> io::Result<()> {
        let mut hello = Vec::new();
        encode(Kind::Hello, self.number, &[], &mut hello);
        self.socket.write_all(&hello).await?;
        let mut answered = false;
        while !answered {
            let Ok(count) = timeout(AGAIN, self.socket.read(&mut self.buffer)).await else {
                // An answer can be lost while the guest's driver has not heard yet that we are there.
                self.socket.write_all(&hello).await?;
                continue;
            };
            let count = count?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (number, received) = (self.number, &mut self.received);
            self.decoder.push(&self.buffer[..count], |frame| {
                // Before the answer everything is left over from another session, or a guest that wants our memory.
                if frame.session == number && answered {
                    received.push_back(frame);
                } else if frame.session == number && frame.kind == Kind::HelloAck {
                    answered = true;
                }
            });
        }
        Ok(())
    }

    /// Sends what waits.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.waiting.len() {
            let count = ready!(Pin::new(&mut self.socket).poll_write(context, &self.waiting[self.sent..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += count;
        }
        self.waiting.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Hands on received bytes; false if there are none.
    fn take(&mut self, into: &mut ReadBuf<'_>) -> bool {
        while let Some(frame) = self.received.front() {
            if frame.kind == Kind::Close {
                self.ended = true;
                self.received.clear();
                return false;
            }
            let rest = if frame.kind == Kind::Data { &frame.payload[self.taken..] } else { &[] };
            let count = rest.len().min(into.remaining());
            into.put_slice(&rest[..count]);
            self.taken += count;
            if count == rest.len() {
                self.received.pop_front();
                self.taken = 0;
            }
            if count > 0 {
                return true;
            }
        }
        false
    }
}

impl AsyncRead for Session {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if into.remaining() == 0 || this.take(into) || this.ended {
                return Poll::Ready(Ok(()));
            }
            let mut buffer = ReadBuf::new(&mut this.buffer);
            ready!(Pin::new(&mut this.socket).poll_read(context, &mut buffer))?;
            this.ended = buffer.filled().is_empty();
            let (number, received) = (this.number, &mut this.received);
            this.decoder.push(buffer.filled(), |frame| {
                if frame.session == number {
                    received.push_back(frame);
                }
            });
        }
    }
}

impl AsyncWrite for Session {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.ended || this.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.waiting.len() - this.sent >= WAITING {
            ready!(this.poll_drain(context))?;
        }
        let bytes = &bytes[..bytes.len().min(MAX_PAYLOAD)];
        encode(Kind::Data, this.number, bytes, &mut this.waiting);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.closed && !this.ended {
            this.closed = true;
            encode(Kind::Close, this.number, &[], &mut this.waiting);
        }
        this.poll_drain(context)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.closed {
            encode(Kind::Close, self.number, &[], &mut self.waiting);
        }
        // What does not go out now never does: the guest then hears of our end from the port, or from the next session.
        let _ = self.socket.try_write(&self.waiting[self.sent..]);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn on_runtime<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
    }

    fn frames(list: &[(Kind, u64, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, session, payload) in list {
            encode(*kind, *session, payload, &mut bytes);
        }
        bytes
    }

    /// A session with the guest's end of its socket, after the guest has sent `before`, its answer, and `after`.
    async fn opened(before: &[u8], after: &[u8]) -> (Session, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(before).await.unwrap();
        theirs.write_all(&frames(&[(Kind::HelloAck, 7, b"")])).await.unwrap();
        theirs.write_all(after).await.unwrap();
        (connect(ours, 7, SECOND).await.unwrap(), theirs)
    }

    #[test]
    fn what_another_session_left_is_not_read() {
        on_runtime(async {
            let stale = frames(&[(Kind::Data, 6, b"stale"), (Kind::HelloAck, 6, b""), (Kind::Data, 7, b"guessed")]);
            let fresh = frames(&[(Kind::Data, 6, b"late"), (Kind::Data, 7, b"one"), (Kind::Data, 7, b"")]);
            let (mut session, mut theirs) = opened(&stale[3..], &fresh).await;
            theirs.write_all(&frames(&[(Kind::Data, 7, b"two"), (Kind::Close, 7, b"")])).await.unwrap();
            let mut text = String::new();
            session.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "onetwo");
            assert_eq!(session.write_all(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        });
    }

    #[test]
    fn no_answer_is_a_timeout_and_no_guest_is_an_end() {
        on_runtime(async {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let error = connect(ours, 7, Duration::from_millis(20)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let (ours, theirs) = UnixStream::pair().unwrap();
            drop(theirs);
            assert!(connect(ours, 7, SECOND).await.is_err());
        });
    }

    #[test]
    fn a_guest_that_talks_before_it_answers_gets_no_memory() {
        on_runtime(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let flood = tokio::spawn(async move {
                let chunk = frames(&[(Kind::Data, 7, &[1; MAX_PAYLOAD])]);
                while theirs.write_all(&chunk).await.is_ok() {}
            });
            let mut session = Session {
                socket: ours,
                number: 7,
                decoder: Decoder::default(),
                received: VecDeque::new(),
                taken: 0,
                buffer: vec![0; READ].into_boxed_slice(),
                waiting: Vec::new(),
                sent: 0,
                ended: false,
                closed: false,
            };
            assert!(timeout(Duration::from_millis(100), session.hello()).await.is_err());
            assert!(session.received.is_empty());
            flood.abort();
        });
    }

    #[test]
    fn a_slow_guest_stops_the_writer_and_a_drop_says_close() {
        on_runtime(async {
            let (mut session, mut theirs) = opened(b"", b"").await;
            let mut written = 0;
            while let Ok(count) = timeout(Duration::from_millis(50), session.write(&[0x7E; MAX_PAYLOAD])).await {
                written += count.unwrap();
                assert!(written < 4 << 20, "nothing stops the writer");
            }
            assert!(session.waiting.capacity() < 8 * WAITING);
            let mut seen = 0;
            let reader = async {
                let mut decoder = Decoder::default();
                let mut buffer = vec![0; READ];
                let mut closed = false;
                while let Ok(count @ 1..) = theirs.read(&mut buffer).await {
                    decoder.push(&buffer[..count], |frame| {
                        seen += frame.payload.len();
                        closed |= frame.kind == Kind::Close;
                    });
                }
                closed
            };
            let (closed, ()) = tokio::join!(reader, async move {
                session.flush().await.unwrap();
                drop(session);
            });
            assert!(closed);
            assert_eq!(seen, written);
        });
    }
}
