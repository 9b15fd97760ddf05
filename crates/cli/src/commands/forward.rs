//! `forward`: ports of this machine that are ports of a fork's workload, without any network of the fork's.

use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use host::{
    ForkRecord, Home, forks,
    guest::{Channels, GuestError, Target},
};
use rustix::net::sockopt::set_socket_linger;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{CONNECT_LIMIT, Outcome, block_on};
use crate::{
    args::{PortForward, PortPair},
    error::Failure,
    output::{Output, clean},
    signals::Signals,
};

/// What becomes of one connection.
pub type Relaying = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// How long to wait when the system has no more descriptors.
const SPENT: Duration = Duration::from_millis(200);

pub fn run(args: &PortForward, output: &Output) -> Outcome {
    let home = Home::from_env()?;
    block_on(async {
        let record = Arc::new(forks::get_alive(&home, &args.fork)?);
        let channels = Channels::default();
        // A fork that does not answer is told now, not to whoever connects.
        channels.get(&home, &record, CONNECT_LIMIT).await?;
        let ended = ended(Arc::clone(&record));
        let (home, channels) = (Arc::new(home), Arc::new(channels));
        let relay = move |port, stream| -> Relaying {
            let (home, channels, record) = (Arc::clone(&home), Arc::clone(&channels), Arc::clone(&record));
            Box::pin(async move { Ok(relay(&home, &channels, &record, port, stream).await?) })
        };
        serve(args, relay, ended, output).await
    })
}

/// A target as it is given.
pub fn written(to: Target) -> String {
    match to {
        Target::Port(port) => port.to_string(),
        Target::Identity => Target::IDENTITY.to_owned(),
    }
}

fn port_json(to: Target) -> Value {
    match to {
        Target::Port(port) => port.into(),
        Target::Identity => Target::IDENTITY.into(),
    }
}

/// Moves the bytes of one connection.
async fn relay(
    home: &Home,
    channels: &Channels,
    record: &ForkRecord,
    to: Target,
    mut stream: TcpStream,
) -> Result<(), GuestError> {
    let connected = match channels.get(home, record, CONNECT_LIMIT).await {
        Ok(channel) => channel.forward(to).await,
        Err(error) => Err(error),
    };
    let relayed = match connected {
        Ok(there) => there.relay(&mut stream).await,
        Err(error) => Err(error),
    };
    if relayed.is_err() {
        break_off(&stream);
    }
    relayed
}

/// Whoever is at the other end sees that the connection broke, and does not take it for the end of what was sent.
pub fn break_off(stream: &TcpStream) {
    // Else it is closed in the ordinary way.
    let _ = set_socket_linger(stream, Some(Duration::ZERO));
}

/// Returns when the fork's machine has ended.
async fn ended(record: Arc<ForkRecord>) -> Failure {
    let name = record.name.clone();
    let gone = tokio::task::spawn_blocking(move || -> io::Result<()> {
        let Some(pidfd) = record.process.pidfd()? else { return Ok(()) };
        while !engine::process::wait_gone(&pidfd, Duration::from_secs(3600))? {}
        Ok(())
    });
    match gone.await.map_err(io::Error::other).flatten() {
        Ok(()) => Failure::new("fork_ended", format!("fork {name} has ended")).with_next("offshoot ls"),
        Err(error) => Failure::of("runtime", &error),
    }
}

/// Listens, and gives every connection to `relay`, until a signal asks to end or `ended` says why there is nothing to do any more.
pub async fn serve(
    args: &PortForward,
    relay: impl Fn(Target, TcpStream) -> Relaying,
    ended: impl Future<Output = Failure>,
    output: &Output,
) -> Outcome {
    let mut signals = Signals::new().map_err(|error| Failure::of("runtime", &error))?;
    let mut listeners = Vec::new();
    for pair in &args.ports {
        listeners.push((listen(args, *pair).await?, pair.guest));
    }
    for (listener, to) in &listeners {
        let address = listener.local_addr().map_err(|error| Failure::of("runtime", &error))?;
        if output.json {
            output.json_line(&json!({ "listening": address.to_string(), "port": port_json(*to) }))?;
        } else {
            output.line(&format!("{address} -> {to} of {}", clean::line(&args.fork)))?;
        }
    }
    output.note("Ctrl-C ends it");

    let mut connections = JoinSet::new();
    let mut last_trouble = String::new();
    let accepting = async {
        loop {
            let (taken, port) = next(&listeners).await;
            match taken {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    connections.spawn(relay(port, stream));
                }
                // Whoever it was is gone, or there are no more descriptors.
                Err(_) => tokio::time::sleep(SPENT).await,
            }
            while let Some(done) = connections.try_join_next() {
                let Ok(Err(failure)) = done else { continue };
                let trouble = failure.on_one_line();
                // One that repeats itself is told once.
                if failure.code() != "local_io_failed" && trouble != last_trouble {
                    output.note(&clean::line(&trouble));
                    last_trouble = trouble;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => Ok(0),
        _ = signals.end() => Ok(0),
        failure = ended => Err(failure),
    }
}

async fn listen(args: &PortForward, pair: PortPair) -> Result<TcpListener, Failure> {
    let address = SocketAddr::new(args.address, pair.host);
    TcpListener::bind(address).await.map_err(|error| {
        Failure::new("address_unusable", format!("{address} can not be listened on"))
            .with_causes([error.to_string()])
            .with_next(format!(
                "offshoot forward {} 0:{}    (any free port)",
                clean::line(&args.fork),
                written(pair.guest)
            ))
    })
}

/// The next connection, at whichever port it comes.
async fn next(listeners: &[(TcpListener, Target)]) -> (io::Result<(TcpStream, SocketAddr)>, Target) {
    std::future::poll_fn(|context| {
        for (listener, port) in listeners {
            if let std::task::Poll::Ready(taken) = listener.poll_accept(context) {
                return std::task::Poll::Ready((taken, *port));
            }
        }
        std::task::Poll::Pending
    })
    .await
}
