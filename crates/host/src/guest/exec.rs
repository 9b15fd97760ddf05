//! Commands in the guest.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use guest_api::{
    INPUT_WINDOW,
    proto::{
        Command, ExecExit, ExecInput, ExecStart, Resize, agent_client::AgentClient, exec_input::Input,
        exec_output::Output, exec_start::What,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, metadata::MetadataMap, transport::Channel};

use super::{GuestChannel, GuestError, clean};

/// Bytes of input per message.
const CHUNK: usize = 16 * 1024;

/// Time for the guest to end a command whose time is up, and to say so.
const GRACE: Duration = Duration::from_secs(15);

/// A command to run in a guest.
#[derive(Debug, Clone, Default)]
pub struct ExecOptions {
    /// The command and its arguments.
    pub argv: Vec<String>,
    /// Variables besides the fork's own.
    pub env: BTreeMap<String, String>,
    /// Working directory; empty is `/`.
    pub workdir: String,
    /// User name or `uid[:gid]`; empty is root.
    pub user: String,
    /// Rows and columns of a terminal, if the command gets one.
    pub terminal: Option<(u32, u32)>,
    /// When it is ended with all it started; `None` never.
    pub timeout: Option<Duration>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// Its exit code; 128 and the signal's number if a signal ended it; 126 or 127 if it could not be started.
    pub code: i32,
    /// Whether its time was up.
    pub timed_out: bool,
    /// Why it was not started.
    pub error: Option<String>,
}

/// What may be sent to a running command besides its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Its terminal has another size: rows, columns.
    Resize(u32, u32),
    /// A signal's number.
    Signal(i32),
}

impl GuestChannel {
    /// Runs a command. `stdin` is read until its end (`None`: the command gets no input); output goes to `stdout` and `stderr` as it
    /// comes; `controls` may send sizes and signals.
    ///
    /// # Errors
    /// [`GuestError`]. That the command failed is no error.
    pub async fn exec(
        &mut self,
        options: ExecOptions,
        stdin: Option<impl AsyncRead + Unpin + Send + 'static>,
        mut stdout: impl AsyncWrite + Unpin,
        mut stderr: impl AsyncWrite + Unpin,
        controls: mpsc::Receiver<Control>,
    ) -> Result<ExecResult, GuestError> {
        let (rows, cols) = options.terminal.unwrap_or_default();
        let command = Command {
            argv: options.argv,
            env: options.env.into_iter().collect(),
            workdir: options.workdir,
            user: options.user,
            tty: options.terminal.is_some(),
            rows,
            cols,
        };
        let timeout_ms = options.timeout.map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1));
        let start = ExecStart { what: Some(What::Command(command)), timeout_ms };
        run(self.client(), start, stdin, &mut stdout, &mut stderr, controls).await
    }
}

pub(super) async fn run(
    client: &mut AgentClient<Channel>,
    start: ExecStart,
    stdin: Option<impl AsyncRead + Unpin + Send + 'static>,
    stdout: &mut (impl AsyncWrite + Unpin),
    stderr: &mut (impl AsyncWrite + Unpin),
    mut controls: mpsc::Receiver<Control>,
) -> Result<ExecResult, GuestError> {
    let (inputs, messages) = mpsc::channel(4);
    let mut patience = Patience::new((start.timeout_ms > 0).then(|| Duration::from_millis(start.timeout_ms) + GRACE));
    inputs.send(message(Input::Start(start))).await.map_err(|_| GuestError::Transport("closed".into()))?;
    let control_inputs = inputs.clone();
    let mut outputs = patience.wait(client.exec(ReceiverStream::new(messages))).await?;
    let window = Window::of(outputs.metadata());
    let outputs = outputs.get_mut();
    // Both end with this function, however that ends.
    let mut inputting = JoinSet::new();
    inputting.spawn(feed(stdin, inputs, window.clone()));
    inputting.spawn(async move {
        while let Some(control) = controls.recv().await {
            let input = match control {
                Control::Resize(rows, cols) => Input::Resize(Resize { rows, cols }),
                Control::Signal(number) => Input::Signal(number),
            };
            if control_inputs.send(message(input)).await.is_err() {
                break;
            }
        }
    });
    while let Some(output) = patience.wait(outputs.message()).await? {
        match output.output {
            Some(Output::Stdout(bytes)) => {
                stdout.write_all(&bytes).await?;
                stdout.flush().await?;
            }
            Some(Output::Stderr(bytes)) => {
                stderr.write_all(&bytes).await?;
                stderr.flush().await?;
            }
            Some(Output::Exit(ExecExit { code, timed_out, error })) => {
                let error = (!error.is_empty()).then(|| clean(&error));
                return Ok(ExecResult { code, timed_out, error });
            }
            Some(Output::InputTaken(count)) => window.taken(count),
            None => {}
        }
    }
    Err(GuestError::Transport("the sandbox ended before the command did".into()))
}

fn message(input: Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

/// Sends what `stdin` has, as far as the window lets it, and its end.
async fn feed(stdin: Option<impl AsyncRead + Unpin>, inputs: mpsc::Sender<ExecInput>, window: Window) {
    if let Some(mut stdin) = stdin {
        let mut buffer = vec![0; CHUNK];
        loop {
            // First the room: what is not read stays with whoever writes it.
            window.room().await;
            let Ok(count) = stdin.read(&mut buffer).await else { break };
            if count == 0 || inputs.send(message(Input::Stdin(buffer[..count].to_vec()))).await.is_err() {
                break;
            }
        }
    }
    let _ = inputs.send(message(Input::CloseStdin(true))).await;
}

/// How many messages of input may still be sent: a command that does not read must not hold up what is sent besides.
#[derive(Debug, Clone)]
struct Window(Option<Arc<Semaphore>>);

impl Window {
    /// As the agent says; one that is older counts nothing.
    fn of(header: &MetadataMap) -> Self {
        let count = header.get(INPUT_WINDOW).and_then(|value| value.to_str().ok()?.parse::<u16>().ok());
        Self(count.map(|count| Arc::new(Semaphore::new(count.max(1).into()))))
    }

    async fn room(&self) {
        if let Some(places) = &self.0
            && let Ok(place) = places.acquire().await
        {
            place.forget();
        }
    }

    fn taken(&self, count: u32) {
        if let Some(places) = &self.0 {
            // A guest that says more than it was sent gets no more at once than anybody's window is.
            let room = usize::from(u16::MAX).saturating_sub(places.available_permits());
            places.add_permits(usize::try_from(count).unwrap_or(room).min(room));
        }
    }
}

/// The guest keeps to the command's deadline; this one is for a guest that does not. Only waiting for the guest counts: whoever takes the output may
/// take his time.
#[derive(Debug)]
struct Patience {
    limit: Option<Duration>,
    waited: Duration,
}

impl Patience {
    fn new(limit: Option<Duration>) -> Self {
        Self { limit, waited: Duration::ZERO }
    }

    async fn wait<T>(&mut self, guest: impl Future<Output = Result<T, Status>>) -> Result<T, GuestError> {
        let Some(limit) = self.limit else { return Ok(guest.await?) };
        let begun = Instant::now();
        let result = timeout(limit.saturating_sub(self.waited), guest).await;
        self.waited += begun.elapsed();
        Ok(result.map_err(|_| GuestError::Timeout(limit))??)
    }
}

/// Runs a tool without input and returns its output, at most `most` bytes.
pub(super) async fn collect(client: &mut AgentClient<Channel>, what: What, most: usize) -> Result<Vec<u8>, GuestError> {
    let start = ExecStart { what: Some(what), timeout_ms: 60_000 };
    let (mut stdout, mut stderr) = (Bounded::new(most), Bounded::new(4096));
    let (_, controls) = mpsc::channel(1);
    let result = run(client, start, None::<tokio::io::Empty>, &mut stdout, &mut stderr, controls).await?;
    check(&result, &stderr)?;
    Ok(stdout.bytes)
}

/// Whether a tool did what it should.
pub(super) fn check(result: &ExecResult, stderr: &Bounded) -> Result<(), GuestError> {
    if result.code == 0 {
        return Ok(());
    }
    let reason = result.error.clone().unwrap_or_else(|| clean(String::from_utf8_lossy(&stderr.bytes).trim()));
    Err(GuestError::Refused(reason))
}

/// Keeps the first bytes that are written, and drops the rest.
#[derive(Debug)]
pub(super) struct Bounded {
    pub(super) bytes: Vec<u8>,
    most: usize,
}

impl Bounded {
    pub(super) fn new(most: usize) -> Self {
        Self { bytes: Vec::new(), most }
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let room = self.most.saturating_sub(self.bytes.len()).min(bytes.len());
        self.bytes.extend_from_slice(&bytes[..room]);
        std::task::Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Time passes only where everybody waits for it.
    fn on_runtime<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(test)
    }

    #[test]
    fn f3_whoever_takes_the_output_may_take_his_time() {
        on_runtime(async {
            let guest = async |millis| {
                tokio::time::sleep(Duration::from_millis(millis)).await;
                Ok(())
            };
            let mut patience = Patience::new(Some(Duration::from_secs(1)));
            patience.wait(guest(500)).await.unwrap();
            tokio::time::sleep(Duration::from_secs(100)).await;
            patience.wait(guest(400)).await.unwrap();
            assert!(matches!(patience.wait(guest(200)).await, Err(GuestError::Timeout(_))));
            let mut without = Patience::new(None);
            without.wait(guest(1_000_000)).await.unwrap();
        });
    }

    #[test]
    fn f3_no_more_input_is_on_its_way_than_the_guest_has_room_for() {
        let mut header = MetadataMap::new();
        let old = Window::of(&header);
        header.insert(INPUT_WINDOW, 3.into());
        let new = Window::of(&header);
        for (window, room) in [(old, 40), (new, 3)] {
            on_runtime(async {
                let (inputs, mut messages) = mpsc::channel(40);
                let mut feeding = JoinSet::new();
                feeding.spawn(feed(Some(tokio::io::repeat(7)), inputs, window.clone()));
                // Everybody waits by now.
                tokio::time::sleep(Duration::from_secs(1)).await;
                assert_eq!(messages.len(), room);
                let _ = messages.recv().await;
                window.taken(1);
                tokio::time::sleep(Duration::from_secs(1)).await;
                assert_eq!(messages.len(), room);
            });
        }
    }
}
