//! `exec` over a WebSocket: streams, signals, a terminal's size, and the exit code.

use futures_util::{Sink, SinkExt, Stream, StreamExt};
use host::guest::{Control, ExecOptions, ExecResult};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Stdin};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::{
    args::Exec,
    commands::{
        Outcome,
        exec::{Streams, check, drive, options},
    },
    error::Failure,
    output::{Output, PrintError},
    remote::{
        client::{Client, ended, lost, part, read},
        problem::Problem,
        socket::{self, Socket},
    },
};

/// Bytes of input in one message.
const PIECE: usize = 64 << 10;

/// What became of the command.
#[derive(Debug, Deserialize)]
struct Exit {
    code: i32,
    timed_out: bool,
    error: Option<String>,
}

pub async fn exec(args: &Exec, mut client: Client, output: &Output) -> Outcome {
    check(args, output)?;
    let options = options(args)?;
    let socket = socket::open(&mut client, &format!("/v1/forks/{}/exec", part(&args.fork))).await?;
    drive(args, async |streams| converse(socket, options, streams).await, output).await
}

/// Says what is to be run, and then both sides at once.
async fn converse(socket: Socket, options: ExecOptions, streams: Streams) -> Result<ExecResult, Failure> {
    let (mut sink, stream) = socket.split();
    let begin = json!({
        "argv": options.argv,
        "env": options.env,
        "workdir": options.workdir,
        "user": options.user,
        "timeout_ms": options.timeout.map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
    });
    let begin = match options.terminal {
        Some(terminal) => {
            let mut begin = begin;
            begin["tty"] = size(terminal);
            begin
        }
        None => begin,
    };
    sink.send(text(&begin)).await.map_err(|error| lost(&error))?;
    let Streams { stdin, stdout, stderr, controls } = streams;
    tokio::select! {
        result = hear(stream, stdout, stderr) => result,
        () = speak(sink, stdin, controls) => Err(ended()),
    }
}

fn size((rows, columns): (u32, u32)) -> Value {
    json!({ "rows": rows, "cols": columns })
}

fn text(value: &Value) -> Message {
    Message::text(value.to_string())
}

/// Takes what the daemon sends until the command has ended.
async fn hear(
    mut stream: impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
    mut stdout: impl tokio::io::AsyncWrite + Unpin,
    mut stderr: impl tokio::io::AsyncWrite + Unpin,
) -> Result<ExecResult, Failure> {
    while let Some(message) = stream.next().await {
        match message.map_err(|error| lost(&error))? {
            Message::Binary(bytes) => {
                let written = match bytes.split_first() {
                    Some((1, bytes)) => stdout.write_all(bytes).await,
                    Some((2, bytes)) => stderr.write_all(bytes).await,
                    _ => Ok(()),
                };
                // It can only be the reader of our output that went away, or a full disk.
                written.map_err(PrintError::from)?;
            }
            Message::Text(text) => {
                let last: Value = serde_json::from_str(&text).unwrap_or_default();
                if !last["problem"].is_null() {
                    return Err(read::<Problem>(&last["problem"])?.into());
                }
                let Exit { code, timed_out, error } = read(&last["exit"])?;
                return Ok(ExecResult { code, timed_out, error });
            }
            Message::Close(_) => break,
            _ => {}
        }
    }
    Err(ended())
}

/// Sends input, signals and sizes. It never ends by itself: what became of the command is heard, not guessed.
async fn speak(
    mut sink: impl Sink<Message, Error = tungstenite::Error> + Unpin,
    mut stdin: Option<Stdin>,
    mut controls: tokio::sync::mpsc::Receiver<Control>,
) {
    let mut buffer = vec![0; PIECE];
    let mut open = stdin.is_some();
    if !open {
        let _ = sink.send(text(&json!({ "close_stdin": true }))).await;
    }
    loop {
        let input = async {
            match &mut stdin {
                Some(stdin) if open => stdin.read(&mut buffer).await,
                _ => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            control = controls.recv() => match control {
                Some(Control::Resize(rows, columns)) => text(&json!({ "resize": size((rows, columns)) })),
                Some(Control::Signal(number)) => text(&json!({ "signal": number })),
                None => return std::future::pending().await,
            },
            // What can not be read has ended.
            count = input => match count.unwrap_or(0) {
                0 => {
                    open = false;
                    text(&json!({ "close_stdin": true }))
                }
                count => Message::binary(buffer[..count].to_vec()),
            },
        };
        if sink.send(message).await.is_err() {
            return std::future::pending().await;
        }
    }
}
