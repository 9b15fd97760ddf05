//! N4: HTTP and WebSocket by host name. Each name reaches its own fork, only while that runs as itself; whatever clients do, others are served.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    process::{Child, Stdio},
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use offshoot_tests::{Bench, Fork, Kind, Run, Template, bench::wait_until, daemon::Answer, processes, world::Place};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket, client::IntoClientRequest};

use crate::{
    network_acks::{PLUGGED, PULLED},
    pool::{pool, spares},
};

const PATIENCE: Duration = Duration::from_secs(120);

/// Listens on the fork's port 8000. What is asked for is the path: see its names.
const SERVER: &str = r#"
import base64, hashlib, json, os, socket, struct, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while count := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(count))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
    def do_GET(self):
        global resets, asked
        asked += 1
        what = self.path.split("?")[0]
        if what == "/id": self.answer(os.environ["OFFSHOOT_ID"].encode())
        elif what == "/headers": self.answer(json.dumps([self.requestline, self.headers.items()]).encode(), Keep_Alive="timeout=9", X_Own="1")
        elif what == "/sum": self.answer(hashlib.sha256(self.body()).hexdigest().encode())
        elif what == "/big": self.answer(bytes(int(self.path.split("?")[1])))
        elif what == "/later":
            time.sleep(float(self.path.split("?")[1]))
            self.answer(b"later")
        elif what == "/drip":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for _ in range(8):
                self.wfile.write(b"1\r\n.\r\n")
                time.sleep(0.5)
            self.wfile.write(b"0\r\n\r\n")
        elif what in ("/half", "/endless"):
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            try:
                while what == "/endless": self.wfile.write(bytes(65536))
            except OSError: resets += 1
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif what == "/quits":
            # Answers, and ends the connection without having said so.
            self.answer(b"quits")
            self.close_connection = True
        elif what == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
            self.close_connection = True
        elif what == "/ws": self.echo()
        elif what == "/unasked":
            self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
            self.close_connection = True
        else: self.send_error(404)
    do_POST = do_PUT = do_HEAD = do_GET
    def echo(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Connection", "upgrade")
        self.send_header("Upgrade", "websocket")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        def send(kind, data):
            length = bytes([len(data)]) if len(data) < 126 else struct.pack(">BH", 126, len(data)) if len(data) < 65536 else struct.pack(">BQ", 127, len(data))
            self.wfile.write(bytes([0x80 | kind]) + length + data)
        send(1, os.environ["OFFSHOOT_ID"].encode())
        while True:
            head = self.rfile.read(2)
            if len(head) < 2: return
            kind, length = head[0] & 15, head[1] & 127
            if length > 125: length = int.from_bytes(self.rfile.read(2 if length == 126 else 8), "big")
            mask = self.rfile.read(4)
            data = self.rfile.read(length)
            key = (mask * (length // 4 + 1))[:length]
            data = (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
            send(kind, data)
            if kind == 8: return
resets = asked = 0
class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
for port in (8000, 8001):
    threading.Thread(target=Server(("127.0.0.1", port), Handler).serve_forever, daemon=True).start()
"#;

/// `offshoot route` that runs; it is ended with this value.
pub(crate) struct Routing {
    child: Child,
    pub(crate) address: SocketAddr,
    /// Its other lines.
    lines: Option<std::io::Lines<BufReader<std::process::ChildStdout>>>,
}

impl Routing {
    #[track_caller]
    pub(crate) fn start(bench: &Bench, args: &[&str]) -> Self {
        let all = [&["route", "--listen", "127.0.0.1:0", "--port", "8000"], args].concat();
        let mut child = bench.command(&all).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(line) = lines.next() else { panic!("it does not listen: {:?}", child.wait_with_output()) };
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        Self { child, address: line["listening"].as_str().unwrap().parse().unwrap(), lines: Some(lines) }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A request on a connection of its own.
    #[track_caller]
    fn ask(&self, method: &str, host: &str, path: &str, head: &[&str], body: &[u8]) -> Answer {
        Client::new(self.connect()).ask(method, host, path, head, body)
    }

    #[track_caller]
    fn get(&self, host: &str, path: &str) -> Answer {
        self.ask("GET", host, path, &[], &[])
    }

    /// What comes back for these bytes, once the connection has ended.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn websocket(&self, host: &str) -> Result<WebSocket<TcpStream>, String> {
        let request = format!("ws://{host}/ws").into_client_request().unwrap();
        let (socket, answer) = tungstenite::client(request, self.connect()).map_err(|error| error.to_string())?;
        assert_eq!(answer.status(), 101);
        Ok(socket)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn wait(&mut self) -> Option<i32> {
        let mut ended = None;
        wait_until("the router's end", PATIENCE, || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.and_then(|status| status.code())
    }
}

impl Drop for Routing {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|end| end.is_none()) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// One connection, and what is asked on it.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn new(stream: TcpStream) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    #[track_caller]
    fn ask(&mut self, method: &str, host: &str, path: &str, head: &[&str], body: &[u8]) -> Answer {
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n");
        head.iter().for_each(|line| text += &format!("{line}\r\n"));
        if !body.is_empty() {
            text += &format!("Content-Length: {}\r\n", body.len());
        }
        self.stream.get_mut().write_all(&[text.as_bytes(), b"\r\n", body].concat()).unwrap();
        self.answer(method).unwrap()
    }

    /// The next answer; an error if it breaks off.
    fn answer(&mut self, method: &str) -> std::io::Result<Answer> {
        let mut line = || {
            let mut line = String::new();
            match self.stream.read_line(&mut line)? {
                0 => Err(ErrorKind::UnexpectedEof.into()),
                _ => Ok::<_, std::io::Error>(line.trim_end().to_owned()),
            }
        };
        let status = line()?.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap();
        let mut headers = BTreeMap::new();
        loop {
            let line = line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let mut body = Vec::new();
        if method == "HEAD" {
        } else if let Some(length) = headers.get("content-length") {
            body.resize(length.parse().unwrap(), 0);
            self.stream.read_exact(&mut body)?;
        } else if headers.contains_key("transfer-encoding") {
            loop {
                let mut line = String::new();
                self.stream.read_line(&mut line)?;
                let count = usize::from_str_radix(line.trim(), 16).map_err(|_| ErrorKind::UnexpectedEof)?;
                let mut piece = vec![0; count + 2];
                self.stream.read_exact(&mut piece)?;
                if count == 0 {
                    break;
                }
                body.extend(&piece[..count]);
            }
        } else {
            self.stream.read_to_end(&mut body)?;
        }
        Ok(Answer { status, headers, body })
    }
}

fn serving(bench: &Bench, fork: &Fork) {
    let _ = bench.eval(fork, SERVER);
}

fn host(fork: &Fork) -> String {
    format!("{}.localhost", fork.name())
}

/// Whether it reaches this fork.
#[track_caller]
fn reaches(routing: &Routing, host: &str, fork: &Fork) {
    assert_eq!(routing.get(host, "/id").expect(200).text(), fork.id(), "{host}");
}

/// A command that a fault stops in the middle; it goes on when it is told to.
struct Stopped(Child);

impl Stopped {
    fn at(bench: &Bench, point: &str, args: &[&str]) -> Self {
        let mut command = bench.command(args);
        command.env("OFFSHOOT_FAULT", format!("{point}:stop")).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let is_stopped = || {
            fs::read_to_string(&stat)
                .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T")))
        };
        wait_until(point, PATIENCE, is_stopped);
        Self(child)
    }

    fn go_on(self) -> Run {
        kill_process(Pid::from_child(&self.0), Signal::CONT).unwrap();
        let output = self.0.wait_with_output().unwrap();
        Run { args: String::new(), code: output.status.code(), stdout: output.stdout, stderr: output.stderr }
    }
}

#[test]
fn n4_each_name_reaches_its_own_fork_and_nothing_else() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "web", "--network", "none"]);
    forks.iter().for_each(|fork| serving(&bench, fork));
    bench.offshoot(&["route", "--listen", "0.0.0.0:0"]).exits(2).refused("listen_not_loopback");
    for bad in
        [["--suffix", "a/b"], ["--port", "0"], ["--hold", "-1"], ["--max-connections", "0"], ["--listen", "8080"]]
    {
        let _ = bench.offshoot(&[&["route"], &bad[..]].concat()).exits(2);
    }
    let mut far = bench.command(&["route"]);
    far.env("OFFSHOOT_HOST", "http://127.0.0.1:1");
    Run::of(far, &[]).exits(2).refused("local_only");

    let mut routing = Routing::start(&bench, &["--log"]);
    let taken = routing.address.to_string();
    bench.offshoot(&["route", "--listen", &taken]).exits(1).refused("listen_failed");
    for fork in &forks {
        for host in [
            host(fork),
            format!("{}.LOCALHOST.:80", fork.name()),
            format!("{}.localhost", fork.id()),
            format!("8001-{}.localhost", fork.name()),
        ] {
            reaches(&routing, &host, fork);
        }
    }
    assert_ne!(forks[0].id(), forks[1].id(), "the check can fail");
    // One connection, both forks in turns.
    let mut client = Client::new(routing.connect());
    for fork in [&forks[0], &forks[1], &forks[0]] {
        assert_eq!(client.ask("GET", &host(fork), "/id", &[], &[]).expect(200).text(), fork.id());
    }

    // What is no fork's is nobody's: a template's tag, a beginning of an id, other hosts.
    for nobody in ["nobody", &template.tag.to_lowercase(), &forks[0].id()[..10], "x_y", "7-web-3"] {
        let problem = routing.get(&format!("{nobody}.localhost"), "/id").refused(404, "fork_not_found");
        assert!(problem["detail"].as_str().unwrap().contains("offshoot ls"), "{problem}");
    }
    for elsewhere in
        ["localhost", "127.0.0.1", &taken, "web-1.localhost.evil.org", "web-1.evil.org", "a.web-1.localhost"]
    {
        routing.get(elsewhere, "/id").refused(421, "host_not_routed");
    }
    let closed = routing.get(&format!("7-{}", host(&forks[0])), "/id");
    assert_eq!(closed.headers["retry-after"], "1");
    closed.refused(503, "port_closed");

    // What goes there, and what comes back.
    let claims = [
        "X-Forwarded-For: 8.8.8.8",
        "Forwarded: for=8.8.8.8",
        "X-Real-IP: 8.8.8.8",
        "Connection: X-Hop",
        "X-Hop: 1",
        "Cookie: a=b",
    ];
    let answer = routing.ask("GET", "WEB-1.localhost:8080", "/headers?q=1#", &claims, &[]).expect(200);
    assert_eq!((answer.headers.get("keep-alive"), answer.headers.get("x-own")), (None, Some(&"1".to_owned())));
    let got = answer.json();
    assert_eq!(got[0], "GET /headers?q=1 HTTP/1.1");
    let mut headers: Vec<(String, String)> = serde_json::from_value(got[1].clone()).unwrap();
    headers.iter_mut().for_each(|(name, _)| name.make_ascii_lowercase());
    headers.sort();
    let expected = [
        ("cookie", "a=b"),
        ("host", "WEB-1.localhost:8080"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-host", "WEB-1.localhost:8080"),
        ("x-forwarded-proto", "http"),
    ];
    assert_eq!(headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let head = routing.ask("HEAD", "web-1.localhost", "/big?1000", &[], &[]).expect(200);
    assert_eq!((head.headers["content-length"].as_str(), head.body.len()), ("1000", 0));

    // A program that does not keep to HTTP.
    routing.get("web-1.localhost", "/nonsense").refused(502, "fork_answer");
    routing.get("web-1.localhost", "/unasked").refused(502, "fork_answer");
    for path in ["/half", "/endless"] {
        let mut stream = routing.connect();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: web-1.localhost\r\n\r\n").unwrap();
        if path == "/half" {
            let error = stream.read_to_end(&mut Vec::new()).expect_err("an answer that broke off is not whole");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        } else {
            stream.read_exact(&mut [0; 300_000]).unwrap();
        }
    }
    // Ours that breaks off is seen there.
    wait_until("the fork's program stops sending", PATIENCE, || bench.eval(&forks[0], "resets") == 1);

    // The name goes to another fork: the same connection reaches that one, and never the old one.
    let _ = bench.offshoot(&["kill", "web-2"]).ok();
    client.ask("GET", "web-2.localhost", "/id", &[], &[]).refused(404, "fork_not_found");
    let again = bench.fork_one(&template, &["--name", "web-2", "--network", "none"]);
    client.ask("GET", "web-2.localhost", "/id", &[], &[]).refused(503, "port_closed");
    serving(&bench, &again);
    assert_eq!(client.ask("GET", "web-2.localhost", "/id", &[], &[]).expect(200).text(), again.id());
    assert_ne!(again.id(), forks[1].id());
    client.ask("GET", &format!("{}.localhost", forks[1].id()), "/id", &[], &[]).refused(404, "fork_not_found");

    // A dead fork gets nothing, on a connection that has reached it before.
    processes::kill(again.pid());
    wait_until("the machine's end", PATIENCE, || !processes::is_alive(again.pid()));
    client.ask("GET", "web-2.localhost", "/id", &[], &[]).refused(502, "fork_dead");
    assert_eq!(client.ask("GET", "web-1.localhost", "/id", &[], &[]).expect(200).text(), forks[0].id());

    routing.signal(Signal::TERM);
    assert_eq!(routing.wait(), Some(0));
    let log: Vec<Value> =
        routing.lines.take().unwrap().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    let dead = log.iter().find(|line| line["code"] == "fork_dead").unwrap();
    assert_eq!(
        (&dead["fork"], &dead["port"], &dead["status"], &dead["path"]),
        (&json!("web-2"), &json!(8000), &json!(502), &json!("/id"))
    );
    assert!(log.iter().all(|line| !line.to_string().contains("q=1")), "queries are not logged");
    bench.end();
}

#[test]
fn n4_a_fork_that_does_not_run_as_itself_is_waited_for_and_never_reached() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "nap", "--network", "none"]);
    forks.iter().for_each(|fork| serving(&bench, fork));
    let hasty = Routing::start(&bench, &["--hold", "0.5"]);
    let patient = Routing::start(&bench, &["--hold", "300"]);
    forks.iter().for_each(|fork| reaches(&hasty, &host(fork), fork));
    let asked = |fork: &Fork| bench.eval(fork, "asked").as_u64().unwrap();
    let before = asked(&forks[1]);
    let waits = |host: &str, code: &str| {
        let begun = Instant::now();
        let answer = hasty.get(host, "/id");
        assert!(begun.elapsed() >= Duration::from_millis(500), "it is held");
        assert_eq!(answer.headers["retry-after"], "1");
        answer.refused(503, code);
    };
    /// A request that is held until what is done meanwhile; its answer.
    fn held<T>(routing: &Routing, host: &str, meanwhile: impl FnOnce() -> T) -> (T, Answer) {
        thread::scope(|scope| {
            let (tell, told) = channel();
            scope.spawn(move || tell.send(routing.ask("POST", host, "/sum", &[], b"body")));
            let early = told.recv_timeout(Duration::from_secs(2));
            assert!(early.is_err(), "it is answered before its time: {}", early.unwrap().text());
            let done = meanwhile();
            (done, told.recv_timeout(PATIENCE).expect("it is answered"))
        })
    }

    // In standby, and back: the same program answers.
    let _ = bench.offshoot(&["standby", "nap-1"]).ok();
    waits("nap-1.localhost", "fork_in_standby");
    reaches(&hasty, "nap-2.localhost", &forks[1]);
    let (_, answer) = held(&patient, "nap-1.localhost", || bench.offshoot(&["resume", "nap-1"]).ok());
    let sum = answer.expect(200).text();
    assert_eq!(sum.len(), 64);
    reaches(&hasty, "nap-1.localhost", &forks[0]);

    // While it is captured it is frozen.
    let capture =
        Stopped::at(&bench, "capture.quiesced", &["fork", "--from", "nap-1", "--name", "child", "--network", "none"]);
    waits("nap-1.localhost", "fork_busy");
    reaches(&hasty, "nap-2.localhost", &forks[1]);
    let (forked, answer) = held(&patient, "nap-1.localhost", || capture.go_on());
    assert_eq!(answer.expect(200).text(), sum);
    let child = Fork { record: forked.ok().json()["forks"][0].clone() };
    // It has its source's program, and is itself.
    reaches(&patient, "child.localhost", &child);
    reaches(&patient, "nap-1.localhost", &forks[0]);

    // Whoever captured it died: it is brought back, as by every command that finds it.
    let died = bench.offshoot_with_fault("capture.quiesced:kill", &["standby", "nap-1"]);
    assert_eq!(died.code, None);
    reaches(&patient, "nap-1.localhost", &forks[0]);

    // Being made: its identity is there, and nothing of it runs yet.
    hasty.get("new.localhost", "/id").refused(404, "fork_not_found");
    let making =
        Stopped::at(&bench, "fork.delivered", &["fork", "--from", "nap-2", "--name", "new", "--network", "none"]);
    waits("new.localhost", "fork_not_ready");
    let (made, answer) = held(&patient, "new.localhost", || making.go_on());
    assert_eq!(answer.expect(200).text(), sum);
    let new = Fork { record: made.ok().json()["forks"][0].clone() };
    reaches(&hasty, "new.localhost", &new);
    // Held requests reached nobody else, and nobody twice.
    assert_eq!(asked(&forks[1]), before + 2);

    // One that is never made, and one whose maker died.
    let failing =
        Stopped::at(&bench, "fork.delivered", &["fork", &template.tag, "--name", "never", "--network", "none"]);
    let (run, answer) = held(&patient, "never.localhost", || {
        let pid = Pid::from_child(&failing.0);
        kill_process(pid, Signal::TERM).unwrap();
        failing.go_on()
    });
    assert_ne!(run.code, Some(0));
    answer.refused(404, "fork_not_found");
    let died = bench
        .offshoot_with_fault("fork.delivered:kill", &["fork", &template.tag, "--name", "lost", "--network", "none"]);
    assert_eq!(died.code, None);
    hasty.get("lost.localhost", "/id").refused(404, "fork_not_found");
    let _ = bench.offshoot(&["cleanup", "--yes"]).ok();

    // Who is held when the router ends is told so.
    let _ = bench.offshoot(&["standby", "nap-2"]).ok();
    let ((), answer) = held(&patient, "nap-2.localhost", || patient.signal(Signal::TERM));
    answer.refused(503, "router_ending");
    drop((hasty, patient));
    bench.end();
}

#[test]
fn n4_a_fork_whose_network_nobody_waited_for_is_held_until_that_is_acknowledged() {
    let bench = Bench::in_a_world();
    let template: Template = bench.template(Kind::Networked);
    assert_eq!(pool(&bench, &template, 2), 2);
    let ids: Vec<String> = spares(&bench).iter().map(|spare| spare.trim_start_matches(".spare-").to_owned()).collect();
    ids.iter().for_each(|id| drop(bench.place_of(id).sh(PULLED)));
    let late = ["--wait-network=false", "--network-timeout-ms", "30000"];
    let forks: Vec<Fork> =
        ["one", "two"].iter().map(|name| bench.fork_one(&template, &[&["--name", name], &late[..]].concat())).collect();
    let hasty = Routing::start(&bench, &["--hold", "0.5"]);
    let get = |fork: &Fork| within(&bench.world().host, &hasty, &format!("80-{}", host(fork)), "/id");
    for fork in &forks {
        assert_eq!(fork.network("state"), "waiting");
        get(fork).refused(503, "fork_not_ready");
    }
    bench.place_of(forks[0].id()).sh(PLUGGED);
    wait_until("the first is reached", PATIENCE, || get(&forks[0]).status == 200);
    assert_eq!(get(&forks[0]).text().trim(), forks[0].id());
    get(&forks[1]).refused(503, "fork_not_ready");
    bench.place_of(forks[1].id()).sh(PLUGGED);
    wait_until("the second is reached", PATIENCE, || get(&forks[1]).status == 200);
    assert_eq!(get(&forks[1]).text().trim(), forks[1].id());
    drop(hasty);
    let _ = bench.offshoot(&["pool", &template.tag, "0"]).ok();
    bench.end();
}

/// The same from another host's loopback.
fn within(place: &Place, routing: &Routing, host: &str, path: &str) -> Answer {
    place.within(|| routing.get(host, path))
}

#[test]
fn n4_thousands_of_requests_beside_slow_bodies_and_half_closed_sockets() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "many", "--network", "none"]);
    forks.iter().for_each(|fork| serving(&bench, fork));
    let routing = Routing::start(&bench, &[]);
    let large: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[1] ^ number.to_le_bytes()[0]).collect();
    let sum = bench
        .eval(&forks[0], "hashlib.sha256(bytes(((n >> 8) & 255) ^ (n & 255) for n in range(3_000_000))).hexdigest()");

    // They stand still, all the time: nobody reads an endless answer, nobody ends a body.
    let mut still: Vec<TcpStream> = Vec::new();
    for number in 0..16 {
        let mut stream = routing.connect();
        match number % 2 {
            0 => write!(stream, "GET /endless HTTP/1.1\r\nHost: many-1.localhost\r\n\r\n").unwrap(),
            _ => write!(stream, "POST /sum HTTP/1.1\r\nHost: many-1.localhost\r\nContent-Length: 1000\r\n\r\nsome")
                .unwrap(),
        }
        still.push(stream);
    }
    thread::scope(|scope| {
        let (routing, forks) = (&routing, &forks);
        for number in 0..50 {
            scope.spawn(move || {
                let mut client = Client::new(routing.connect());
                for turn in 0..40 {
                    let fork = &forks[(number + turn) % 2];
                    let answer = client.ask("GET", &host(fork), "/id", &[], &[]).expect(200);
                    assert_eq!(answer.text(), fork.id());
                }
            });
        }
        // A slow body up, in chunks.
        scope.spawn(move || {
            let mut client = Client::new(routing.connect());
            let stream = client.stream.get_mut();
            write!(stream, "GET /sum HTTP/1.1\r\nHost: many-2.localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
                .unwrap();
            for _ in 0..8 {
                stream.write_all(b"1\r\n.\r\n").unwrap();
                thread::sleep(Duration::from_millis(500));
            }
            stream.write_all(b"0\r\n\r\n").unwrap();
            // SHA-256 of eight dots.
            let expected = bench_sum(&b"."[..].repeat(8), routing);
            assert_eq!(client.answer("GET").unwrap().expect(200).text(), expected);
        });
        // One down, as it comes.
        scope.spawn(move || {
            let mut client = Client::new(routing.connect());
            write!(client.stream.get_mut(), "GET /drip HTTP/1.1\r\nHost: many-2.localhost\r\n\r\n").unwrap();
            let answer = client.answer("GET").unwrap().expect(200);
            assert_eq!(answer.text(), "........");
        });
        // Large ones both ways.
        let (large, sum) = (&large, &sum);
        scope.spawn(move || {
            let answer = routing.ask("POST", "many-1.localhost", "/sum", &["Expect: 100-continue"], &[]);
            assert_eq!(answer.expect(200).body.len(), 64);
            let answer = routing.ask("POST", "many-1.localhost", "/sum", &[], large).expect(200);
            assert_eq!(answer.text(), sum.as_str().unwrap());
            let answer = routing.get("many-1.localhost", "/big?5000000").expect(200);
            assert!(answer.body.len() == 5_000_000 && answer.body.iter().all(|byte| *byte == 0));
        });
        // Who has nothing more to say still gets an answer.
        scope.spawn(move || {
            for fork in forks {
                let mut stream = routing.connect();
                write!(stream, "GET /later?1 HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", host(fork)).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("later"), "{answer}");
            }
        });
        // Connections that a program ends without a word are no failure of the next request.
        scope.spawn(move || {
            let mut client = Client::new(routing.connect());
            for _ in 0..50 {
                assert_eq!(client.ask("GET", "many-2.localhost", "/quits", &[], &[]).expect(200).text(), "quits");
            }
        });
    });
    drop(still);
    reaches(&routing, "many-1.localhost", &forks[0]);
    drop(routing);
    bench.end();
}

/// The sum that a fork's program finds for a body that comes at once.
fn bench_sum(body: &[u8], routing: &Routing) -> String {
    routing.ask("POST", "many-1.localhost", "/sum", &[], body).expect(200).text()
}

#[test]
fn n4_websockets_go_both_ways_and_end_as_they_should() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "ws", "--network", "none"]);
    forks.iter().for_each(|fork| serving(&bench, fork));
    let mut routing = Routing::start(&bench, &["--grace", "60"]);
    let large: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    thread::scope(|scope| {
        for number in 0..8 {
            let (routing, fork, large) = (&routing, &forks[number % 2], &large);
            scope.spawn(move || {
                let mut socket = routing.websocket(&host(fork)).unwrap();
                assert_eq!(socket.read().unwrap(), Message::text(fork.id()));
                for turn in 0..20 {
                    let text = format!("{number}-{turn}");
                    socket.send(Message::text(text.clone())).unwrap();
                    assert_eq!(socket.read().unwrap(), Message::text(text));
                }
                socket.send(Message::binary(large.clone())).unwrap();
                assert!(socket.read().unwrap() == Message::binary(large.clone()));
                socket.close(None).unwrap();
                while socket.read().is_ok() {}
            });
        }
    });
    // Nobody else is asked to switch, and nothing else than to a WebSocket.
    let answer =
        routing.ask("GET", "ws-1.localhost", "/headers", &["Connection: upgrade", "Upgrade: h2c"], &[]).expect(200);
    assert!(!answer.text().to_lowercase().contains("h2c"), "{}", answer.text());
    assert!(routing.websocket("nobody.localhost").is_err());

    // A fork that ends breaks its own off, and no other.
    let [mut one, mut two] = [0, 1].map(|number| routing.websocket(&host(&forks[number])).unwrap());
    assert_eq!(
        (one.read().unwrap(), two.read().unwrap()),
        (Message::text(forks[0].id()), Message::text(forks[1].id()))
    );
    processes::kill(forks[0].pid());
    assert!(one.read().is_err());
    two.send(Message::text("still")).unwrap();
    assert_eq!(two.read().unwrap(), Message::text("still"));

    // The router ends: what it has begun is answered, WebSockets end, and nobody else gets in.
    let mut client = Client::new(routing.connect());
    write!(client.stream.get_mut(), "GET /later?3 HTTP/1.1\r\nHost: ws-2.localhost\r\n\r\n").unwrap();
    wait_until("the request is there", PATIENCE, || bench.eval(&forks[1], "asked").as_u64() >= Some(6));
    routing.signal(Signal::TERM);
    assert!(two.read().is_err());
    assert_eq!(client.answer("GET").unwrap().expect(200).text(), "later");
    assert_eq!(routing.wait(), Some(0));
    assert!(TcpStream::connect(routing.address).is_err());
    bench.end();
}

#[test]
fn n4_hostile_requests_and_too_many_harm_nobody_else() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "calm", "--network", "none"]);
    forks.iter().for_each(|fork| serving(&bench, fork));
    let routing = Routing::start(&bench, &["--max-connections", "6"]);
    let status = |text: &str| text.split(' ').nth(1).map(ToOwned::to_owned).unwrap_or_default();
    let asked = || bench.eval(&forks[0], "asked").as_u64().unwrap();
    reaches(&routing, "calm-1.localhost", &forks[0]);
    let before = asked();
    let long = format!("GET / HTTP/1.1\r\nHost: calm-1.localhost\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\nHost: calm-1.localhost\r\n{}\r\n", "X: y\r\n".repeat(200));
    for (request, expected) in [
        ("GET /id HTTP/1.1\r\nConnection: close\r\n\r\n", "400"),
        ("GET /id HTTP/1.1\r\nHost: calm-1.localhost\r\nHost: calm-2.localhost\r\nConnection: close\r\n\r\n", "400"),
        ("GET http://calm-2.localhost/id HTTP/1.1\r\nHost: calm-1.localhost\r\nConnection: close\r\n\r\n", "400"),
        ("GET /id HTTP/1.1\r\nHost: a@calm-1.localhost\r\nConnection: close\r\n\r\n", "400"),
        ("CONNECT calm-1.localhost:80 HTTP/1.1\r\nHost: calm-1.localhost:80\r\nConnection: close\r\n\r\n", "405"),
        ("POST /sum HTTP/1.1\r\nHost: calm-1.localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "400"),
        ("POST /sum HTTP/1.1\r\nHost: calm-1.localhost\r\nContent-Length: -1\r\n\r\n", "400"),
        (
            "POST /sum HTTP/1.1\r\nHost: calm-1.localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            "400",
        ),
        ("GET /id\r\n\r\n", "400"),
        ("\x16\x03\x01\x02\r\n\r\n", "400"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""),
        (&long, "431"),
        (&many, "431"),
    ] {
        let answer = routing.raw(request.as_bytes());
        let short: String = request.chars().take(200).collect();
        assert!(
            status(&answer) == expected || (expected.is_empty() && !answer.contains("200 OK")),
            "{short:?}: {answer}"
        );
    }
    assert_eq!(asked(), before, "nothing of it reached a fork");
    // Two lengths of two kinds: one counts, here and there, so that nothing is left for a second request.
    let smuggled = "POST /sum HTTP/1.1\r\nHost: calm-1.localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /big?7 HTTP/1.1\r\nHost: nobody.localhost\r\nConnection: close\r\n\r\n";
    let answer = routing.raw(smuggled.as_bytes());
    assert!(
        !answer.contains("Content-Length: 7") && !answer.to_lowercase().contains("content-length: 7\r\n"),
        "{answer}"
    );
    // In absolute form, as to a proxy: the target counts.
    let answer =
        routing.raw(b"GET http://calm-2.localhost/id HTTP/1.1\r\nHost: calm-2.localhost\r\nConnection: close\r\n\r\n");
    assert!(answer.ends_with(forks[1].id()), "{answer}");

    // Six seats. Whoever comes after that is told so, and gets one when another has left.
    let mut seated: Vec<Client> = (0..6).map(|_| Client::new(routing.connect())).collect();
    for client in &mut seated {
        assert_eq!(client.ask("GET", "calm-1.localhost", "/id", &[], &[]).expect(200).text(), forks[0].id());
    }
    let full = routing.get("calm-1.localhost", "/id");
    assert_eq!(full.headers["retry-after"], "1");
    full.refused(503, "router_full");
    drop(seated.pop());
    wait_until("a seat", PATIENCE, || routing.get("calm-1.localhost", "/id").status == 200);
    // Half a head takes no seat for ever, and neither does a connection that says nothing.
    drop(seated);
    let slow: Vec<TcpStream> = (0..6)
        .map(|number| {
            let mut stream = routing.connect();
            if number % 2 == 0 {
                stream.write_all(b"GET /id HTTP/1.1\r\nHost: calm").unwrap();
            }
            stream
        })
        .collect();
    wait_until("they are sent away", PATIENCE, || routing.get("calm-2.localhost", "/id").status == 200);
    drop((slow, routing));
    bench.end();
}
