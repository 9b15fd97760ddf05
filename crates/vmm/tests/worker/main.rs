//! Workers as the host starts them, with a machine that is memory alone (`examples/idle_worker.rs`): the jail, the protocol,
//! and with whom a worker ends. As root they see all of the jail, else the part that any user can have.
#![allow(clippy::unwrap_used)]

mod jail;
mod life;
mod protocol;

use std::{
    env,
    fs::{self, File},
    io::{IoSlice, Read, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{
            fs::FileExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use offshoot_vmm::{
    config::MachineConfig,
    worker::{
        launch::{Launch, Purpose, Start},
        protocol::{Frame, Phase, Range, Reply, Request, Write},
    },
};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use tempfile::TempDir;

const MEMORY: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(20);
/// A user that nobody else is.
const USER: u32 = 1_900_000_007;
/// What the memory's first bytes say for a resume without a system call.
const NO_CALL: [u8; 4] = [0xff; 4];

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A worker's process and what it was started with.
struct Worker {
    child: Child,
    dir: TempDir,
    memory: File,
}

impl Worker {
    fn start(purpose: Purpose) -> (Self, Client) {
        Self::start_with(purpose, Vec::new(), MEMORY)
    }

    /// `forgotten` are descriptors that it inherits by accident; `memory_bytes` is what it is told of its memory file.
    fn start_with(purpose: Purpose, forgotten: Vec<OwnedFd>, memory_bytes: u64) -> (Self, Client) {
        let dir = tempfile::tempdir().unwrap();
        let memory =
            File::options().create(true).truncate(true).read(true).write(true).open(dir.path().join("memory")).unwrap();
        memory.set_len(MEMORY).unwrap();
        memory.write_all_at(&NO_CALL, 0).unwrap();
        let listener = UnixListener::bind(dir.path().join("monitor.sock")).unwrap();
        let log = File::create(dir.path().join("engine.log")).unwrap();
        let null = || File::open("/dev/null").unwrap();
        let (kvm, root_image, state, ack) = (null(), null(), null(), null());
        let launch = Launch {
            purpose,
            user: is_root().then_some((USER, USER)),
            namespaces: is_root(),
            machine: MachineConfig { memory_bytes, vcpus: 1 },
            kvm: kvm.as_raw_fd(),
            control: listener.as_raw_fd(),
            memory: memory.as_raw_fd(),
            root_image: root_image.as_raw_fd(),
            ack: ack.as_raw_fd(),
            channels: Vec::new(),
            network: None,
            held: Vec::new(),
            start: Start::Restore { state: state.as_raw_fd(), pages: None, own: None },
        };
        let client = Client::connect(&dir);
        let inherited: Vec<RawFd> =
            launch.descriptors().into_iter().chain(forgotten.iter().map(AsRawFd::as_raw_fd)).collect();
        let mut command = Command::new(program());
        command.arg(serde_json::to_string(&launch).unwrap());
        command.current_dir(dir.path()).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: only system calls between fork and exec; the descriptors are open until the spawn is over.
        unsafe {
            command.pre_exec(move || {
                for number in &inherited {
                    fcntl_setfd(BorrowedFd::borrow_raw(*number), FdFlags::empty())?;
                }
                Ok(())
            });
        }
        (Self { child: command.spawn().unwrap(), dir, memory }, client)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("engine.log")).unwrap()
    }

    fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, which must come.
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it lives on; its log: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Beside the folder of this test's program.
fn program() -> PathBuf {
    let folder = env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples");
    folder.join("idle_worker")
}

/// A host process' end of a control socket.
struct Client(UnixStream);

impl Client {
    fn connect(dir: &TempDir) -> Self {
        let stream = UnixStream::connect(dir.path().join("monitor.sock")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    /// The reply as bytes or a refusal; `None` if the connection was closed.
    fn ask(&mut self, request: &Request<'_>, file: Option<&File>) -> Option<Result<Vec<u8>, String>> {
        let frame = Frame::request(request).unwrap();
        match file {
            None => self.0.write_all(frame.bytes()).ok()?,
            Some(file) => {
                let descriptors = [file.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                let parts = [IoSlice::new(frame.bytes())];
                assert_eq!(sendmsg(&self.0, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap(), frame.bytes().len());
            }
        }
        let mut length = [0; 4];
        self.0.read_exact(&mut length).ok()?;
        let reply = Frame::receive(length, &mut self.0).unwrap();
        Some(match reply.as_reply().unwrap() {
            Reply::Done => Ok(Vec::new()),
            Reply::Bytes(bytes) => Ok(bytes.to_vec()),
            Reply::Status { phase, memory_bytes } => {
                assert_eq!(memory_bytes, MEMORY);
                Ok(vec![phase as u8])
            }
            Reply::Refused(reason) => Err(reason.to_owned()),
        })
    }

    fn done(&mut self, request: &Request<'_>) -> Vec<u8> {
        self.ask(request, None).expect("an answer").expect("no refusal")
    }

    fn refused(&mut self, request: &Request<'_>) -> String {
        self.ask(request, None).expect("an answer").expect_err("a refusal")
    }

    fn phase(&mut self) -> Vec<u8> {
        self.done(&Request::Status)
    }

    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.done(&Request::Read(vec![Range { offset, len }]))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.done(&deliver(&[], vec![Write { offset, bytes }]));
    }
}

fn deliver<'a>(expected: &[Write<'a>], writes: Vec<Write<'a>>) -> Request<'a> {
    Request::Deliver { expected: expected.to_vec(), writes }
}

fn is(phase: Phase) -> Vec<u8> {
    vec![phase as u8]
}
