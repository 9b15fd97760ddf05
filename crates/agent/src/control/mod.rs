//! The control channels: the host's requests, over gRPC, on every port `offshoot.ctl.N`.

mod exec;
mod forward;
mod port;
mod server;
mod tool;

use std::{io, sync::Arc};

use guest_api::{
    flow::{MAX_STREAMS, TO_GUEST},
    proto::agent_server::AgentServer,
};
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::transport::Server;

use crate::{boot::device, console, state::AgentState};

pub use tool::tool;

/// Most bytes of one request.
const MAX_REQUEST: usize = 8 << 20;
/// Most ports that are looked for; the host makes eight.
const MAX_PORTS: usize = 16;

/// Serves the control channels on the calling (main) thread; returns only if it can not go on.
pub fn serve(state: &Arc<AgentState>) -> Box<dyn std::error::Error> {
    match run(state) {
        Ok(()) => "it ended".into(),
        Err(error) => error,
    }
}

fn run(state: &Arc<AgentState>) -> Result<(), Box<dyn std::error::Error>> {
    // One thread, and no timer that ticks: an idle fork must cost nothing.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (sessions, incoming) = mpsc::channel::<DuplexStream>(MAX_PORTS);
        let ports = (0..MAX_PORTS).map_while(|number| device::open_port(&format!("offshoot.ctl.{number}")));
        let mut count = 0;
        for port in ports {
            port::start(port, sessions.clone())?;
            count += 1;
        }
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the machine has no control channel").into());
        }
        console::note(&format!("{count} control channels"));
        serve_incoming(state, incoming).await.map_err(Into::into)
    })
}

async fn serve_incoming(
    state: &Arc<AgentState>,
    incoming: mpsc::Receiver<DuplexStream>,
) -> Result<(), tonic::transport::Error> {
    let service = AgentServer::new(server::Service::new(Arc::clone(state))).max_decoding_message_size(MAX_REQUEST);
    let incoming = ReceiverStream::new(incoming).map(Ok::<_, io::Error>);
    Server::builder()
        .initial_stream_window_size(TO_GUEST.stream)
        .initial_connection_window_size(TO_GUEST.channel)
        .max_concurrent_streams(MAX_STREAMS)
        .add_service(service)
        .serve_with_incoming(incoming)
        .await
}

#[cfg(test)]
mod tests;
