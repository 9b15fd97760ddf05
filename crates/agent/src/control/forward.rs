//! Forward: a connection to a port of the workload's loopback, its bytes streamed both ways.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use guest_api::proto::{ForwardInput, ForwardOutput, forward_input::Input, forward_output::Output};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tonic::{Status, Streaming};

use crate::{
    endpoint::{self, Caller},
    state::AgentState,
};

/// Bytes per message.
const CHUNK: usize = 16 * 1024;
/// Messages that may wait; a slow reader stops its own connection, and fills no memory.
const WAITING: usize = 4;
/// Time for a port to take a connection: at once, unless its queue is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

type Replies = mpsc::Sender<Result<ForwardOutput, Status>>;

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destination {
    /// A port of the workload's loopback.
    Port(u16),
    /// The identity endpoint.
    Identity,
}

/// What the first message names.
pub(super) async fn destination(input: &mut Streaming<ForwardInput>) -> Result<Destination, Status> {
    let destination = match input.message().await?.and_then(|message| message.input) {
        Some(Input::Port(port)) => u16::try_from(port).ok().filter(|port| *port != 0).map(Destination::Port),
        Some(Input::Identity(true)) => Some(Destination::Identity),
        _ => None,
    };
    destination.ok_or_else(|| Status::invalid_argument("the first message must be a port, 1 to 65535, or identity"))
}

/// Connects.
pub(super) async fn start(
    state: &Arc<AgentState>,
    to: Destination,
    input: Streaming<ForwardInput>,
) -> Result<mpsc::Receiver<Result<ForwardOutput, Status>>, Status> {
    Ok(match to {
        Destination::Port(port) => relay(connect(port).await?, input),
        Destination::Identity if state.expected().is_none() => {
            return Err(Status::not_found("the template's recipe has no [identity], so there is no endpoint"));
        }
        Destination::Identity => {
            let (ours, theirs) = tokio::io::duplex(CHUNK);
            tokio::spawn(endpoint::serve(Arc::clone(state), Caller::Host, theirs));
            relay(ours, input)
        }
    })
}

fn relay(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    input: Streaming<ForwardInput>,
) -> mpsc::Receiver<Result<ForwardOutput, Status>> {
    let (replies, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let (from_port, to_port) = tokio::io::split(stream);
        tokio::select! {
            // Whoever asked is gone: the port sees its connection closed.
            () = replies.closed() => {}
            _ = async { tokio::join!(send(from_port, &replies), receive(input, to_port, &replies)) } => {}
        }
    });
    receiver
}

async fn connect(port: u16) -> Result<TcpStream, Status> {
    let mut last = None;
    for address in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        match timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) => {
                // What is sent is not held back: it comes in pieces that are as large as they are.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => last = last.or(Some(error.kind())),
            Err(_) => return Err(Status::deadline_exceeded(format!("port {port} does not take the connection"))),
        }
    }
    Err(match last {
        Some(io::ErrorKind::ConnectionRefused) | None => Status::not_found(format!("nothing listens on port {port}")),
        Some(kind) => Status::unavailable(format!("port {port}: {kind}")),
    })
}

/// What the port sends, until its end. A connection that breaks off ends the stream as an error.
async fn send(mut from_port: impl AsyncRead + Unpin, replies: &Replies) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let reply = match from_port.read(&mut buffer).await {
            Ok(0) => Ok(Output::End(true)),
            Ok(count) => Ok(Output::Data(buffer.get(..count).unwrap_or_default().to_vec())),
            Err(error) => Err(Status::data_loss(format!("the connection broke off: {}", error.kind()))),
        };
        let last = !matches!(reply, Ok(Output::Data(_)));
        let reply = reply.map(|output| ForwardOutput { output: Some(output) });
        if replies.send(reply).await.is_err() || last {
            return;
        }
    }
}

/// What the host sends, until its end.
async fn receive(mut input: Streaming<ForwardInput>, mut to_port: impl AsyncWrite + Unpin, replies: &Replies) {
    let mut takes = true;
    loop {
        match input.message().await.ok().flatten().and_then(|message| message.input) {
            // Once nobody reads it, it is dropped; what the port has sent before is still on its way.
            Some(Input::Data(bytes)) => takes = takes && to_port.write_all(&bytes).await.is_ok(),
            Some(Input::End(_)) => {
                let _ = to_port.shutdown().await;
                return;
            }
            // Without an end: whoever asked broke off.
            Some(Input::Port(_) | Input::Identity(_)) | None => return replies.closed().await,
        }
    }
}
