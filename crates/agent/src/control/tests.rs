//! The server over a real session, without a guest.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use guest_api::{
    flow::TO_HOST,
    proto::{
        Command, EvalRequest, ExecExit, ExecInput, ExecOutput, ExecStart, ForwardInput, PingRequest,
        agent_client::AgentClient, exec_input::Input, exec_output::Output, exec_start::What, forward_input,
        forward_output,
    },
    session::{self, Acceptor, Decoder, Event, Frame, Kind, encode},
};
use hyper_util::rt::TokioIo;
use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::UnixStream,
    time::timeout,
};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::*;
use crate::{Freeze, keeper::Keeper, state::Phase, workload::Workload};

/// Generous: the machine may be busy.
const LIMIT: Duration = Duration::from_secs(30);

fn on_runtime<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(async { timeout(LIMIT, test).await.expect("in time") });
    runtime.shutdown_background();
    result
}

/// A port whose other end is a socket.
fn socket_port() -> (OwnedFd, UnixStream) {
    let (guest, host) = UnixStream::pair().unwrap();
    (OwnedFd::from(guest.into_std().unwrap()), host)
}

/// The guest's driver on a port, and the sessions it finds.
fn started(port: OwnedFd) -> mpsc::Receiver<DuplexStream> {
    let (sessions, incoming) = mpsc::channel(4);
    port::start(port, sessions).unwrap();
    incoming
}

fn frame(kind: Kind, session: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(kind, session, payload, &mut bytes);
    bytes
}

/// The next frame that the guest sends.
async fn next_frame(host: &mut UnixStream, decoder: &mut Decoder) -> Frame {
    let mut byte = [0];
    loop {
        host.read_exact(&mut byte).await.unwrap();
        let mut found = None;
        decoder.push(&byte, |frame| found = Some(frame));
        if let Some(frame) = found {
            return frame;
        }
    }
}

#[test]
fn a_hello_in_the_middle_of_a_session_ends_it_and_nothing_of_it_reaches_the_next() {
    on_runtime(async {
        let (port, mut host) = socket_port();
        let (mut sessions, mut decoder) = (started(port), Decoder::default());
        host.write_all(&[frame(Kind::Hello, 1, b""), frame(Kind::Data, 1, b"one")].concat()).await.unwrap();
        assert_eq!(next_frame(&mut host, &mut decoder).await.kind, Kind::HelloAck);
        let mut first = sessions.recv().await.unwrap();
        let mut text = [0; 3];
        first.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"one");
        // Its maker dies in the middle of a frame; the next one comes while it is still open.
        let cut = frame(Kind::Data, 1, b"never whole");
        let next =
            [&cut[..9], &frame(Kind::Hello, 2, b""), &frame(Kind::Data, 1, b"late"), &frame(Kind::Data, 2, b"two")];
        host.write_all(&next.concat()).await.unwrap();
        assert_eq!(
            next_frame(&mut host, &mut decoder).await,
            Frame { kind: Kind::HelloAck, session: 2, payload: vec![] }
        );
        assert_eq!(first.read(&mut text).await.unwrap(), 0, "the first session has ended");
        let mut second = sessions.recv().await.unwrap();
        second.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"two");
        // What the first session's user still says goes nowhere; the second's goes out.
        let _ = first.write_all(b"stale").await;
        second.write_all(b"fresh").await.unwrap();
        let answer = next_frame(&mut host, &mut decoder).await;
        assert_eq!((answer.session, &answer.payload[..]), (2, &b"fresh"[..]));
    });
}

#[test]
fn a_hello_that_is_sent_again_is_answered_again_and_ends_nothing() {
    on_runtime(async {
        let (port, mut host) = socket_port();
        let (mut sessions, mut decoder) = (started(port), Decoder::default());
        for _ in 0..3 {
            host.write_all(&frame(Kind::Hello, 7, b"")).await.unwrap();
            assert_eq!(next_frame(&mut host, &mut decoder).await.kind, Kind::HelloAck);
        }
        host.write_all(&[frame(Kind::Data, 7, b"abc"), frame(Kind::Close, 7, b"")].concat()).await.unwrap();
        let mut text = String::new();
        sessions.recv().await.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "abc");
        assert!(sessions.try_recv().is_err(), "it is one session");
    });
}

/// A port as the kernel shows it: the other end can be closed and opened again. A pseudo-terminal in raw mode is one.
struct Pty {
    name: String,
}

impl Pty {
    fn new() -> (Self, OwnedFd) {
        let port = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&port).unwrap();
        unlockpt(&port).unwrap();
        rustix::io::ioctl_fionbio(&port, true).unwrap();
        let name = ptsname(&port, Vec::new()).unwrap().into_string().unwrap();
        (Self { name }, port)
    }

    fn open(&self) -> OwnedFd {
        let host =
            rustix::fs::open(&*self.name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut mode = tcgetattr(&host).unwrap();
        mode.make_raw();
        tcsetattr(&host, OptionalActions::Now, &mode).unwrap();
        host
    }
}

/// What the guest sends in this session. Its frames have the form of the host's, as far as they are looked at here.
fn read_data(host: impl AsFd, session: u64) -> Vec<u8> {
    let mut acceptor = Acceptor::default();
    let mut buffer = [0; 256];
    loop {
        let count = rustix::io::read(&host, &mut buffer).unwrap();
        for event in acceptor.push(&buffer[..count]) {
            // The end of the session before may still be on its way.
            if let Event::Data(number, data) = event
                && number == session
            {
                return data;
            }
        }
    }
}

#[test]
fn a_host_that_hangs_up_ends_its_session_and_another_can_come() {
    on_runtime(async {
        let (pty, port) = Pty::new();
        let mut host = pty.open();
        let mut sessions = started(port);
        for number in 1..=3 {
            rustix::io::write(&host, &frame(Kind::Hello, number, b"")).unwrap();
            let mut session = sessions.recv().await.unwrap();
            session.write_all(b"hi").await.unwrap();
            let reading = tokio::task::spawn_blocking(move || (read_data(&host, number), host));
            let (data, answered) = reading.await.unwrap();
            assert_eq!(data, b"hi");
            drop(answered);
            assert_eq!(session.read(&mut [0; 8]).await.unwrap(), 0, "a hang-up ends the session");
            host = pty.open();
        }
    });
}

#[test]
fn a_host_that_looks_absent_for_a_second_keeps_its_session() {
    on_runtime(async {
        let (pty, port) = Pty::new();
        let host = pty.open();
        let mut sessions = started(port);
        rustix::io::write(&host, &frame(Kind::Hello, 1, b"")).unwrap();
        let mut session = sessions.recv().await.unwrap();
        // As the port looks where the kernel has not heard of the host yet.
        drop(host);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let host = pty.open();
        rustix::io::write(&host, &frame(Kind::Data, 1, b"go on")).unwrap();
        let mut text = [0; 5];
        session.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"go on");
    });
}

#[derive(Debug)]
struct Guest {
    state: Arc<AgentState>,
    client: AgentClient<Channel>,
}

/// The whole server on a port, and a client connected as the host does it.
async fn guest() -> Guest {
    let state = AgentState::new(Workload::bare().unwrap(), Keeper::bare(), Freeze::On);
    let (port, host) = socket_port();
    let (incoming, serving) = (started(port), Arc::clone(&state));
    tokio::spawn(async move { serve_incoming(&serving, incoming).await });
    let stream = Mutex::new(Some(session::connect(host, 9, LIMIT).await.unwrap()));
    let connector = tower::service_fn(move |_| {
        let stream = stream.lock().unwrap().take();
        async move { stream.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    let endpoint = Endpoint::from_static("http://guest")
        .initial_stream_window_size(TO_HOST.stream)
        .initial_connection_window_size(TO_HOST.channel);
    let channel = endpoint.connect_with_connector(connector).await.unwrap();
    Guest { state, client: AgentClient::new(channel) }
}

fn run(argv: &[&str], timeout_ms: u64) -> Input {
    let argv = argv.iter().map(|word| (*word).to_owned()).collect();
    let command = Command { argv, env: [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into(), ..Command::default() };
    Input::Start(ExecStart { what: Some(What::Command(command)), timeout_ms })
}

impl Guest {
    async fn exec(&mut self, inputs: Vec<Input>) -> Result<Streaming<ExecOutput>, Status> {
        Ok(self.exec_open(inputs).await?.0)
    }

    /// With what holds the stream of requests open.
    async fn exec_open(
        &mut self,
        inputs: Vec<Input>,
    ) -> Result<(Streaming<ExecOutput>, mpsc::Sender<ExecInput>), Status> {
        let (more, rest) = mpsc::channel(1);
        let inputs = tokio_stream::iter(inputs.into_iter().map(|input| ExecInput { input: Some(input) }));
        Ok((self.client.exec(inputs.chain(ReceiverStream::new(rest))).await?.into_inner(), more))
    }
}

/// Bytes of standard output and error, and the end.
async fn collect(mut outputs: Streaming<ExecOutput>) -> (Vec<u8>, Vec<u8>, ExecExit) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match outputs.message().await.unwrap().expect("an end").output {
            Some(Output::Stdout(bytes)) => stdout.extend(bytes),
            Some(Output::Stderr(bytes)) => stderr.extend(bytes),
            Some(Output::Exit(exit)) => return (stdout, stderr, exit),
            Some(Output::InputTaken(_)) | None => {}
        }
    }
}

#[test]
fn a_session_serves_requests_side_by_side() {
    on_runtime(async {
        let mut guest = guest().await;
        let waiting = guest.exec_open(vec![run(&["cat"], 0)]).await.unwrap();
        let reply = guest.client.ping(PingRequest {}).await.unwrap().into_inner();
        assert_eq!((reply.state.as_str(), reply.fork_id.as_str()), ("template", ""));
        let script = "cat; echo err >&2; exit 3";
        let input = vec![run(&["sh", "-c", script], 0), Input::Stdin(b"in".to_vec()), Input::CloseStdin(true)];
        let (stdout, stderr, exit) = collect(guest.exec(input).await.unwrap()).await;
        assert_eq!((&stdout[..], &stderr[..], exit.code), (&b"in"[..], &b"err\n"[..], 3));
        drop(waiting);
    });
}

#[test]
fn all_output_arrives_at_a_slow_reader_and_a_fast_one() {
    on_runtime(async {
        let mut guest = guest().await;
        let slow = guest.exec(vec![run(&["head", "-c", "3000000", "/dev/zero"], 0)]).await.unwrap();
        let fast = guest.exec(vec![run(&["head", "-c", "2000000", "/dev/zero"], 0)]).await.unwrap();
        assert_eq!(collect(fast).await.0.len(), 2_000_000);
        assert_eq!(collect(slow).await.0.len(), 3_000_000);
    });
}

#[test]
fn f3_what_can_not_run_says_so_with_a_shells_exit_code() {
    on_runtime(async {
        let mut guest = guest().await;
        for (argv, code) in
            [(&["/nowhere/to/be/found"][..], 127), (&["/etc/passwd"], 126), (&[], 126), (&["a\0b"], 126)]
        {
            let (_, _, exit) = collect(guest.exec(vec![run(argv, 0)]).await.unwrap()).await;
            assert_eq!(exit.code, code, "{argv:?}");
            assert!(!exit.error.is_empty());
        }
        let refused = guest.exec(vec![Input::Stdin(b"x".to_vec())]).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    });
}

#[test]
fn f3_a_deadline_ends_the_command() {
    on_runtime(async {
        let mut guest = guest().await;
        let (_, _, exit) = collect(guest.exec(vec![run(&["sleep", "1000"], 50)]).await.unwrap()).await;
        assert!(exit.timed_out);
    });
}

#[test]
fn f3_what_a_command_leaves_behind_may_write_without_end() {
    on_runtime(async {
        let mut guest = guest().await;
        let script = "yes & echo started >&2; exit 4";
        let (_, stderr, exit) = collect(guest.exec(vec![run(&["sh", "-c", script], 0)]).await.unwrap()).await;
        assert_eq!((&stderr[..], exit.code, exit.timed_out), (&b"started\n"[..], 4, false));
    });
}

#[test]
fn f3_signals_pass_the_input_that_a_command_does_not_read() {
    on_runtime(async {
        let mut guest = guest().await;
        let script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done";
        let (more, inputs) = mpsc::channel(1);
        let send = async |input| more.send(ExecInput { input: Some(input) }).await.unwrap();
        let start = tokio_stream::once(ExecInput { input: Some(run(&["sh", "-c", script], 0)) });
        let mut answer = guest.client.exec(start.chain(ReceiverStream::new(inputs))).await.unwrap();
        let window: usize = answer.metadata().get(guest_api::INPUT_WINDOW).unwrap().to_str().unwrap().parse().unwrap();
        let Some(Output::Stdout(ready)) = answer.get_mut().message().await.unwrap().unwrap().output else { panic!() };
        assert_eq!(ready, b"ready\n");
        // More than a pipe holds.
        assert!(window * 16 * 1024 > 128 * 1024);
        for _ in 0..window {
            send(Input::Stdin(vec![b'x'; 16 * 1024])).await;
        }
        send(Input::Signal(libc::SIGUSR1)).await;
        let (stdout, _, exit) = collect(answer.into_inner()).await;
        assert_eq!((&stdout[..], exit.code), (&b"caught\n"[..], 5));
    });
}

#[test]
fn a_command_whose_caller_left_is_ended() {
    on_runtime(async {
        let mut guest = guest().await;
        let mut outputs = guest.exec(vec![run(&["sh", "-c", "echo $$; exec sleep 1000"], 0)]).await.unwrap();
        let Some(Output::Stdout(pid)) = outputs.message().await.unwrap().unwrap().output else { panic!("no pid") };
        let process = Path::new("/proc").join(String::from_utf8(pid).unwrap().trim());
        assert!(process.exists());
        drop(outputs);
        let start = Instant::now();
        while process.exists() {
            assert!(start.elapsed() < LIMIT, "it lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn nothing_runs_while_the_sandbox_is_frozen_and_ping_says_why() {
    on_runtime(async {
        let mut guest = guest().await;
        guest.state.set_phase(Phase::Quiesced);
        let refused = guest.exec(vec![run(&["true"], 0)]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let eval = EvalRequest { code: "1".into(), timeout_ms: 1000 };
        assert_eq!(guest.client.eval(eval).await.unwrap_err().code(), Code::FailedPrecondition);
        assert_eq!(guest.client.ping(PingRequest {}).await.unwrap().into_inner().state, Phase::Quiesced.as_str());
    });
}

#[test]
fn a_request_that_is_too_long_is_refused_and_the_session_lives_on() {
    on_runtime(async {
        let mut guest = guest().await;
        let code = |len| EvalRequest { code: "x".repeat(len), timeout_ms: 1000 };
        assert_eq!(guest.client.eval(code((1 << 20) + 1)).await.unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(guest.client.eval(code(MAX_REQUEST + 1)).await.unwrap_err().code(), Code::OutOfRange);
        assert!(guest.client.ping(PingRequest {}).await.is_ok());
    });
}

#[test]
fn n4_streams_that_nobody_takes_from_keep_no_other_waiting() {
    on_runtime(async {
        let mut guest = guest().await;
        // More than once filled what a channel had: 128 with what goes into the guest, 256 with what comes out of it.
        let (up, down) = (144, 272);
        let mut still = Vec::new();
        for _ in 0..up {
            let mut inputs = vec![run(&["sleep", "1009"], 0)];
            // A pipe takes 64 KiB of it.
            inputs.extend((0..16).map(|_| Input::Stdin(vec![0; 32 << 10])));
            still.push(guest.exec_open(inputs).await.unwrap());
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move { stream.write_all(&[0; 512 << 10]).await });
            }
        });
        let forward = async |guest: &mut Guest| {
            let (more, rest) = mpsc::channel(1);
            more.send(ForwardInput { input: Some(forward_input::Input::Port(port.into())) }).await.unwrap();
            (guest.client.forward(ReceiverStream::new(rest)).await.unwrap().into_inner(), more)
        };
        let mut unread = Vec::new();
        for _ in 0..down {
            unread.push(forward(&mut guest).await);
        }
        for _ in 0..4 {
            let mut input = vec![run(&["cat"], 0)];
            input.extend((0..32).map(|_| Input::Stdin(vec![1; 32 << 10])));
            input.push(Input::CloseStdin(true));
            assert_eq!(collect(guest.exec(input).await.unwrap()).await.0.len(), 1 << 20);
            let (mut outputs, _more) = forward(&mut guest).await;
            let mut count = 0;
            while let Some(forward_output::Output::Data(bytes)) = outputs.message().await.unwrap().unwrap().output {
                count += bytes.len();
            }
            assert_eq!(count, 512 << 10);
        }
        assert_eq!(children(b"sleep\x001009\0"), up);
        drop((still, unread));
        let start = Instant::now();
        while children(b"sleep\x001009\0") > 0 {
            assert!(start.elapsed() < LIMIT, "commands live on whose callers left");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

/// How many processes of this test's have this command line.
fn children(command: &[u8]) -> usize {
    let ours = format!("PPid:\t{}\n", std::process::id());
    let is_one = |dir: &Path| {
        fs::read(dir.join("cmdline")).is_ok_and(|line| line == command)
            && fs::read_to_string(dir.join("status")).is_ok_and(|status| status.contains(&ours))
    };
    fs::read_dir("/proc").unwrap().flatten().filter(|entry| is_one(&entry.path())).count()
}
