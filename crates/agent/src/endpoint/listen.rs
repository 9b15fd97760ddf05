//! Where the endpoint listens.

use std::{
    fs::Permissions,
    io,
    net::{Ipv4Addr, TcpListener},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};

use super::{Caller, serve};
use crate::state::AgentState;

/// Most connections at a time; others wait to be taken.
const MAX_CONNECTIONS: usize = 128;
/// The pause after a connection could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens on a socket at `path` and, unless `port` is 0, at a port of the loopback. To be called on the agent's runtime.
///
/// # Errors
/// If one of them can not be made.
pub fn start(state: &Arc<AgentState>, path: &str, port: u16) -> io::Result<()> {
    let tcp = if port == 0 { None } else { Some(TcpListener::bind((Ipv4Addr::LOCALHOST, port))?) };
    let local = UnixListener::bind(path)?;
    // Every program of the workload may ask.
    std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    local.set_nonblocking(true)?;
    let local = tokio::net::UnixListener::from_std(local)?;
    tokio::spawn(take_all(Arc::clone(state), async move || Ok(local.accept().await?.0)));
    if let Some(tcp) = tcp {
        tcp.set_nonblocking(true)?;
        let tcp = tokio::net::TcpListener::from_std(tcp)?;
        tokio::spawn(take_all(Arc::clone(state), async move || Ok(tcp.accept().await?.0)));
    }
    Ok(())
}

async fn take_all<S>(state: Arc<AgentState>, take: impl AsyncFn() -> io::Result<S>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match take().await {
            Ok(stream) => {
                let state = Arc::clone(&state);
                tokio::spawn(async move {
                    serve(state, Caller::Workload, stream).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
