//! `forward` over WebSockets, one for each connection.

use std::{path::PathBuf, sync::Arc};

use futures_util::{SinkExt, StreamExt};
use host::guest::Target;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    args::PortForward,
    commands::{
        Outcome,
        forward::{Relaying, break_off, serve, written},
    },
    error::Failure,
    output::Output,
    remote::{
        Address,
        client::{Client, ended, lost, part, read},
        problem::Problem,
        socket,
    },
};

/// Bytes of one message.
const PIECE: usize = 32 << 10;

pub async fn forward(args: &PortForward, address: Address, ca: Option<PathBuf>, output: &Output) -> Outcome {
    // A fork that is not there is told now, not to whoever connects.
    let _: Value = Client::new(address.clone(), ca.as_deref())?.get(&format!("/v1/forks/{}", part(&args.fork))).await?;
    let (address, fork) = (Arc::new(address), Arc::new(args.fork.clone()));
    let relay = move |to, stream| -> Relaying {
        let (address, ca, fork) = (Arc::clone(&address), ca.clone(), Arc::clone(&fork));
        Box::pin(async move {
            let client = Client::new((*address).clone(), ca.as_deref())?;
            relay(client, &fork, to, stream).await
        })
    };
    serve(args, relay, std::future::pending(), output).await
}

async fn relay(mut client: Client, fork: &str, to: Target, mut stream: TcpStream) -> Result<(), Failure> {
    let path = format!("/v1/forks/{}/ports/{}", part(fork), written(to));
    let relayed = match socket::open(&mut client, &path).await {
        Ok(socket) => converse(socket, &mut stream).await,
        Err(failure) => Err(failure),
    };
    if relayed.is_err() {
        break_off(&stream);
    }
    relayed
}

async fn converse(socket: socket::Socket, stream: &mut TcpStream) -> Result<(), Failure> {
    let (mut sink, mut messages) = socket.split();
    let (mut reading, mut writing) = stream.split();
    let local = |error: std::io::Error| Failure::of("local_io_failed", &error);
    let sending = async {
        let mut buffer = vec![0; PIECE];
        loop {
            let count = reading.read(&mut buffer).await.map_err(local)?;
            let message = match buffer.get(..count) {
                Some(bytes) if count > 0 => Message::binary(bytes.to_vec()),
                _ => Message::text(json!({ "end": true }).to_string()),
            };
            sink.send(message).await.map_err(|error| lost(&error))?;
            if count == 0 {
                return Ok(());
            }
        }
    };
    let receiving = async {
        while let Some(message) = messages.next().await {
            match message.map_err(|error| lost(&error))? {
                Message::Binary(bytes) => writing.write_all(&bytes).await.map_err(local)?,
                Message::Text(text) => {
                    let said: Value = serde_json::from_str(&text).unwrap_or_default();
                    if !said["problem"].is_null() {
                        return Err(read::<Problem>(&said["problem"])?.into());
                    }
                    // Its other side may have gone meanwhile.
                    let _ = writing.shutdown().await;
                    return Ok(());
                }
                _ => {}
            }
        }
        Err(ended())
    };
    tokio::try_join!(sending, receiving)?;
    let _ = sink.close().await;
    Ok(())
}
