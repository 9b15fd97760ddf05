//! Exec: a command (or a built-in tool) in the workload, its input and output streamed.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use guest_api::proto::{
    Command, ExecExit, ExecInput, ExecOutput, ExecStart, Resize, exec_input::Input, exec_output::Output,
    exec_start::What,
};
use identity::Limits;
use rustix::{
    fs::{Mode, OFlags},
    process::Signal,
    pty::{OpenptFlags, ioctl_tiocgptpeer},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    net::unix::pipe,
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use crate::{
    state::AgentState,
    workload::{Among, Console, Process, Program, Start, StartError},
};

/// Bytes of output per message.
const CHUNK: usize = 16 * 1024;
/// Messages of output that may wait; a slow reader stops the command, it does not fill memory.
const WAITING: usize = 8;
/// Messages of input that may wait for a command that does not read, while sizes and signals pass them.
pub(super) const INPUT_WINDOW: u16 = 16;
/// What a pipe holds, where the kernel does not say, and more than a terminal does.
const PIPE: usize = 64 * 1024;

/// Numbers the cgroups of commands.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Makes a message of output.
type Wrap = fn(Vec<u8>) -> Output;
type Replies = mpsc::Sender<Result<ExecOutput, Status>>;

/// Starts what the first message asks for.
pub(super) async fn start(
    state: Arc<AgentState>,
    mut input: Streaming<ExecInput>,
) -> Result<mpsc::Receiver<Result<ExecOutput, Status>>, Status> {
    let first = input.message().await?.and_then(|message| message.input);
    let Some(Input::Start(ExecStart { what: Some(what), timeout_ms })) = first else {
        return Err(Status::invalid_argument("the first message must say what to run"));
    };
    let (replies, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let exit = match Running::start(&state, what) {
            Ok(running) => running.run(input, &replies, timeout_ms).await,
            Err(error) => Some(not_started(&error)),
        };
        if let Some(exit) = exit {
            let _ = replies.send(Ok(output(Output::Exit(exit)))).await;
        }
    });
    Ok(receiver)
}

fn output(output: Output) -> ExecOutput {
    ExecOutput { output: Some(output) }
}

/// Exit codes as a shell gives them: 127 not found, 126 found and not run.
fn not_started(error: &StartError) -> ExecExit {
    let code = match error {
        StartError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
        _ => 126,
    };
    ExecExit { code, timed_out: false, error: error.to_string() }
}

struct Running {
    process: Arc<Process>,
    stdin: Option<Sink>,
    /// With what makes a message of their bytes.
    sources: Vec<(Source, Wrap)>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

enum Sink {
    Pipe(pipe::Sender),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

enum Source {
    Pipe(pipe::Receiver),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl Running {
    fn start(state: &AgentState, what: What) -> Result<Self, StartError> {
        let group = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let env = state.environment();
        let (program, command) = match what {
            What::Command(command) => (Program::Command(command.argv.clone()), command),
            What::Unpack(path) => (Program::Tool("unpack", path.path), Command::default()),
            What::Pack(path) => (Program::Tool("pack", path.path), Command::default()),
            What::Facts(_) => (Program::Tool("facts", String::new()), Command::default()),
        };
        let io_error = |source| StartError::Exec { program: "the command".into(), source };
        let mut start = Start {
            group,
            program,
            env: env.into_iter().chain(command.env).collect(),
            workdir: command.workdir,
            user: command.user,
            console: Console::Pipes([None, None, None]),
            inherited: None,
            place: Among::Workload,
            limits: Limits::default(),
        };
        if command.tty {
            start.env.entry("TERM".into()).or_insert_with(|| "xterm".into());
            let (ours, theirs) = open_terminal(state).map_err(io_error)?;
            set_size(&ours, command.rows, command.cols);
            start.console = Console::Terminal(theirs);
            let process = state.workload().start(start)?;
            // SAFETY: an OwnedFd stands for one open file until it is dropped, and the AsyncFd owns it until then.
            let terminal = unsafe { AsyncFd::register(ours) }.map_err(|error| io_error(error.into()))?;
            let terminal = Arc::new(terminal);
            return Ok(Self {
                process: Arc::new(process),
                stdin: Some(Sink::Terminal(Arc::clone(&terminal))),
                sources: vec![(Source::Terminal(Arc::clone(&terminal)), Output::Stdout)],
                terminal: Some(terminal),
            });
        }
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| io_error(error.into()));
        let ((in_theirs, in_ours), (out_ours, out_theirs), (err_ours, err_theirs)) = (pipe()?, pipe()?, pipe()?);
        start.console = Console::Pipes([Some(in_theirs), Some(out_theirs), Some(err_theirs)]);
        let process = state.workload().start(start)?;
        let receiver = |fd: OwnedFd| pipe::Receiver::from_owned_fd(fd).map(Source::Pipe).map_err(io_error);
        for fd in [&in_ours, &out_ours, &err_ours] {
            rustix::io::ioctl_fionbio(fd, true).map_err(|error| io_error(error.into()))?;
        }
        Ok(Self {
            process: Arc::new(process),
            stdin: Some(Sink::Pipe(pipe::Sender::from_owned_fd(in_ours).map_err(io_error)?)),
            sources: vec![(receiver(out_ours)?, Output::Stdout), (receiver(err_ours)?, Output::Stderr)],
            terminal: None,
        })
    }

    /// Runs to the end. `None` if nobody listens any more; the command and all it started are dead then.
    async fn run(mut self, input: Streaming<ExecInput>, replies: &Replies, timeout_ms: u64) -> Option<ExecExit> {
        let process = Arc::clone(&self.process);
        // Ends with this function, however that ends.
        let mut feeding = JoinSet::new();
        let (queue, waiting) = mpsc::channel(usize::from(INPUT_WINDOW));
        feeding.spawn(write_input(waiting, self.stdin.take(), replies.clone()));
        feeding.spawn(feed(input, queue, Arc::clone(&process), self.terminal.take()));
        let mut pumps: JoinSet<()> = self
            .sources
            .drain(..)
            .map(|(source, wrap)| pump(source, wrap, Arc::clone(&process), replies.clone()))
            .collect();
        let deadline = deadline(timeout_ms);
        tokio::pin!(deadline);
        let (exit, timed_out) = tokio::select! {
            exit = process.exited() => (exit, false),
            () = replies.closed() => {
                kill(&process).await;
                return None;
            }
            () = &mut deadline => {
                kill(&process).await;
                (process.exited().await, true)
            }
        };
        drop(feeding);
        let passed_on = async { while pumps.join_next().await.is_some() {} };
        tokio::pin!(passed_on);
        tokio::select! {
            () = &mut passed_on => {}
            // A reader that takes its time does not give what the command left behind more of it. What was written is still passed on.
            () = &mut deadline, if !timed_out => {
                kill(&process).await;
                passed_on.await;
            }
        }
        Some(ExecExit { code: exit.code(), timed_out, error: String::new() })
    }
}

async fn kill(process: &Arc<Process>) {
    let process = Arc::clone(process);
    let _ = tokio::task::spawn_blocking(move || process.kill_tree()).await;
}

/// Never, for 0.
async fn deadline(timeout_ms: u64) {
    if timeout_ms == 0 {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(Duration::from_millis(timeout_ms)).await;
}

/// A terminal of the workload's own devpts, so that its name is right in there: our end and the command's.
fn open_terminal(state: &AgentState) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let ours = match state.workload().place() {
        Some(place) => rustix::fs::openat(&place.root, "dev/pts/ptmx", flags, Mode::empty())?,
        None => rustix::fs::open("/dev/ptmx", flags, Mode::empty())?,
    };
    rustix::pty::unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    Ok((ours, theirs))
}

fn set_size(terminal: &OwnedFd, rows: u32, cols: u32) {
    let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let (ws_row, ws_col) = if rows == 0 || cols == 0 { (24, 80) } else { (size(rows), size(cols)) };
    let _ = tcsetwinsize(terminal, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 });
}

/// The client's messages: sizes and signals, which are obeyed at once, and input, which waits for the command in `queue`. A client that keeps to
/// the window never finds that full; one that does not know of it has its other messages held up.
async fn feed(
    mut input: Streaming<ExecInput>,
    queue: mpsc::Sender<Vec<u8>>,
    process: Arc<Process>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
) {
    let mut queue = Some(queue);
    while let Some(Ok(message)) = input.next().await {
        match message.input {
            Some(Input::Stdin(bytes)) => {
                if let Some(queue) = &queue {
                    let _ = queue.send(bytes).await;
                }
            }
            Some(Input::CloseStdin(_)) => queue = None,
            Some(Input::Resize(Resize { rows, cols })) => {
                if let Some(terminal) = &terminal {
                    set_size(terminal.get_ref(), rows, cols);
                }
            }
            Some(Input::Signal(number)) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    let _ = process.signal(signal);
                }
            }
            Some(Input::Start(_)) | None => {}
        }
    }
    // The client's side of the stream is closed; the command may go on reading nothing.
    drop(terminal);
}

/// Writes what waits in the queue to the command until its end, which is the end of the command's input, and says how much of it was taken.
async fn write_input(mut queue: mpsc::Receiver<Vec<u8>>, mut stdin: Option<Sink>, replies: Replies) {
    while let Some(bytes) = queue.recv().await {
        let failed = match &mut stdin {
            Some(Sink::Pipe(pipe)) => pipe.write_all(&bytes).await.is_err(),
            Some(Sink::Terminal(terminal)) => write_terminal(terminal, &bytes).await.is_err(),
            None => false,
        };
        if failed {
            // The command has closed its input: what still comes is dropped.
            stdin = None;
        }
        if replies.send(Ok(output(Output::InputTaken(1)))).await.is_err() {
            return;
        }
    }
    if let Some(Sink::Terminal(terminal)) = &stdin {
        // Control-D, which is how a terminal's input ends.
        let _ = write_terminal(terminal, &[4]).await;
    }
}

async fn write_terminal(terminal: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = terminal.writable().await?;
        let written = ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?));
        match written {
            Ok(count) => bytes = bytes.get(count?..).unwrap_or_default(),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// Moves output until its end. Once the command has ended, no more than was there already: a process it left behind may keep
/// the pipe open for ever, or write for ever.
async fn pump(mut source: Source, wrap: Wrap, process: Arc<Process>, replies: Replies) {
    let mut buffer = vec![0; CHUNK];
    let mut left = None;
    loop {
        if left.is_none() && process.exit().is_some() {
            left = Some(source.capacity());
        }
        let read = match &mut left {
            Some(left) => {
                let most = CHUNK.min(*left);
                let read = source.read_now(&mut buffer[..most]);
                *left -= read.as_ref().map_or(0, |count| *count);
                read
            }
            None => tokio::select! {
                biased;
                read = source.read(&mut buffer) => read,
                _ = process.exited() => continue,
            },
        };
        match read {
            Ok(count) if count > 0 => {
                if replies.send(Ok(output(wrap(buffer[..count].to_vec())))).await.is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

impl Source {
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Terminal(terminal) => loop {
                let mut ready = terminal.readable().await?;
                if let Ok(read) = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?)) {
                    return read;
                }
            },
        }
    }

    /// Most bytes that can be in it.
    fn capacity(&self) -> usize {
        match self {
            Self::Pipe(pipe) => rustix::pipe::fcntl_getpipe_size(pipe).unwrap_or(PIPE),
            Self::Terminal(_) => PIPE,
        }
    }

    /// What is there by now. The descriptor itself is asked: the runtime's `try_read` says "nothing" as long as it has not
    /// heard of what came, and the last output of a command comes together with its end.
    fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let fd = match &*self {
            Self::Pipe(pipe) => pipe.as_fd(),
            Self::Terminal(terminal) => terminal.get_ref().as_fd(),
        };
        Ok(rustix::io::read(fd, buffer)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::workload::Workload;

    #[test]
    fn output_that_the_runtime_has_not_heard_of_yet_is_there_to_be_read() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
            let mut source = Source::Pipe(pipe::Receiver::from_owned_fd(ours).unwrap());
            rustix::io::write(&theirs, b"last words").unwrap();
            let mut buffer = [0; 64];
            assert_eq!(source.read_now(&mut buffer).unwrap(), 10);
            drop(theirs);
            assert_eq!(source.read_now(&mut buffer).unwrap(), 0);
        });
    }

    #[test]
    fn f3_of_what_is_written_after_the_commands_end_no_more_is_read_than_a_pipe_holds() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let start = Start {
                group: "exec-true".into(),
                program: Program::Command(vec!["/bin/true".into()]),
                env: std::collections::BTreeMap::new(),
                workdir: String::new(),
                user: String::new(),
                console: Console::Pipes([None, None, None]),
                inherited: None,
                place: Among::Workload,
                limits: Limits::default(),
            };
            let process = Arc::new(Workload::bare().unwrap().start(start).unwrap());
            let _ = process.exited().await;
            let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
            let capacity = rustix::pipe::fcntl_getpipe_size(&theirs).unwrap();
            // It is never empty.
            let fill = || while rustix::io::write(&theirs, &[b'y'; 4096]).is_ok() {};
            fill();
            let (replies, mut outputs) = mpsc::channel(1);
            let source = Source::Pipe(pipe::Receiver::from_owned_fd(ours).unwrap());
            tokio::spawn(pump(source, Output::Stdout, process, replies));
            let mut total = 0;
            while let Some(message) = outputs.recv().await {
                let Some(Output::Stdout(bytes)) = message.unwrap().output else { panic!("it is no output") };
                total += bytes.len();
                assert!(total <= capacity, "{total} of {capacity}");
                fill();
            }
            assert_eq!(total, capacity);
        });
    }
}
