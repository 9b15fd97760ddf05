//! N4: whatever clients of the router do, others are served: thousands of requests, slow bodies, half-closed sockets, WebSockets, hostile requests.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::Duration,
};

use offshoot_tests::{Bench, Kind, bench::wait_until, processes};
use rustix::process::Signal;
use tungstenite::Message;

use crate::route::{Client, PATIENCE, Routing, host, reaches, serving};

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
