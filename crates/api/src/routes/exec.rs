//! Commands in a fork: with an answer at the end, or over a WebSocket as they run.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{
        State,
        ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{SinkExt, StreamExt};
use host::guest::{Control, ExecOptions, ExecResult, GuestChannel};
use identity::EnvName;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::mpsc,
};
use utoipa::ToSchema;

use super::connect;
use crate::{
    App,
    auth::Forker,
    extract::{self, At, Body},
    problem::Problem,
};

/// Most bytes of each stream in an answer.
const MOST_OUTPUT: usize = 4 << 20;
/// Most words of a command.
const MAX_ARGV: usize = 4096;
/// Longest time that a command may take.
const MAX_TIMEOUT: u64 = 7 * 24 * 3600 * 1000;
/// Bytes between the guest and the client.
const BUFFER: usize = 64 << 10;
/// Most bytes of a message from a client.
const MAX_MESSAGE: usize = 1 << 20;
/// Messages of input that wait for the command; signals overtake what waits here.
const WAITING: usize = 64;
/// Time for the client to answer the end of the conversation.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// Time for the client to say what it wants.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// A command.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Command {
    /// The program and its arguments.
    #[schema(example = json!(["sh", "-c", "echo hello"]), min_items = 1)]
    argv: Vec<String>,
    /// Variables on top of the fork's.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default)]
    workdir: String,
    /// User name, or UID[:GID]; without it root.
    #[serde(default)]
    user: String,
    /// The command is ended after this many milliseconds; 0: never.
    #[serde(default)]
    #[schema(maximum = 604_800_000)]
    timeout_ms: u64,
    /// Its input as text; only for the request with one answer.
    #[serde(default)]
    #[schema(nullable = false)]
    stdin: Option<String>,
    /// The size of its terminal; only over a WebSocket, where it gives the command one.
    #[serde(default)]
    #[schema(nullable = false)]
    tty: Option<Size>,
}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Size {
    #[schema(minimum = 1, maximum = 65535)]
    rows: u16,
    #[schema(minimum = 1, maximum = 65535)]
    cols: u16,
}

impl Command {
    fn options(&self) -> Result<ExecOptions, Problem> {
        if self.argv.is_empty() || self.argv.len() > MAX_ARGV || self.argv.iter().any(|word| word.contains('\0')) {
            return Err(Problem::invalid("argv", format!("a command is 1 to {MAX_ARGV} words without NUL bytes")));
        }
        if self.timeout_ms > MAX_TIMEOUT {
            return Err(Problem::invalid("timeout_ms", "a timeout is at most a week"));
        }
        for (name, value) in &self.env {
            EnvName::parse(name).map_err(|error| Problem::invalid("env", error.to_string()))?;
            if value.contains('\0') {
                return Err(Problem::invalid("env", "a variable's value has no NUL bytes"));
            }
        }
        for (field, text) in [("workdir", &self.workdir), ("user", &self.user)] {
            if text.contains('\0') || text.len() > 4096 {
                return Err(Problem::invalid(field, "at most 4096 bytes without NUL bytes"));
            }
        }
        Ok(ExecOptions {
            argv: self.argv.clone(),
            env: self.env.clone().into_iter().collect(),
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            terminal: self.tty.map(|size| (size.rows.into(), size.cols.into())),
            timeout: (self.timeout_ms > 0).then(|| Duration::from_millis(self.timeout_ms)),
        })
    }
}

/// What became of a command.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Ran {
    /// Its exit code; 128 and the signal's number if a signal ended it; 126 or 127 if it could not be started.
    code: i32,
    /// Whether its time was up.
    timed_out: bool,
    /// Why it was not started.
    error: Option<String>,
    /// What it wrote, as far as it is UTF-8.
    stdout: String,
    /// What it wrote as errors.
    stderr: String,
    /// The same as bytes.
    stdout_base64: String,
    /// The same as bytes.
    stderr_base64: String,
    /// Whether more was written than the 4 MiB of each stream that are kept.
    truncated: bool,
}

/// Run a command and wait for it
///
/// That the command failed is no failure of the request. For input and output as they come, signals and a terminal, open a WebSocket on the same path.
#[utoipa::path(post, path = "/v1/forks/{fork}/exec", tag = "forks", params(("fork" = String, Path, description = "Name or id")), request_body = Command, responses(
    (status = 200, description = "It has ended", body = Ran),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The fork did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn run(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
    Body(command): Body<Command>,
) -> Result<Json<Ran>, Problem> {
    let options = command.options()?;
    if command.tty.is_some() {
        return Err(Problem::invalid("tty", "a terminal needs a WebSocket"));
    }
    let (_, mut channel) = connect(&app, fork).await?;
    let (ours, stdout) = duplex(BUFFER);
    let (ours_too, stderr) = duplex(BUFFER);
    let (_controls, receiver) = mpsc::channel(1);
    let stdin = command.stdin.map(|text| io::Cursor::new(text.into_bytes()));
    let exec = channel.exec(options, stdin, stdout, stderr, receiver);
    let (result, out, err) = tokio::join!(exec, keep(ours), keep(ours_too));
    let ExecResult { code, timed_out, error } = result?;
    Ok(Json(Ran {
        code,
        timed_out,
        error,
        stdout: String::from_utf8_lossy(&out.0).into_owned(),
        stderr: String::from_utf8_lossy(&err.0).into_owned(),
        stdout_base64: STANDARD.encode(&out.0),
        stderr_base64: STANDARD.encode(&err.0),
        truncated: out.1 || err.1,
    }))
}

/// The first bytes of a stream, and whether there were more.
async fn keep(mut stream: DuplexStream) -> (Vec<u8>, bool) {
    let (mut kept, mut more, mut buffer) = (Vec::new(), false, vec![0; BUFFER]);
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let room = (MOST_OUTPUT - kept.len()).min(count);
        kept.extend_from_slice(&buffer[..room]);
        more |= room < count;
    }
    (kept, more)
}

/// What a client may say while its command runs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum Say {
    Resize(Size),
    Signal(i32),
    CloseStdin(bool),
}

/// Run a command over a WebSocket
///
/// The client's first message is the command as JSON (text). Then its binary messages are the command's input; as text it may send `{"resize": {"rows", "cols"}}`,
/// `{"signal": 15}` and `{"close_stdin": true}`. The daemon's binary messages are output: their first byte is 1 for standard output and 2 for standard error. Its last
/// message is text: `{"exit": {"code", "timed_out", "error"}}`, or `{"problem": …}`. When the client goes away the command is ended with everything it started.
#[utoipa::path(get, path = "/v1/forks/{fork}/exec", tag = "forks", params(("fork" = String, Path, description = "Name or id")), responses(
    (status = 101, description = "The WebSocket is open"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The fork did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn attach(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let upgrade = upgrade.map_err(|_| Problem::invalid("Upgrade", "this route takes WebSockets; or use POST"))?;
    let (_, channel) = connect(&app, fork).await?;
    let upgrade = upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let mut ending = app.ending.clone();
        tokio::select! {
            () = converse(socket, channel) => {}
            _ = ending.wait_for(|ending| *ending) => {}
        }
    }))
}

async fn converse(socket: WebSocket, mut channel: GuestChannel) {
    let (mut sink, mut stream) = socket.split();
    let begun = tokio::time::timeout(BEGIN_LIMIT, stream.next()).await;
    let options = match begun {
        Ok(Some(Ok(Message::Text(text)))) => {
            extract::parse::<Command>(text.as_bytes()).and_then(|command| match command.stdin {
                Some(_) => Err(Problem::invalid("stdin", "over a WebSocket, input is sent as binary messages")),
                None => command.options(),
            })
        }
        Ok(Some(Ok(_))) => Err(Problem::invalid("", "the first message must be the command, as text")),
        _ => return,
    };
    let options = match options {
        Ok(options) => options,
        Err(problem) => return finish(sink, stream, json!({ "problem": problem })).await,
    };
    let (messages, mut outgoing) = mpsc::channel::<Message>(8);
    let (ours, stdout) = duplex(BUFFER);
    let (ours_too, stderr) = duplex(BUFFER);
    let (stdin, mut input) = duplex(BUFFER);
    let (controls, receiver) = mpsc::channel(8);
    let (inputs, mut waiting) = mpsc::channel::<axum::body::Bytes>(WAITING);

    let feeding = async {
        while let Some(bytes) = waiting.recv().await {
            if input.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = input.shutdown().await;
        drop(input);
        // What comes after the end of the input is nobody's.
        while waiting.recv().await.is_some() {}
        std::future::pending::<()>().await;
    };
    let hearing = async {
        let mut inputs = Some(inputs);
        while let Some(Ok(message)) = stream.next().await {
            match message {
                Message::Binary(bytes) => {
                    if let Some(inputs) = &inputs {
                        let _ = inputs.send(bytes).await;
                    }
                }
                Message::Text(text) => match serde_json::from_str::<Say>(&text) {
                    Ok(Say::Resize(size)) => {
                        let _ = controls.send(Control::Resize(size.rows.into(), size.cols.into())).await;
                    }
                    Ok(Say::Signal(number)) => {
                        let _ = controls.send(Control::Signal(number)).await;
                    }
                    Ok(Say::CloseStdin(true)) => inputs = None,
                    Ok(Say::CloseStdin(false)) | Err(_) => {}
                },
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    };
    let sending = async {
        while let Some(message) = outgoing.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
    };
    let running = async {
        let exec = channel.exec(options, Some(stdin), stdout, stderr, receiver);
        let (result, (), ()) = tokio::join!(exec, pump(1, ours, &messages), pump(2, ours_too, &messages));
        drop(messages);
        result
    };
    let ended = tokio::select! {
        // The client went away: the command ends with the channel.
        () = hearing => None,
        () = feeding => None,
        (result, ()) = async { tokio::join!(running, sending) } => Some(result),
    };
    let Some(result) = ended else { return };
    let last = match result {
        Ok(ExecResult { code, timed_out, error }) => {
            json!({ "exit": { "code": code, "timed_out": timed_out, "error": error } })
        }
        Err(error) => json!({ "problem": Problem::from(error) }),
    };
    finish(sink, stream, last).await;
}

/// Sends what comes from the command, with the number of its stream before it.
async fn pump(number: u8, mut from: impl AsyncRead + Unpin, to: &mpsc::Sender<Message>) {
    let mut buffer = vec![0; BUFFER];
    buffer[0] = number;
    while let Ok(count @ 1..) = from.read(&mut buffer[1..]).await {
        if to.send(Message::Binary(buffer[..=count].to_vec().into())).await.is_err() {
            return;
        }
    }
}

/// Says the last word. The connection is there until the client has answered the close: one whose answer fails may drop what it has not read yet.
async fn finish(
    mut sink: futures_util::stream::SplitSink<WebSocket, Message>,
    mut stream: futures_util::stream::SplitStream<WebSocket>,
    last: serde_json::Value,
) {
    let _ = sink.send(Message::Text(last.to_string().into())).await;
    let _ = sink.close().await;
    let answered = async { while let Some(Ok(_)) = stream.next().await {} };
    let _ = tokio::time::timeout(CLOSE_LIMIT, answered).await;
}
