//! Connections to ports of a guest's workload, over the control channel: the guest needs no network for them.

use std::{
    fmt,
    io::{self, Cursor, Read},
    pin::Pin,
    str::FromStr,
    task::{Context, Poll, ready},
};

use guest_api::proto::{ForwardInput, ForwardOutput, forward_input::Input, forward_output::Output};
use hyper_util::client::legacy::connect::{Connected, Connection};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::PollSender;
use tonic::{Code, Status, Streaming};

use super::{GuestChannel, GuestError, STALL_LIMIT};

/// Bytes per message.
const CHUNK: usize = 32 * 1024;
/// Messages that may wait on their way to the port.
const WAITING: usize = 4;

/// Where in a guest a connection leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A port of the workload's loopback; not 0.
    Port(u16),
    /// The identity endpoint, as the one who may post.
    Identity,
}

impl Target {
    /// The endpoint as it is written where a port may stand.
    pub const IDENTITY: &'static str = "identity";
}

impl From<u16> for Target {
    fn from(port: u16) -> Self {
        Self::Port(port)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(formatter, "port {port}"),
            Self::Identity => formatter.write_str("the identity endpoint"),
        }
    }
}

impl FromStr for Target {
    type Err = NotATarget;

    fn from_str(text: &str) -> Result<Self, NotATarget> {
        if text == Self::IDENTITY {
            return Ok(Self::Identity);
        }
        let port = Some(text).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        port.and_then(|text| text.parse().ok()).filter(|port| *port != 0).map(Self::Port).ok_or(NotATarget)
    }
}

/// The text is no [`Target`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a port is a number from 1 to 65535, or the word identity")]
pub struct NotATarget;

/// A connection that a port of the workload has taken.
#[derive(Debug)]
pub struct PortStream {
    /// What goes to the port.
    pub sender: PortSender,
    /// What comes from it.
    pub receiver: PortReceiver,
}

/// The side to the port. Dropped without an [end](Self::end), the connection breaks off.
#[derive(Debug)]
pub struct PortSender(mpsc::Sender<ForwardInput>);

/// The side from the port. Dropped, the connection breaks off.
#[derive(Debug)]
pub struct PortReceiver {
    outputs: Streaming<ForwardOutput>,
    /// In use until here: nobody else may take it.
    _channel: GuestChannel,
}

fn message(input: Input) -> ForwardInput {
    ForwardInput { input: Some(input) }
}

fn closed() -> GuestError {
    GuestError::Transport("the sandbox closed the connection".into())
}

/// Why there is no connection.
fn not_connected(to: Target, status: Status) -> GuestError {
    match status.code() {
        Code::NotFound => GuestError::NoListener(to),
        Code::DeadlineExceeded => GuestError::NotTaken(to),
        Code::FailedPrecondition => GuestError::Held(super::clean(status.message())),
        _ => status.into(),
    }
}

impl GuestChannel {
    /// Connects to a port of the workload's loopback, or to the identity endpoint. Many connections share one channel.
    ///
    /// # Errors
    /// [`GuestError::NoListener`]; [`GuestError::Held`] while the workload does not run.
    pub async fn forward(&self, to: impl Into<Target>) -> Result<PortStream, GuestError> {
        let to = to.into();
        let (to_port, messages) = mpsc::channel(WAITING);
        let first = match to {
            Target::Port(port) => Input::Port(port.into()),
            Target::Identity => Input::Identity(true),
        };
        to_port.send(message(first)).await.map_err(|_| closed())?;
        let mut client = self.client.clone();
        let asked = timeout(STALL_LIMIT, client.forward(ReceiverStream::new(messages))).await;
        let from_port =
            asked.map_err(|_| GuestError::Stalled(STALL_LIMIT))?.map_err(|status| not_connected(to, status))?;
        let receiver = PortReceiver { outputs: from_port.into_inner(), _channel: self.clone() };
        Ok(PortStream { sender: PortSender(to_port), receiver })
    }
}

impl PortSender {
    /// Sends bytes; false if nobody takes them any more. What the port says may still come.
    pub async fn send(&self, bytes: Vec<u8>) -> bool {
        self.0.send(message(Input::Data(bytes))).await.is_ok()
    }

    /// Nothing more comes from this side.
    pub async fn end(self) {
        // The port may be gone already: then there is nobody to tell.
        let _ = self.0.send(message(Input::End(true))).await;
    }
}

impl PortReceiver {
    /// The next bytes; none once the port has ended its side.
    ///
    /// # Errors
    /// [`GuestError`] if the connection broke off.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, GuestError> {
        match self.outputs.message().await?.and_then(|message| message.output) {
            Some(Output::Data(bytes)) => Ok(Some(bytes)),
            Some(Output::End(_)) => Ok(None),
            None => Err(closed()),
        }
    }
}

impl PortStream {
    /// As one stream for libraries that want such: it is read and written, and shut down to end this side.
    #[must_use]
    pub fn into_io(self) -> PortIo {
        let PortReceiver { outputs, _channel } = self.receiver;
        PortIo {
            to_port: PollSender::new(self.sender.0),
            ended: false,
            outputs,
            piece: Cursor::default(),
            over: false,
            _channel,
        }
    }

    /// Moves bytes between the port and `local` until both have ended. An end of one side is passed on, and the other goes on.
    ///
    /// # Errors
    /// [`GuestError`] if a side broke off: the other one is to be broken off too.
    pub async fn relay(self, local: impl AsyncRead + AsyncWrite) -> Result<(), GuestError> {
        let Self { sender, mut receiver } = self;
        let (mut reading, mut writing) = tokio::io::split(local);
        let sending = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                let count = reading.read(&mut buffer).await?;
                if count == 0 {
                    sender.end().await;
                    return Ok(());
                }
                if !sender.send(buffer.get(..count).unwrap_or_default().to_vec()).await {
                    return Ok(());
                }
            }
        };
        let receiving = async {
            while let Some(bytes) = receiver.next().await? {
                writing.write_all(&bytes).await?;
                writing.flush().await?;
            }
            match writing.shutdown().await {
                // Its other side may have gone meanwhile.
                Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(GuestError::from(error)),
                _ => Ok(()),
            }
        };
        tokio::try_join!(sending, receiving).map(drop)
    }
}

/// A [`PortStream`] that is read and written. Dropped before it is shut down, the connection breaks off.
#[derive(Debug)]
pub struct PortIo {
    to_port: PollSender<ForwardInput>,
    /// Nothing more comes from this side.
    ended: bool,
    outputs: Streaming<ForwardOutput>,
    /// What came and was not read yet.
    piece: Cursor<Vec<u8>>,
    /// The port has ended its side.
    over: bool,
    _channel: GuestChannel,
}

fn broken(error: GuestError) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for PortIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let count = Read::read(&mut self.piece, buffer.initialize_unfilled())?;
            if count > 0 || self.over || buffer.remaining() == 0 {
                buffer.advance(count);
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut self.outputs).poll_next(context)) {
                Some(Ok(ForwardOutput { output: Some(Output::Data(bytes)) })) => self.piece = Cursor::new(bytes),
                Some(Ok(ForwardOutput { output: Some(Output::End(_)) })) => self.over = true,
                Some(Ok(ForwardOutput { output: None })) | None => return Poll::Ready(Err(broken(closed()))),
                Some(Err(status)) => return Poll::Ready(Err(broken(status.into()))),
            }
        }
    }
}

impl AsyncWrite for PortIo {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended || ready!(self.to_port.poll_reserve(context)).is_err() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let piece = bytes.get(..CHUNK).unwrap_or(bytes);
        let sent = self.to_port.send_item(message(Input::Data(piece.to_vec())));
        Poll::Ready(sent.map(|()| piece.len()).map_err(|_| io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The port may be gone already: then there is nobody to tell.
        if !self.ended && ready!(self.to_port.poll_reserve(context)).is_ok() {
            let _ = self.to_port.send_item(message(Input::End(true)));
        }
        self.ended = true;
        Poll::Ready(Ok(()))
    }
}

impl Connection for PortIo {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::Coded;

    #[test]
    fn n4_why_a_port_is_not_reached_is_told_apart() {
        let port = Target::Port(80);
        for (code, expected) in [
            (Code::NotFound, "port_closed"),
            (Code::DeadlineExceeded, "guest_timeout"),
            (Code::FailedPrecondition, "fork_busy"),
            (Code::Unavailable, "connection_failed"),
            (Code::InvalidArgument, "guest_refused"),
        ] {
            assert_eq!(not_connected(port, Status::new(code, "why")).code(), expected, "{code:?}");
        }
        // No time is named that nobody knows.
        let full = not_connected(port, Status::deadline_exceeded("why")).to_string();
        assert!(full.starts_with("port 80 of the sandbox does not take the connection"), "{full}");
        // One that is cut off later was not refused.
        assert_eq!(GuestError::from(Status::data_loss("it broke off")).code(), "connection_failed");
    }
}
