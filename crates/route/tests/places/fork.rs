//! A fork as the router sees it: its record, and an agent at the other end of its control channel. The agent's ports do what the numbers here say.

use std::{fs, io, os::unix::fs::symlink, pin::Pin};

use engine::ProcessRef;
use guest_api::{
    proto::{
        EvalReply, EvalRequest, ExecInput, ExecOutput, ForwardInput, ForwardOutput, LogChunk, LogsRequest, PingReply,
        PingRequest, QuiesceReply, QuiesceRequest, ReconfigureNetworkReply, ReconfigureNetworkRequest, WarmEvent,
        WarmRequest,
        agent_server::{Agent, AgentServer},
        forward_input::Input,
        forward_output::Output,
    },
    session::{Acceptor, BUFFER, Event, Kind, encode},
};
use host::{ForkRecord, Home};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, WriteHalf, duplex, split},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Answers.
pub const CALM: u32 = 8000;
/// Takes requests and says nothing.
pub const MUTE: u32 = 8001;
/// Begins an answer, and does not go on.
pub const HALF: u32 = 8002;
/// Agrees to a WebSocket.
pub const SOCKET: u32 = 8003;

fn answer(port: u32) -> Option<&'static str> {
    match port {
        CALM => Some("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ncalm"),
        HALF => Some("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nca"),
        SOCKET => Some("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
        _ => None,
    }
}

/// Makes the fork `name`, whose id is that digit, and says how many requests have come to it. It runs as long as the runtime.
pub fn start(home: &Home, name: &str, digit: char) -> watch::Receiver<usize> {
    let id = digit.to_string().repeat(20);
    let dir = home.forks().join(&id);
    fs::create_dir_all(&dir).unwrap();
    let listener = UnixListener::bind(dir.join("ctl.0.sock")).unwrap();
    publish(home, name, &id, None);

    let (asked, count) = watch::channel(0);
    let (sessions, incoming) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(port(stream, sessions.clone()));
        }
    });
    let incoming = ReceiverStream::new(incoming).map(Ok::<_, io::Error>);
    tokio::spawn(Server::builder().add_service(AgentServer::new(Ports { asked })).serve_with_incoming(incoming));
    count
}

/// Makes a fork that is in standby, and stays there.
pub fn put_to_standby(home: &Home, name: &str, digit: char) {
    let id = digit.to_string().repeat(20);
    fs::create_dir_all(home.forks().join(&id)).unwrap();
    publish(home, name, &id, Some(json!({"since_ms": 0, "dirty_bytes": 0, "disk_bytes": 0, "captured_micros": 0})));
}

/// Writes the record of a fork, and gives it its name.
fn publish(home: &Home, name: &str, id: &str, standby: Option<Value>) {
    let process = ProcessRef::of(std::process::id()).unwrap();
    let record = json!({
        "format": ForkRecord::FORMAT, "id": id, "name": name, "hostname": name, "standby": standby, "template": "t", "template_id": "0",
        "engine": {"name": "qemu", "version": "7.2", "accel": "tcg"}, "process": process, "created_ms": 0, "machine_id": "", "boot_id": "",
        "labels": {}, "env": [], "secrets": [], "files": [], "mailboxes": [], "limits": {}, "cgroups": [], "acked_micros": 0,
        "host_steps": [], "guest_steps": [],
    });
    fs::write(home.forks().join(id).join("fork.json"), record.to_string()).unwrap();
    symlink(id, home.names().join(name)).unwrap();
}

/// The guest's end of a channel: its bytes become sessions.
async fn port(stream: UnixStream, sessions: mpsc::Sender<DuplexStream>) {
    let (mut from_host, mut to_host) = stream.into_split();
    let (output, mut frames) = mpsc::channel::<Vec<u8>>(4);
    tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            if to_host.write_all(&frame).await.is_err() {
                return;
            }
        }
    });
    let mut acceptor = Acceptor::default();
    let mut session: Option<WriteHalf<DuplexStream>> = None;
    let mut buffer = vec![0; BUFFER];
    while let Ok(count @ 1..) = from_host.read(&mut buffer).await {
        for event in acceptor.push(&buffer[..count]) {
            match event {
                Event::Opened(number) => {
                    let (ours, theirs) = duplex(BUFFER);
                    let (mut from_user, to_user) = split(ours);
                    session = Some(to_user);
                    let mut hello = Vec::new();
                    encode(Kind::HelloAck, number, &[], &mut hello);
                    output.send(hello).await.unwrap();
                    sessions.send(theirs).await.unwrap();
                    let output = output.clone();
                    tokio::spawn(async move {
                        let mut buffer = vec![0; 4096];
                        while let Ok(count @ 1..) = from_user.read(&mut buffer).await {
                            let mut frame = Vec::new();
                            encode(Kind::Data, number, &buffer[..count], &mut frame);
                            if output.send(frame).await.is_err() {
                                return;
                            }
                        }
                    });
                }
                Event::Data(_, data) => drop(session.as_mut().unwrap().write_all(&data).await),
                Event::Closed(_) => session = None,
            }
        }
    }
}

#[derive(Debug)]
struct Ports {
    asked: watch::Sender<usize>,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn nothing<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("it has ports only"))
}

#[tonic::async_trait]
impl Agent for Ports {
    type WarmStream = Replies<WarmEvent>;
    type ExecStream = Replies<ExecOutput>;
    type LogsStream = Replies<LogChunk>;
    type ForwardStream = Replies<ForwardOutput>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardInput>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let mut input = request.into_inner();
        let Some(Input::Port(port)) = input.message().await?.and_then(|message| message.input) else {
            return nothing();
        };
        let (replies, receiver) = mpsc::channel(1);
        let asked = self.asked.clone();
        tokio::spawn(async move {
            let mut head = Vec::new();
            while let Ok(Some(ForwardInput { input: Some(Input::Data(bytes)) })) = input.message().await {
                head.extend(bytes);
                if !head.ends_with(b"\r\n\r\n") {
                    continue;
                }
                head.clear();
                asked.send_modify(|count| *count += 1);
                if let Some(text) = answer(port) {
                    let data = ForwardOutput { output: Some(Output::Data(text.into())) };
                    let _ = replies.send(Ok(data)).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingReply>, Status> {
        nothing()
    }

    async fn warm(&self, _: Request<WarmRequest>) -> Result<Response<Self::WarmStream>, Status> {
        nothing()
    }

    async fn quiesce(&self, _: Request<QuiesceRequest>) -> Result<Response<QuiesceReply>, Status> {
        nothing()
    }

    async fn reconfigure_network(
        &self,
        _: Request<ReconfigureNetworkRequest>,
    ) -> Result<Response<ReconfigureNetworkReply>, Status> {
        nothing()
    }

    async fn exec(&self, _: Request<Streaming<ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        nothing()
    }

    async fn eval(&self, _: Request<EvalRequest>) -> Result<Response<EvalReply>, Status> {
        nothing()
    }

    async fn logs(&self, _: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        nothing()
    }
}
