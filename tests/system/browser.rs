//! F5: a browser that was captured with a page open answers DevTools in every fork at once, and each is itself.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use offshoot_tests::{Bench, Kind};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

use crate::forward::forward;

/// A page of a browser, driven over its DevTools.
struct Page {
    socket: WebSocket<TcpStream>,
    calls: u64,
}

impl Page {
    /// The page that was open before the capture.
    fn open(address: &str) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        write!(stream, "GET /json/list HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        // It may keep the connection: the list ends with a bracket.
        while !answer.trim_end().ends_with(']') {
            let mut part = [0; 4096];
            let count = stream.read(&mut part).unwrap();
            assert_ne!(count, 0, "{answer}");
            answer += std::str::from_utf8(&part[..count]).unwrap();
        }
        let pages: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let page =
            pages.as_array().unwrap().iter().find(|page| page["title"] == "warm").unwrap_or_else(|| panic!("{pages}"));
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let url = page["webSocketDebuggerUrl"].as_str().unwrap();
        Self { socket: tungstenite::client(url, stream).unwrap().0, calls: 0 }
    }

    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.calls += 1;
        let call = json!({ "id": self.calls, "method": method, "params": params });
        self.socket.send(Message::text(call.to_string())).unwrap();
        loop {
            let Message::Text(text) = self.socket.read().unwrap() else { continue };
            let answer: Value = serde_json::from_str(&text).unwrap();
            if answer["id"] == self.calls {
                assert_eq!(answer.get("error"), None, "{method}");
                return answer["result"].clone();
            }
        }
    }

    fn evaluate(&mut self, code: &str) -> Value {
        let params = json!({ "expression": code, "returnByValue": true, "awaitPromise": true });
        self.call("Runtime.evaluate", &params)["result"]["value"].clone()
    }
}

#[test]
fn f5_warm_browsers_answer_devtools_and_each_is_itself() {
    let bench = Bench::new();
    let template = bench.template(Kind::Browser);
    // The audit has nothing to say of it: what Chromium draws from is its own, and notices the copy (docs/audit.md says what it can not see).
    assert_eq!(template.manifest.get("findings"), None, "{}", template.manifest);
    let forks = bench.fork(&template, &["-n", "2", "--name", "browser", "--network", "none"]);
    let mut seen: Vec<Vec<Value>> = Vec::new();
    for fork in &forks {
        let steps = fork.record["guest_steps"].as_array().unwrap();
        let wiped = steps.iter().find(|step| step["step"] == "fork-marks").unwrap_or_else(|| panic!("{steps:?}"));
        assert!(wiped["outcome"].as_str().unwrap().ends_with("-processes-wiped"), "{wiped}");
        let forwarding = forward(&bench, fork, &["0:9222"]);
        let mut page = Page::open(&forwarding.addresses[0]);
        assert!(page.evaluate("document.body.innerText").as_str().unwrap().contains("It was open before the capture"));
        let of_the_page = page.evaluate("Math.random()");
        let drawn = page.evaluate("crypto.randomUUID()");
        assert!(drawn.is_string(), "{drawn}");
        let bytes = page.evaluate("Array.from(crypto.getRandomValues(new Uint8Array(16))).join()");
        // What the browser itself draws: its main process', not the page's.
        let target = page.call("Target.createTarget", &json!({ "url": "about:blank" }))["targetId"].clone();
        let navigated = page.call("Page.navigate", &json!({ "url": "file:///run/offshoot/identity.json" }));
        let until = Instant::now() + Duration::from_secs(120);
        let identity = loop {
            let text = page.evaluate("document.body ? document.body.innerText : ''");
            if let Ok(identity) = serde_json::from_str::<Value>(text.as_str().unwrap_or_default()) {
                break identity;
            }
            assert!(Instant::now() < until, "{navigated}: {text}");
        };
        assert_eq!(identity["id"], fork.id());
        seen.push(vec![drawn, bytes, target, navigated["loaderId"].clone(), of_the_page]);
    }
    let distinct = |field: usize| seen.iter().map(|seen| seen[field].to_string()).collect::<BTreeSet<_>>().len();
    for field in 0..4 {
        assert_eq!(distinct(field), 2, "{seen:?}");
    }
    // They are copies of one page: the generator of its scripts, which no identity reaches, goes on in both (docs/identity.md).
    assert_eq!(distinct(4), 1, "{seen:?}");
    bench.end();
}
