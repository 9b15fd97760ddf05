//! N4: a fork that answers nothing has a part of the router, never all of it. The forks are records with an agent of the tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fork;

use std::{future::pending, net::SocketAddr, sync::Arc, time::Duration};

use fork::{CALM, HALF, MUTE, SOCKET};
use host::Home;
use offshoot_route::{Config, Router};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A router before two forks that run, and one in standby.
struct Rig {
    _place: TempDir,
    address: SocketAddr,
    /// How many requests have come to the fork `one`.
    asked: watch::Receiver<usize>,
}

impl Rig {
    async fn start(max_connections: usize, hold: Duration, answer_timeout: Option<Duration>) -> Self {
        let place = tempfile::tempdir().unwrap();
        let home = Home::below(place.path()).make().unwrap();
        let asked = fork::start(&home, "one", 'a');
        fork::put_to_standby(&home, "asleep", 'c');
        let _ = fork::start(&home, "other", 'b');
        let config = Config {
            home,
            listen: ([127, 0, 0, 1], 0).into(),
            allow_remote: false,
            suffix: "localhost".parse().unwrap(),
            port: 80,
            hold,
            answer_timeout,
            max_connections,
            grace: Duration::ZERO,
        };
        let router = Router::bind(config, None).await.unwrap();
        let address = router.address().unwrap();
        tokio::spawn(router.serve(pending()));
        Self { _place: place, address, asked }
    }

    /// Asks a port of a fork.
    async fn send(&self, port: u32, fork: &str, head: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nHost: {port}-{fork}.localhost\r\n{head}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// Asks, and waits for the answer.
    async fn get(&self, port: u32, fork: &str) -> String {
        let mut stream = self.send(port, fork, "Connection: close\r\n").await;
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        answer.to_lowercase()
    }

    /// Until the fork answers again.
    async fn is_free(&self, fork: &str) {
        let free = async {
            while !self.get(CALM, fork).await.starts_with("http/1.1 200") {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, free).await.expect("a place");
    }
}

#[tokio::test]
async fn n4_a_fork_that_answers_nothing_leaves_the_others_half_of_the_router() {
    let rig = Rig::start(8, Duration::ZERO, None).await;
    let mut asked = rig.asked.clone();
    let mut held = Vec::new();
    let upgrade = "Connection: upgrade\r\nUpgrade: websocket\r\n";
    for (number, (port, head)) in [(MUTE, ""), (MUTE, ""), (HALF, ""), (SOCKET, upgrade)].into_iter().enumerate() {
        held.push(rig.send(port, "one", head).await);
        timeout(PATIENCE, asked.wait_for(|count| *count > number)).await.expect("it reaches the fork").unwrap();
    }
    // Of whatever port: it is the fork that is full.
    for port in [MUTE, CALM] {
        let full = rig.get(port, "one").await;
        assert!(full.starts_with("http/1.1 503") && full.contains("retry-after: 1\r\n"), "{full}");
        assert!(full.contains("fork_full"), "{full}");
    }
    for _ in 0..10 {
        let answer = rig.get(CALM, "other").await;
        assert!(answer.starts_with("http/1.1 200") && answer.ends_with("calm"), "{answer}");
    }
    // A WebSocket that ends gives its place back; and so does every answer that is over.
    drop(held.pop());
    rig.is_free("one").await;
    for _ in 0..10 {
        let answer = rig.get(CALM, "one").await;
        assert!(answer.starts_with("http/1.1 200"), "{answer}");
    }
    drop(held);
}

#[tokio::test]
async fn n4_an_answer_that_does_not_begin_is_given_up_also_if_nobody_waits_for_it() {
    // Its one place is taken each time.
    let rig = Rig::start(2, Duration::ZERO, Some(Duration::from_secs(2))).await;
    let late = rig.get(MUTE, "one").await;
    assert!(late.starts_with("http/1.1 504") && late.contains("answer_timeout"), "{late}");
    rig.is_free("one").await;
    let mut asked = rig.asked.clone();
    let before = *asked.borrow_and_update();
    let gone = rig.send(MUTE, "one", "").await;
    timeout(PATIENCE, asked.wait_for(|count| *count > before)).await.expect("it reaches the fork").unwrap();
    drop(gone);
    rig.is_free("one").await;
}

#[tokio::test]
async fn n4_a_fork_that_is_waited_for_leaves_the_others_half_of_the_router() {
    let rig = Arc::new(Rig::start(8, PATIENCE * 10, None).await);
    let mut all = JoinSet::new();
    for _ in 0..5 {
        let rig = Arc::clone(&rig);
        all.spawn(async move { rig.get(CALM, "asleep").await });
    }
    // Four are held. Which one is too many is chance.
    let told = timeout(PATIENCE, all.join_next()).await.expect("one is told").unwrap().unwrap();
    assert!(told.starts_with("http/1.1 503") && told.contains("fork_in_standby"), "{told}");
    assert!(rig.get(CALM, "other").await.starts_with("http/1.1 200"));
    assert_eq!(all.len(), 4);
    assert!(all.try_join_next().is_none());
}
