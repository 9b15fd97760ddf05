//! WebSockets to the daemon.

use hyper::header::{CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::{client::generate_key, derive_accept_key},
        protocol::Role,
    },
};

use super::client::{Client, lost};
use crate::error::Failure;

/// A WebSocket to the daemon.
pub type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// Opens one at a path of the API.
pub async fn open(client: &mut Client, path: &str) -> Result<Socket, Failure> {
    let key = generate_key();
    let header = HeaderValue::from_str(&key).map_err(|error| Failure::of("internal", &error))?;
    let headers = [
        (CONNECTION, HeaderValue::from_static("Upgrade")),
        (UPGRADE, HeaderValue::from_static("websocket")),
        (SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13")),
        (SEC_WEBSOCKET_KEY, header),
    ];
    let answer = client.upgrade(path, headers).await?;
    let accepted = answer.headers().get(SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes);
    if accepted != Some(derive_accept_key(key.as_bytes()).as_bytes()) {
        return Err(Failure::new("host_answer", "what answers does not speak WebSocket"));
    }
    let stream = hyper::upgrade::on(answer).await.map_err(|error| lost(&error))?;
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Client, None).await)
}
