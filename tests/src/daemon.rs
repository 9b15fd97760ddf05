//! The daemon of one test, and a client that says exactly what the test wants it to say.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc::channel},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{Bench, bench::wait_until};

/// Long enough for an answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running `offshoot serve`; it ends with this value.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    said: Arc<Mutex<Vec<String>>>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, by lower-case name.
    pub headers: BTreeMap<String, String>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Expects a status.
    #[must_use]
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// Expects a problem document with this code.
    #[track_caller]
    pub fn refused(self, status: u16, code: &str) -> Value {
        let answer = self.expect(status);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        let problem = answer.json();
        assert_eq!((&problem["code"], &problem["status"]), (&code.into(), &status.into()), "{problem}");
        problem
    }
}

/// Reads and writes.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Daemon {
    /// Starts one for a test's home, and waits until it takes requests.
    #[must_use]
    #[track_caller]
    pub fn start(bench: &Bench, args: &[&str]) -> Self {
        let command = bench.plain(&[&["serve"], args].concat());
        match args.iter().position(|arg| *arg == "--socket") {
            Some(at) => Self::run(command, Path::new(args[at + 1])),
            None => Self::started(bench, command),
        }
    }

    /// The same with a fault.
    #[must_use]
    #[track_caller]
    pub fn with_fault(bench: &Bench, fault: &str) -> Self {
        let mut command = bench.plain(&["serve"]);
        command.env("OFFSHOOT_FAULT", fault);
        Self::started(bench, command)
    }

    #[track_caller]
    fn started(bench: &Bench, command: Command) -> Self {
        Self::run(command, &bench.state().join("api/offshoot.sock"))
    }

    /// Starts a command that serves on `socket`, and waits until it takes requests.
    #[must_use]
    #[track_caller]
    pub fn run(mut command: Command, socket: &Path) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("offshoot can be started");
        let stderr = child.stderr.take().expect("its errors are piped");
        let said = Arc::new(Mutex::new(Vec::new()));
        let (listening, listens) = channel();
        let keep = Arc::clone(&said);
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let listens = line.starts_with("listening on");
                keep.lock().unwrap().push(line);
                if listens {
                    let _ = listening.send(());
                }
            }
        });
        let daemon = Self { child, socket: socket.to_owned(), said };
        assert!(listens.recv_timeout(PATIENCE).is_ok(), "the daemon does not listen: {:?}", daemon.said());
        daemon
    }

    /// What it said on standard error so far.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }

    /// The port of loopback that it listens on.
    #[must_use]
    #[track_caller]
    pub fn port(&self) -> u16 {
        let said = self.said();
        let port = said.iter().find_map(|line| line.split_once(" and 127.0.0.1:")?.1.split(';').next()?.parse().ok());
        port.unwrap_or_else(|| panic!("no port in {said:?}"))
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the daemon lives");
    }

    /// Asks it to end, and waits.
    #[track_caller]
    pub fn end(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Kills it, as a crash would.
    pub fn crash(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the daemon ends", PATIENCE, || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        status.expect("it has ended")
    }

    /// A connection to its unix socket.
    #[must_use]
    #[track_caller]
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("the daemon listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        stream
    }

    /// Sends a request over the unix socket. `head`: further header lines.
    #[must_use]
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, head: &[&str], body: &[u8]) -> Answer {
        ask(self.connect(), method, path, head, body).expect("the daemon answers")
    }

    /// GET.
    #[must_use]
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], &[])
    }

    /// DELETE.
    #[must_use]
    #[track_caller]
    pub fn delete(&self, path: &str) -> Answer {
        self.request("DELETE", path, &[], &[])
    }

    /// POST of JSON.
    #[must_use]
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &["Content-Type: application/json"], body.to_string().as_bytes())
    }

    /// PUT of JSON.
    #[must_use]
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) -> Answer {
        self.request("PUT", path, &["Content-Type: application/json"], body.to_string().as_bytes())
    }

    /// Makes forks; all must succeed.
    #[must_use]
    #[track_caller]
    pub fn fork(&self, body: &Value) -> Vec<Value> {
        let answer = self.post("/v1/forks", body).expect(201).json();
        let results = answer["results"].as_array().expect("a list");
        results
            .iter()
            .map(|result| result["fork"].clone())
            .inspect(|fork| assert!(fork.is_object(), "{answer}"))
            .collect()
    }

    /// What a shell script in a fork prints, without the newline at its end.
    #[must_use]
    #[track_caller]
    pub fn sh(&self, fork: &str, script: &str) -> String {
        let body = serde_json::json!({ "argv": ["/bin/sh", "-c", script] });
        let ran = self.post(&format!("/v1/forks/{fork}/exec"), &body).expect(200).json();
        assert_eq!(ran["code"], 0, "{ran}");
        ran["stdout"].as_str().expect("text").trim_end().to_owned()
    }

    /// Server-sent events: the name and the data of each, until `enough`.
    #[track_caller]
    pub fn events(&self, path: &str, mut enough: impl FnMut(&str, &Value) -> bool) {
        let mut stream = self.connect();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("it can be asked");
        let (mut kind, mut data) = (String::new(), Value::Null);
        for line in BufReader::new(stream).lines() {
            let line = line.expect("events come");
            if let Some(text) = line.strip_prefix("event:") {
                text.trim().clone_into(&mut kind);
            } else if let Some(text) = line.strip_prefix("data:") {
                data = serde_json::from_str(text.trim()).unwrap_or_default();
            } else if line.is_empty() && !kind.is_empty() {
                if enough(&kind, &data) {
                    return;
                }
                kind.clear();
            }
        }
        panic!("the events ended");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.crash();
    }
}

/// A port of loopback that is free now.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback can be listened on");
    listener.local_addr().expect("it has an address").port()
}

/// One request and its answer. HTTP/1.0: the answer ends with the connection.
///
/// # Errors
/// If the other side does not speak HTTP.
pub fn ask(mut stream: impl Stream, method: &str, path: &str, head: &[&str], body: &[u8]) -> std::io::Result<Answer> {
    let mut text = format!("{method} {path} HTTP/1.0\r\n");
    for line in head {
        text += &format!("{line}\r\n");
    }
    if !body.is_empty() {
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    text += "\r\n";
    stream.write_all(text.as_bytes())?;
    // One that is refused may not be read to its end.
    let sent = stream.write_all(body);
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    if bytes.is_empty() {
        sent?;
        read?;
    }
    let end = bytes.windows(4).position(|part| part == b"\r\n\r\n").ok_or(std::io::ErrorKind::InvalidData)?;
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = text.split("\r\n");
    let status =
        lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).ok_or(std::io::ErrorKind::InvalidData)?;
    let header = |line: &str| line.split_once(':').map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()));
    Ok(Answer { status, headers: lines.filter_map(header).collect(), body: bytes[end + 4..].to_vec() })
}

/// A request over TCP.
///
/// # Errors
/// If nobody listens.
pub fn ask_tcp(port: u16, method: &str, path: &str, head: &[&str], body: &[u8]) -> std::io::Result<Answer> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(stream, method, path, head, body)
}
