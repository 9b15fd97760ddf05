//! F3: ports of a fork's programs, reached through its control channel: whole, both ways, many at once, and never anybody else's.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use offshoot_tests::{Bench, Daemon, Fork, Kind, Run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Listens on the fork's loopback. The first byte says what is wanted: `i`: its id; `e`: everything back once it has ended, with the count before it;
/// `r`: half an answer, then a reset; `b`: bytes without end.
const LISTENER: &str = r#"
import os, socket, struct, threading
def talk(one):
    what = one.recv(1)
    if what == b"i":
        one.sendall(os.environ["OFFSHOOT_ID"].encode())
    elif what == b"e":
        parts = []
        while part := one.recv(65536):
            parts.append(part)
        whole = b"".join(parts)
        one.sendall(b"%d:" % len(whole) + whole)
    elif what == b"r":
        one.sendall(b"half")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif what == b"b":
        try:
            while True:
                one.sendall(bytes(65536))
        except OSError:
            global broken
            broken += 1
    one.close()
def serve(family, address):
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen(256)
    while True:
        threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()
broken = 0
for family, address in [(socket.AF_INET, ("127.0.0.1", 7000)), (socket.AF_INET6, ("::1", 7006))]:
    threading.Thread(target=serve, args=(family, address), daemon=True).start()
while True:
    try:
        socket.create_connection(("127.0.0.1", 7000)).close()
        socket.create_connection(("::1", 7006)).close()
        break
    except OSError:
        pass
"#;

/// `offshoot forward` that runs; it is ended with this value.
pub(crate) struct Forwarding {
    child: Child,
    /// Where it listens, in the order of the arguments.
    pub(crate) addresses: Vec<String>,
}

impl Forwarding {
    fn start(mut command: Command, ports: usize) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = |line: String| match serde_json::from_str::<Value>(&line) {
            Ok(line) => line["listening"].as_str().unwrap().to_owned(),
            Err(_) => line.split(' ').next().unwrap().to_owned(),
        };
        let addresses: Vec<_> = lines.by_ref().take(ports).map(|line| address(line.unwrap())).collect();
        if addresses.len() < ports {
            panic!("it does not listen: {:?}", child.wait_with_output());
        }
        Self { child, addresses }
    }

    fn connect(&self, port: usize) -> TcpStream {
        let stream = TcpStream::connect(&self.addresses[port]).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// What comes back for this, once our side has ended.
    fn ask(&self, port: usize, what: &[u8]) -> Vec<u8> {
        let mut stream = self.connect(port);
        stream.write_all(what).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    }

    /// Its end, and what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        let mut errors = self.child.stderr.take().unwrap();
        let code = self.child.wait().unwrap().code();
        errors.read_to_string(&mut said).unwrap();
        (code, said)
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|end| end.is_none()) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

pub(crate) fn forward(bench: &Bench, fork: &Fork, ports: &[&str]) -> Forwarding {
    Forwarding::start(bench.command(&[&["forward", fork.name()], ports].concat()), ports.len())
}

/// The same through the daemon of this bench.
pub(crate) fn forward_far(bench: &Bench, fork: &Fork, ports: &[&str]) -> Forwarding {
    let mut command = bench.command(&[&["forward", fork.name()], ports].concat());
    command.env("OFFSHOOT_HOST", format!("unix://{}", bench.state().join("api/offshoot.sock").display()));
    Forwarding::start(command, ports.len())
}

fn listening(bench: &Bench, fork: &Fork) {
    let _ = bench.eval(fork, LISTENER);
}

#[test]
fn f3_a_port_of_a_fork_is_a_port_here_and_ends_with_the_fork() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "web", "--network", "none"]);
    forks.iter().for_each(|fork| listening(&bench, fork));
    bench.offshoot(&["forward", &template.tag, "7000"]).exits(1).refused("fork_not_found");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("{}:7000", taken.local_addr().unwrap().port());
    for (ports, exit) in [("0", 2), ("70000", 2), ("a:1", 2), ("1:0", 2), (":80", 2), (taken.as_str(), 1)] {
        let _ = bench.offshoot(&["forward", "web-1", ports]).exits(exit);
    }
    let ports = ["0:7000", "0:7006", "0:7001"];
    let one = forward(&bench, &forks[0], &ports);
    let two = Forwarding::start(bench.plain(&[&["forward", "web-2"], ports.as_slice()].concat()), ports.len());
    for (forwarding, fork) in [(&one, &forks[0]), (&two, &forks[1])] {
        for port in [0, 1] {
            assert_eq!(forwarding.ask(port, b"i"), fork.id().as_bytes(), "each reaches its own");
        }
        // The other side ends only when ours has, and nothing is lost on the way.
        let large: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[0] ^ 0x5a).collect();
        let answer = forwarding.ask(0, &[b"e", large.as_slice()].concat());
        assert!(answer == [b"3000000:", large.as_slice()].concat(), "{} bytes came back", answer.len());
        // A connection that breaks is not one that ends.
        let mut stream = forwarding.connect(0);
        stream.write_all(b"r").unwrap();
        let mut half = Vec::new();
        assert_eq!(stream.read_to_end(&mut half).unwrap_err().kind(), ErrorKind::ConnectionReset);
        // Nobody listens: nobody answers, and the others are as they were.
        let mut closed = forwarding.connect(2);
        assert!(!matches!(closed.read(&mut [0]), Ok(1..)));
        assert_eq!(forwarding.ask(0, b"i"), fork.id().as_bytes());
    }
    // Ours that breaks off is seen there.
    let mut endless = one.connect(0);
    endless.write_all(b"b").unwrap();
    endless.read_exact(&mut [0; 100_000]).unwrap();
    drop(endless);
    let until = Instant::now() + Duration::from_secs(30);
    while bench.eval(&forks[0], "broken") != 1 {
        assert!(Instant::now() < until, "the program still sends");
    }
    kill_process(Pid::from_child(&one.child), Signal::TERM).unwrap();
    assert_eq!(one.end().0, Some(0), "asked to end, it has done what it should");

    let _ = bench.offshoot(&["kill", "web-2"]).ok();
    let (code, said) = two.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("fork web-2 has ended") && said.contains("nothing listens on port 7001"), "{said}");
    bench.end();
}

#[test]
fn f3_many_connections_share_a_channel_and_slow_readers_hold_up_nobody_else() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let forks = bench.fork(&template, &["-n", "2", "--name", "busy", "--network", "none"]);
    forks.iter().for_each(|fork| listening(&bench, fork));
    let forwarding = forward(&bench, &forks[0], &["0:7000"]);
    let other = forward(&bench, &forks[1], &["0:7000"]);
    // They send, and nobody reads.
    let slow: Vec<TcpStream> = (0..16)
        .map(|_| {
            let mut stream = forwarding.connect(0);
            stream.write_all(b"b").unwrap();
            stream
        })
        .collect();
    thread::scope(|scope| {
        for number in 0..64_u8 {
            let (forwarding, other) = (&forwarding, &other);
            scope.spawn(move || {
                let large = vec![number; 100_000];
                let answer = forwarding.ask(0, &[b"e", large.as_slice()].concat());
                assert!(answer == [b"100000:", large.as_slice()].concat(), "{number}: {} bytes", answer.len());
                if number < 8 {
                    assert_eq!(other.ask(0, b"e"), b"0:");
                }
            });
        }
    });
    // Commands go on beside them, also once nothing has been asked for longer than a channel that nobody uses is kept.
    thread::sleep(Duration::from_secs(7));
    assert_eq!(bench.sh(&forks[0], "hostname"), "busy-1");
    drop((slow, forwarding, other));
    bench.end();
}

#[test]
fn f3_a_daemon_forwards_ports_and_runs_64_commands_of_one_fork_at_once() {
    let bench = Bench::new();
    let template = bench.template(Kind::Python);
    let daemon = Daemon::start(&bench, &[]);
    let made = daemon.fork(&json!({"template": template.tag, "count": 2, "name": "far", "network": {"mode": "none"}}));
    let forks: Vec<Fork> = made.into_iter().map(|record| Fork { record }).collect();
    forks.iter().for_each(|fork| listening(&bench, fork));
    daemon.get("/v1/forks/far-1/ports/7000").refused(400, "invalid_request");
    daemon.get("/v1/forks/far-1/ports/0").refused(400, "invalid_request");

    let host = format!("unix://{}", bench.state().join("api/offshoot.sock").display());
    let absent = Run::of(
        {
            let mut command = bench.command(&["forward", "absent", "80"]);
            command.env("OFFSHOOT_HOST", &host);
            command
        },
        &[],
    );
    absent.exits(1).refused("fork_not_found");
    let [one, two] = [&forks[0], &forks[1]].map(|fork| forward_far(&bench, fork, &["0:7000", "0:7001"]));
    for (forwarding, fork) in [(&one, &forks[0]), (&two, &forks[1])] {
        assert_eq!(forwarding.ask(0, b"i"), fork.id().as_bytes());
        let large: Vec<u8> = (0..1_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
        let answer = forwarding.ask(0, &[b"e", large.as_slice()].concat());
        assert!(answer == [b"1000000:", large.as_slice()].concat(), "{} bytes came back", answer.len());
        let mut stream = forwarding.connect(0);
        stream.write_all(b"r").unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut closed = forwarding.connect(1);
        assert!(!matches!(closed.read(&mut [0]), Ok(1..)));
    }
    // More than there are channels, beside connections that stand still.
    let mut endless = one.connect(0);
    endless.write_all(b"b").unwrap();
    thread::scope(|scope| {
        for number in 0..64 {
            let daemon = &daemon;
            scope.spawn(move || {
                let body =
                    json!({"argv": ["sh", "-c", format!("read line; sleep 1; echo $line-{number}")], "stdin": "in\n"});
                let ran = daemon.post("/v1/forks/far-1/exec", &body).expect(200).json();
                assert_eq!((&ran["code"], &ran["stdout"]), (&json!(0), &json!(format!("in-{number}\n"))), "{ran}");
            });
        }
    });
    drop((one, two, daemon));
    bench.end();
}
