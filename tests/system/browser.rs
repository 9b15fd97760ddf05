//! F5, I9: warm browsers. Ten are driven at once, by plain clients of DevTools and by Playwright, and each is itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::TcpStream,
    panic::resume_unwind,
    thread,
    time::{Duration, Instant},
};

use offshoot_tests::{
    Bench, Fork, Kind, Server,
    bench::wait_until,
    playwright,
    world::{HOST, SERVER},
};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

use crate::{
    forward::{Forwarding, forward},
    pool::{is_from_pool, pool},
    rehearsal::{rehearsed, rehearses},
    route::Routing,
};

/// How many at once.
const FORKS: usize = 10;
/// For one answer: ten emulated machines share two processors.
const PATIENCE: Duration = Duration::from_secs(300);
/// The page that says who the fork is (see the recipe).
const ENDPOINT_PORT: u16 = 9511;

fn endpoint() -> String {
    format!("http://127.0.0.1:{ENDPOINT_PORT}/internal/fork-identity/config")
}

/// Where a browser's DevTools are reached.
#[derive(Debug, Clone)]
struct Way {
    /// What is connected to.
    address: String,
    /// What it is called there.
    host: String,
}

impl Way {
    fn forwarded(forwarding: &Forwarding) -> Self {
        let address = forwarding.addresses[0].clone();
        Self { host: address.clone(), address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn get(&self, path: &str) -> Value {
        let mut stream = self.connect();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.host).unwrap();
        let mut answer = String::new();
        // It may keep the connection: the document ends with a bracket.
        while !answer.trim_end().ends_with([']', '}']) {
            let mut part = [0; 4096];
            let count = stream.read(&mut part).unwrap();
            assert_ne!(count, 0, "{answer}");
            answer += std::str::from_utf8(&part[..count]).unwrap();
        }
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    fn page(&self, path: &str) -> Page {
        let (socket, _) = tungstenite::client(format!("ws://{}{path}", self.host), self.connect()).unwrap();
        Page { socket, calls: 0, events: Vec::new() }
    }

    /// The page that was open before the capture.
    fn warm_page(&self) -> Page {
        let pages = self.get("/json/list");
        let page =
            pages.as_array().unwrap().iter().find(|page| page["title"] == "warm").unwrap_or_else(|| panic!("{pages}"));
        let url = page["webSocketDebuggerUrl"].as_str().unwrap();
        // The address in it is the one that was asked.
        self.page(url.strip_prefix(&format!("ws://{}", self.host)).unwrap_or_else(|| panic!("{url}")))
    }
}

/// A page of a browser, driven over its DevTools.
struct Page {
    socket: WebSocket<TcpStream>,
    calls: u64,
    /// What has happened lately.
    events: Vec<String>,
}

impl Page {
    /// The next message, if it is an answer.
    fn answer(&mut self) -> Option<Value> {
        let Message::Text(text) = self.socket.read().unwrap() else { return None };
        let message: Value = serde_json::from_str(&text).unwrap();
        self.events.extend(message["method"].as_str().map(ToOwned::to_owned));
        message.get("id").is_some().then_some(message)
    }

    fn try_call(&mut self, method: &str, params: &Value) -> Result<Value, Value> {
        self.calls += 1;
        let call = json!({ "id": self.calls, "method": method, "params": params });
        self.socket.send(Message::text(call.to_string())).unwrap();
        loop {
            let Some(answer) = self.answer().filter(|answer| answer["id"] == self.calls) else { continue };
            return answer.get("error").map_or_else(|| Ok(answer["result"].clone()), |error| Err(error.clone()));
        }
    }

    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.try_call(method, params).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    fn try_evaluate(&mut self, code: &str) -> Result<Value, Value> {
        let params = json!({ "expression": code, "returnByValue": true, "awaitPromise": true });
        Ok(self.try_call("Runtime.evaluate", &params)?["result"]["value"].clone())
    }

    fn evaluate(&mut self, code: &str) -> Value {
        self.try_evaluate(code).unwrap_or_else(|error| panic!("{code}: {error}"))
    }

    /// Another page, at this address, once it is there; with the ids that the browser's main process drew for it.
    fn open(&mut self, way: &Way, url: &str) -> (Self, [Value; 2]) {
        let target = self.call("Target.createTarget", &json!({ "url": url }))["targetId"].clone();
        let mut page = way.page(&format!("/devtools/page/{}", target.as_str().unwrap()));
        let _ = page.call("Page.enable", &json!({}));
        let until = Instant::now() + PATIENCE;
        loop {
            page.events.clear();
            match page.try_evaluate("`${location} ${document.readyState}`") {
                Ok(state) if state == format!("{url} complete") => break,
                Ok(_) => {
                    while !page.events.iter().any(|event| event == "Page.loadEventFired") {
                        let _ = page.answer();
                    }
                }
                // It was just going there.
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
        }
        let loader = page.call("Page.getFrameTree", &json!({}))["frameTree"]["frame"]["loaderId"].clone();
        (page, [target, loader])
    }

    fn text(&mut self) -> String {
        self.evaluate("document.body.innerText").as_str().unwrap().to_owned()
    }

    fn cookies(&mut self) -> Value {
        let cookies = self.call("Network.getCookies", &json!({ "urls": [endpoint()] }))["cookies"].clone();
        cookies.as_array().unwrap().iter().map(|one| (one["name"].as_str().unwrap(), one["value"].clone())).collect()
    }
}

/// Does a step with all of them at once. Each is done with it when this returns, so no one is ahead of another at the next.
fn all<T: Send, R: Send>(of: &mut [T], step: impl Fn(usize, &mut T) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let step = &step;
        let begun: Vec<_> = of.iter_mut().enumerate().map(|(at, one)| scope.spawn(move || step(at, one))).collect();
        begun.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// Cookies that the browsers of each fork must have.
type Cookies = BTreeMap<&'static str, Value>;

/// What is wrong with what browsers have shown of themselves, one row for each fork: `title`, `uuid`, `identity` and `cookies`.
fn wrong(shown: &[Value], forks: &[Fork], cookies: &[Cookies]) -> Vec<String> {
    let mut wrong = Vec::new();
    let distinct: BTreeSet<String> = shown.iter().map(|row| row["uuid"].to_string()).collect();
    if shown.len() != forks.len() || distinct.len() != forks.len() {
        wrong.push(format!("{} rows with {} UUIDs of {} forks", shown.len(), distinct.len(), forks.len()));
    }
    for ((row, fork), cookies) in shown.iter().zip(forks).zip(cookies) {
        let is_uuid = row["uuid"].as_str().is_some_and(|uuid| uuid.len() == 36);
        let identity = &row["identity"];
        let is_itself =
            ["id", "name", "hostname", "template"].iter().all(|field| identity[field] == fork.record[field]);
        if !is_uuid
            || row["title"] != "warm"
            || identity["state"] != "applied"
            || !is_itself
            || row["cookies"] != json!(cookies)
        {
            wrong.push(format!("{} shows {row}", fork.name()));
        }
    }
    wrong
}

/// Plain clients of DevTools, one for each fork: by `offshoot forward`, or by `offshoot route`.
fn drive(ways: &[Way]) -> Vec<Value> {
    let mut warm = all(&mut ways.to_vec(), |_, way| way.warm_page());
    let drawn = all(&mut warm, |_, page| {
        assert!(page.text().contains("It was open before the capture"));
        let title = page.evaluate("document.title");
        let bytes = page.evaluate("Array.from(crypto.getRandomValues(new Uint8Array(16))).join()");
        (title, page.evaluate("crypto.randomUUID()"), bytes, page.evaluate("Math.random()"))
    });
    // They are copies of one page: the generator of its scripts, which no identity reaches, goes on in all (docs/identity.md).
    assert_eq!(drawn.iter().map(|drawn| drawn.3.to_string()).collect::<BTreeSet<_>>().len(), 1, "{drawn:?}");
    let opened = all(&mut warm, |at, page| page.open(&ways[at], &endpoint()));
    let (mut pages, ids): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
    // What the browser itself draws: its main process', not the page's.
    for field in [0, 1] {
        assert_eq!(ids.iter().map(|ids| ids[field].to_string()).collect::<BTreeSet<_>>().len(), ways.len(), "{ids:?}");
    }
    let bytes: BTreeSet<_> = drawn.iter().map(|drawn| drawn.2.to_string()).collect();
    assert_eq!(bytes.len(), ways.len(), "{drawn:?}");
    let identities = all(&mut pages, |at, page| {
        let _ = page.evaluate(&format!("document.cookie = 'cdp=' + {}", drawn[at].1));
        serde_json::from_str::<Value>(&page.text()).unwrap()
    });
    // Each has set its own by now.
    let cookies = all(&mut pages, |_, page| page.cookies());
    let rows = drawn.iter().zip(identities).zip(cookies);
    rows.map(|((drawn, identity), cookies)| {
        json!({ "title": drawn.0, "uuid": drawn.1, "identity": identity, "cookies": cookies })
    })
    .collect()
}

/// `inspect` says where DevTools are, and what it says leads there; if the browser does not answer it says that, and does not wait for long.
fn inspect_says_where_devtools_are(bench: &Bench, fork: &Fork, way: &Way) {
    let devtools = || bench.offshoot(&["inspect", fork.name()]).ok().json()["devtools"].clone();
    let mut said = Value::Null;
    // Its 5 s may be short on a busy machine.
    wait_until("what the browser says of its DevTools", PATIENCE, || {
        said = devtools();
        said["path"].is_string()
    });
    assert_eq!(
        (&said["port"], &said["forward"]),
        (&9222.into(), &format!("offshoot forward {} 9222", fork.name()).into())
    );
    let path = said["path"].as_str().unwrap_or_else(|| panic!("{said}"));
    assert_eq!(said["url"], format!("ws://127.0.0.1:9222{path}"));
    assert!(way.page(path).call("Browser.getVersion", &json!({}))["product"].as_str().unwrap().contains("Chrome"));
    let _ =
        bench.sh(fork, "for p in /proc/[0-9]*; do grep -q [c]hromium $p/cmdline && kill -STOP ${p#/proc/}; done; true");
    let begun = Instant::now();
    let said = devtools();
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(said["error"].as_str().is_some_and(|error| error.contains("within 5 s")), "{said}");
    assert_eq!((&said["port"], said.get("url")), (&9222.into(), None), "{said}");
}

#[test]
fn f5_ten_warm_browsers_driven_at_once_by_devtools_and_by_playwright_are_each_themselves() {
    let bench = Bench::new();
    let template = bench.template(Kind::Browser);
    // The audit has nothing to say of it: what Chromium draws from is its own, and notices the copy (docs/audit.md says what it can not see).
    assert_eq!(template.manifest.get("findings"), None, "{}", template.manifest);
    let forks = bench.fork(&template, &["-n", &FORKS.to_string(), "--name", "browser", "--network", "none"]);
    for fork in &forks {
        let steps = fork.record["guest_steps"].as_array().unwrap();
        let wiped = steps.iter().find(|step| step["step"] == "fork-marks").unwrap_or_else(|| panic!("{steps:?}"));
        assert!(wiped["outcome"].as_str().unwrap().ends_with("-processes-wiped"), "{wiped}");
    }
    let forwardings: Vec<_> = forks.iter().map(|fork| forward(&bench, fork, &["0:9222"])).collect();
    let routing = Routing::start(&bench, &[]);
    let port = routing.address.port();
    let routed = |fork: &Fork| Way {
        address: routing.address.to_string(),
        host: format!("9222-{}.localhost:{port}", fork.name()),
    };
    // Every other one by its name.
    let way = |(at, fork)| if at % 2 == 0 { Way::forwarded(&forwardings[at]) } else { routed(fork) };
    let ways: Vec<_> = forks.iter().enumerate().map(way).collect();

    let by_cdp = drive(&ways);
    let mut cookies: Vec<_> = by_cdp.iter().map(|row| Cookies::from([("cdp", row["uuid"].clone())])).collect();
    assert_eq!(wrong(&by_cdp, &forks, &cookies), Vec::<String>::new());

    let addresses = forwardings.iter().map(|forwarding| forwarding.addresses[0].clone());
    let by_playwright =
        playwright::drive(&[ENDPOINT_PORT.to_string()].into_iter().chain(addresses).collect::<Vec<_>>());
    // They are the same browsers, in which the others have left their cookies.
    for (cookies, row) in cookies.iter_mut().zip(&by_playwright) {
        let _ = cookies.insert("playwright", row["uuid"].clone());
    }
    assert_eq!(wrong(&by_playwright, &forks, &cookies), Vec::<String>::new());
    let drawn: BTreeSet<_> = by_cdp.iter().chain(&by_playwright).map(|row| row["uuid"].to_string()).collect();
    assert_eq!(drawn.len(), 2 * FORKS, "nothing is drawn twice");

    // What is compared is noticed: one that shows another, one that has seen another's cookies, one that is still the template.
    for (field, of_another) in
        [("/uuid", "/uuid"), ("/identity", "/identity"), ("/cookies", "/cookies"), ("/identity/state", "/title")]
    {
        let mut shown = by_playwright.clone();
        *shown[0].pointer_mut(field).unwrap() = by_playwright[1].pointer(of_another).unwrap().clone();
        assert_ne!(wrong(&shown, &forks, &cookies), Vec::<String>::new(), "{field}");
    }
    assert_ne!(wrong(&by_playwright[1..], &forks[1..], &cookies[..FORKS - 1]), Vec::<String>::new());
    assert_ne!(wrong(&by_playwright[1..], &forks, &cookies), Vec::<String>::new());

    inspect_says_where_devtools_are(&bench, &forks[1], &ways[1]);
    bench.end();
}

#[test]
fn f5_browsers_from_spares_are_themselves_and_load_pages_from_outside() {
    let bench = Bench::in_a_world();
    let template = bench.template(Kind::Browser);
    let _server = Server::http(&bench.world().outside);
    assert_eq!((pool(&bench, &template, 2), rehearsed(&bench)), (2, if rehearses(&template) { 2 } else { 0 }));
    let forks = bench.fork(&template, &["-n", "2", "--name", "browser", "--network", "tap"]);
    assert!(forks.iter().all(is_from_pool));
    assert_eq!(pool(&bench, &template, 0), 0);
    let forwardings: Vec<_> = forks.iter().map(|fork| forward(&bench, fork, &["0:9222"])).collect();
    let ways: Vec<_> = forwardings.iter().map(Way::forwarded).collect();
    bench.world().host.within(|| {
        let mut warm: Vec<_> = ways.iter().map(Way::warm_page).collect();
        let drawn: Vec<_> = warm.iter_mut().map(|page| page.evaluate("crypto.randomUUID()")).collect();
        assert!(drawn.iter().all(Value::is_string) && drawn[0] != drawn[1], "{drawn:?}");
        let (mut own, _) = warm[0].open(&ways[0], &endpoint());
        assert_eq!(serde_json::from_str::<Value>(&own.text()).unwrap()["id"], forks[0].id());
        // It says who was asked, and by whom as it sees it: the host.
        let (mut outside, _) = warm[0].open(&ways[0], &format!("http://{SERVER}/"));
        assert_eq!(outside.text().trim(), format!("{SERVER} {HOST}"));
    });
    bench.end();
}
