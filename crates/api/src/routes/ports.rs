//! Connections to ports of a fork's programs.

use std::sync::Arc;

use axum::{
    extract::{
        State,
        ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
};
use futures_util::{SinkExt, StreamExt};
use host::guest::{NotATarget, PortStream, Target};
use serde::Deserialize;
use serde_json::json;

use crate::{App, auth::Forker, extract::At, problem::Problem};

/// Most bytes of a message from a client.
const MAX_MESSAGE: usize = 1 << 20;

/// What a client may say beside bytes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Say {
    end: bool,
}

/// Connect to a port of a fork over a WebSocket
///
/// Binary messages are the connection's bytes, both ways. `{"end": true}` as text says that nothing more comes from that side; the other one goes on. When both
/// have ended the socket is closed with code 1000. A connection that broke off is closed with `{"problem": …}` as the last text. The fork needs no network for it.
#[utoipa::path(get, path = "/v1/forks/{fork}/ports/{port}", tag = "forks", params(
    ("fork" = String, Path, description = "Name or id"),
    ("port" = String, Path, pattern = "^([1-9][0-9]{0,4}|identity)$", description = "Port of its loopback, 1 to 65535; or `identity`, the identity endpoint as the one who may post"),
), responses(
    (status = 101, description = "The port has taken the connection"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The fork did not answer, or nothing listens there", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn connect(
    State(app): State<Arc<App>>,
    _: Forker,
    At((fork, to)): At<(String, String)>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let upgrade = upgrade.map_err(|_| Problem::invalid("Upgrade", "this route takes WebSockets"))?;
    let to: Target = to.parse().map_err(|error: NotATarget| Problem::invalid("port", error.to_string()))?;
    let (_, channel) = super::connect(&app, fork).await?;
    let stream = channel.forward(to).await?;
    let upgrade = upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let mut ending = app.ending.clone();
        tokio::select! {
            () = relay(socket, stream) => {}
            _ = ending.wait_for(|ending| *ending) => {}
        }
    }))
}

async fn relay(socket: WebSocket, stream: PortStream) {
    let (mut sink, mut messages) = socket.split();
    let PortStream { sender, mut receiver } = stream;
    let hearing = async {
        let mut sender = Some(sender);
        while let Some(Ok(message)) = messages.next().await {
            match message {
                Message::Binary(bytes) => {
                    if let Some(sender) = &sender {
                        sender.send(bytes.into()).await;
                    }
                }
                Message::Text(text) if serde_json::from_str::<Say>(&text).is_ok_and(|say| say.end) => {
                    if let Some(sender) = sender.take() {
                        sender.end().await;
                    }
                }
                Message::Close(_) => break,
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) => {}
            }
            if sender.is_none() {
                return true;
            }
        }
        false
    };
    // Gives the socket back, and says why the connection broke off, if it did.
    let sending = async move {
        loop {
            let (message, last) = match receiver.next().await {
                Ok(Some(bytes)) => (Message::Binary(bytes.into()), false),
                Ok(None) => (text(&json!({ "end": true })), true),
                Err(error) => return (sink, Some(Problem::from(error))),
            };
            if sink.send(message).await.is_err() || last {
                return (sink, None);
            }
        }
    };
    tokio::pin!(hearing, sending);
    let mut heard = false;
    let (mut sink, problem) = loop {
        tokio::select! {
            ended = &mut hearing, if !heard => match ended {
                true => heard = true,
                // The client went away in the middle: the port's connection breaks off too.
                false => return,
            },
            sent = &mut sending => break sent,
        }
    };
    match problem {
        Some(problem) => drop(sink.send(text(&json!({ "problem": problem }))).await),
        // The port has ended its side; the client may still have something to say.
        None if !heard => drop(hearing.await),
        None => {}
    }
    let _ = sink.close().await;
}

fn text(value: &serde_json::Value) -> Message {
    Message::Text(value.to_string().into())
}
