//! A client's connection. It keeps its seat until it is closed, whatever has become of it, and breaks off if its client does not take what it is
//! sent.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep},
};

/// Time in which a client takes at least something of its answer. Anybody can ask for one and not read it.
pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub(crate) struct Wire<S> {
    stream: S,
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
    patience: Patience,
    _seat: OwnedSemaphorePermit,
}

/// Ends the limit: a WebSocket is of somebody who is known, and may stand still for as long as they like.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patience(Arc<AtomicBool>);

impl Patience {
    pub(crate) fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<S> Wire<S> {
    pub(crate) fn new(stream: S, seat: OwnedSemaphorePermit, limit: Duration) -> Self {
        Self { stream, limit, stalled: None, patience: Patience::default(), _seat: seat }
    }

    pub(crate) fn patience(&self) -> Patience {
        self.patience.clone()
    }

    /// What became of a write, unless the client has stalled for too long.
    fn timed<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() || self.patience.0.load(Ordering::Relaxed) {
            self.stalled = None;
            return written;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        stalled.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.timed(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.timed(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.timed(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.timed(context, shut)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Semaphore,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn o1_a_client_that_does_not_read_is_sent_away_and_its_seat_is_free() {
        let seats = Arc::new(Semaphore::new(2));
        let wire = || {
            let (ours, theirs) = tokio::io::duplex(64);
            (Wire::new(ours, Arc::clone(&seats).try_acquire_owned().unwrap(), LIMIT), theirs)
        };
        let (mut stalled, _theirs) = wire();
        assert_eq!(stalled.write_all(&[0; 65]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);

        // One who reads, however little at a time, is not.
        let (mut slow, mut theirs) = wire();
        let reading = async {
            for _ in 0..4 {
                sleep(LIMIT / 2).await;
                let _ = theirs.read_exact(&mut [0; 64]).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(slow.write_all(&[0; 256]), reading);
        written.unwrap();
        assert_eq!(seats.available_permits(), 0);
        drop((stalled, slow));
        assert_eq!(seats.available_permits(), 2);
    }

    #[tokio::test]
    async fn a_websocket_may_stand_still() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut wire = Wire::new(ours, Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(), LIMIT);
        wire.patience().begin();
        let reading = async {
            sleep(LIMIT * 4).await;
            let _ = theirs.read_exact(&mut [0; 65]).await.unwrap();
        };
        let (written, ()) = tokio::join!(wire.write_all(&[0; 65]), reading);
        written.unwrap();
    }
}
