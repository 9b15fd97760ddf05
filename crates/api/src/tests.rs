//! What the whole service promises, asked without a connection and without guests.
#![allow(clippy::unwrap_used)]

use std::{future::poll_fn, net::SocketAddr, path::Path, sync::Arc, task::Poll, time::Duration};

use axum::{
    Extension, Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Request, StatusCode},
};
use engine::ProcessRef;
use host::{ForkRecord, Home, network::Mode, pool, record::NewFork};
use identity::{ForkId, ForkName, Tag};
use serde_json::{Value, json};
use store::Store;
use tempfile::TempDir;
use tower::ServiceExt;

use crate::{
    App, Config, Scope,
    auth::Peer,
    events::Hub,
    keys::{Answer, Claim},
    routes, serve, watch,
};

/// A daemon of its own below `dir`.
pub(crate) fn config(dir: &Path) -> Config {
    let home = Home::below(dir).make().unwrap();
    Config {
        socket: serve::socket_path(&home),
        home,
        socket_mode: 0o600,
        socket_scope: Scope::Read,
        listen: None,
        rate: 5,
        recipes: None,
        program: "/absent".into(),
        grace: Duration::from_secs(10),
    }
}

struct Served {
    app: Arc<App>,
    service: Router,
    dir: TempDir,
    _ending: tokio::sync::watch::Sender<bool>,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let store = Store::open(&config.home.data).unwrap();
        let forks = Arc::new(watch::Forks::new(&config.home));
        let (ending, is_ending) = tokio::sync::watch::channel(false);
        let (hub, waker) = (Arc::new(Hub::new()), watch::Waker::new().unwrap());
        let app = Arc::new(serve::app(&config, store, hub, forks, waker, is_ending).unwrap());
        Self { service: routes::service(&app), app, dir, _ending: ending }
    }

    fn of(&self, peer: Peer) -> Router {
        self.service.clone().layer(Extension(peer))
    }

    async fn ask(&self, peer: Peer, request: Request<Body>) -> (StatusCode, HeaderMap, Value) {
        let answer = self.of(peer).oneshot(request).await.unwrap();
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        (status, headers, serde_json::from_slice(&body).unwrap_or_default())
    }

    /// The audit of whoever's file is called so.
    fn audit(&self, who: &str) -> Vec<Value> {
        let path = self.dir.path().join(format!("data/api/audit/{who}.jsonl"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn figures(&self) -> String {
        self.app.metrics.text(&self.app.home, &self.app.forks).unwrap()
    }

    /// A fork whose machine has ended, as the request with this key has left it.
    fn fork(&self, id: char, name: &str, origin: &str) -> ForkRecord {
        let id = ForkId::parse(&id.to_string().repeat(20)).unwrap();
        let record = ForkRecord { origin: Some(origin.into()), ..record(&id, name) };
        let mut new = NewFork::begin(&self.app.home, &id).unwrap();
        assert!(new.take_name(&self.app.home, &record.name).unwrap());
        let _ = new.publish(&self.app.home, &record).unwrap();
        record
    }
}

/// Of a fork whose machine has ended.
pub(crate) fn record(id: &ForkId, name: &str) -> ForkRecord {
    let name = ForkName::parse(name).unwrap();
    let process = ProcessRef { start_time: 0, ..ProcessRef::myself().unwrap() };
    let record = json!({
        "format": ForkRecord::FORMAT, "id": id, "name": name, "hostname": name, "template": "t", "template_id": "0",
        "engine": {"name": "qemu", "version": "7.2", "accel": "tcg"}, "process": process, "created_ms": 0, "machine_id": "",
        "boot_id": "", "labels": {}, "env": [], "secrets": [], "files": [], "mailboxes": [], "limits": {}, "cgroups": [],
        "acked_micros": 0, "host_steps": [], "guest_steps": [],
    });
    serde_json::from_value(record).unwrap()
}

/// The daemon's own user, by the unix socket.
fn own() -> Peer {
    Peer::Unix { uid: rustix::process::geteuid().as_raw() }
}

fn own_id() -> String {
    format!("uid-{}", rustix::process::geteuid().as_raw())
}

fn elsewhere() -> Peer {
    Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 1)))
}

fn request(method: &str, path: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).body(Body::empty()).unwrap()
}

fn keyed(key: &str, body: &Value) -> Request<Body> {
    let head = Request::post("/v1/forks").header("content-type", "application/json").header("idempotency-key", key);
    head.body(body.to_string().into()).unwrap()
}

#[tokio::test]
async fn o1_who_hangs_up_before_the_answer_is_in_the_audit_all_the_same() {
    let served = Served::new();
    let mut answer = Box::pin(served.of(own()).oneshot(request("DELETE", "/v1/forks/absent")));
    poll_fn(|context| {
        assert!(answer.as_mut().poll(context).is_pending(), "it was answered at once");
        Poll::Ready(())
    })
    .await;
    assert_eq!(served.audit(&own_id()), [] as [Value; 0], "it is still being worked on");
    drop(answer);
    let lines = served.audit(&own_id());
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    assert_eq!((&line["method"], &line["path"]), (&"DELETE".into(), &"/v1/forks/absent".into()));
    assert_eq!((&line["status"], &line["code"]), (&499.into(), &"client_gone".into()));
    let (status, ..) = served.ask(own(), request("DELETE", "/v1/forks/absent")).await;
    assert_eq!((status, &served.audit(&own_id())[1]["status"]), (StatusCode::NOT_FOUND, &404.into()));
}

#[tokio::test]
async fn o1_methods_that_clients_make_up_cost_no_memory() {
    let served = Served::new();
    let _ = served.ask(elsewhere(), request("GET", "/v1/forks")).await;
    let _ = served.ask(elsewhere(), request("HUNTER0", "/v1/forks")).await;
    let before = served.figures().lines().count();
    for number in 1..50 {
        for path in ["/v1/forks", "/healthz", "/v1/nothing"] {
            let (status, ..) = served.ask(elsewhere(), request(&format!("HUNTER{number}"), path)).await;
            assert!(status.is_client_error());
        }
    }
    let figures = served.figures();
    assert!(!figures.contains("HUNTER") && figures.contains("method=\"OTHER\""), "{figures}");
    assert!(figures.lines().count() < before + 100, "{figures}");
    let audit = served.audit("nobody");
    assert!(audit.len() > 90 && audit.iter().skip(1).all(|line| line["method"] == "OTHER"), "{audit:?}");
}

#[tokio::test]
async fn o1_a_failure_that_is_told_again_is_told_in_the_same_way() {
    let served = Served::new();
    let body = json!({"template": "t", "count": 2});
    let headers = HeaderMap::from_iter([("idempotency-key".parse().unwrap(), "k".parse().unwrap())]);
    let text = body.to_string();
    let claimed = served.app.keys.claim(&headers, &own_id(), "POST /v1/forks", text.as_bytes()).unwrap();
    let Some(Claim::New(key)) = claimed else { panic!("not new") };
    let problem = json!({"code": "addresses_exhausted", "status": 503, "results": []});
    served.app.keys.answer(&key, &Answer { status: 503, body: problem.clone() }).unwrap();
    drop(key);
    let (status, headers, again) = served.ask(own(), keyed("k", &body)).await;
    assert_eq!((status, again), (StatusCode::SERVICE_UNAVAILABLE, problem));
    assert_eq!(headers["content-type"], "application/problem+json");
    assert_eq!(headers["retry-after"], "1");
    assert_eq!(served.audit(&own_id())[0]["code"], "addresses_exhausted");
}

#[tokio::test]
async fn o2_after_a_crash_all_or_nothing_leaves_nothing_of_a_request_that_was_not_finished() {
    let served = Served::new();
    // As a daemon that died in the middle leaves it: a key without an answer, and one of two forks.
    let interrupted = |key: &str, body: &Value| {
        let headers = HeaderMap::from_iter([("idempotency-key".parse().unwrap(), key.parse().unwrap())]);
        let text = body.to_string();
        match served.app.keys.claim(&headers, &own_id(), "POST /v1/forks", text.as_bytes()).unwrap() {
            Some(Claim::New(key)) => key.hash.clone(),
            other => panic!("{other:?}"),
        }
    };
    let body = |all: bool| json!({"template": "t", "count": 2, "all_or_nothing": all});
    served.fork('a', "some", &interrupted("some", &body(false)));
    let (status, _, answer) = served.ask(own(), keyed("some", &body(false))).await;
    assert_eq!((status, &answer["results"][0]["fork"]["name"]), (StatusCode::CREATED, &"some".into()), "{answer}");
    assert_eq!(answer["results"][1]["error"]["code"], "interrupted");

    served.fork('b', "none", &interrupted("all", &body(true)));
    let (status, headers, answer) = served.ask(own(), keyed("all", &body(true))).await;
    assert_eq!((status, &answer["code"]), (StatusCode::SERVICE_UNAVAILABLE, &"interrupted".into()), "{answer}");
    assert_eq!(headers["retry-after"], "1");
    let left = served.app.forks.list().unwrap();
    assert_eq!(left.iter().map(|(record, _)| record.name.as_str()).collect::<Vec<_>>(), ["some"]);
    // The key is as good as new: there is no template, so nothing is begun.
    let (status, _, answer) = served.ask(own(), keyed("all", &body(true))).await;
    assert_eq!((status, &answer["code"]), (StatusCode::NOT_FOUND, &"template_not_found".into()), "{answer}");
}

#[tokio::test]
async fn o1_work_above_what_is_done_at_once_is_refused_and_may_be_sent_again() {
    let served = Served::new();
    let shares: Vec<_> = std::iter::from_fn(|| served.app.work.moving().ok()).collect();
    let body = json!({"template": "t"});
    for request in [keyed("k", &body), request("POST", "/v1/forks/absent/standby")] {
        let (status, headers, answer) = served.ask(own(), request).await;
        assert_eq!((status, &answer["code"]), (StatusCode::SERVICE_UNAVAILABLE, &"daemon_busy".into()), "{answer}");
        assert_eq!(headers["retry-after"], "1");
    }
    assert_eq!(served.ask(own(), request("GET", "/v1/forks")).await.0, StatusCode::OK, "who looks is answered");
    drop(shares);
    let (_, _, answer) = served.ask(own(), keyed("k", &body)).await;
    assert_eq!(answer["code"], "template_not_found", "the key is as good as new");
}

#[tokio::test]
async fn o1_local_users_are_counted_but_for_the_daemon_s_own_and_root() {
    let served = Served::new();
    let statuses = async |uid| {
        let mut statuses = Vec::new();
        for _ in 0..40 {
            let (status, headers, _) = served.ask(Peer::Unix { uid }, request("GET", "/v1/version")).await;
            assert_eq!(headers.contains_key("retry-after"), status == StatusCode::TOO_MANY_REQUESTS);
            statuses.push(status.as_u16());
        }
        statuses
    };
    let other = statuses(65_534).await;
    assert!(other[..10].iter().all(|status| *status == 200) && other.contains(&429), "{other:?}");
    assert_eq!(statuses(0).await, [200; 40]);
    assert_eq!(statuses(rustix::process::geteuid().as_raw()).await, [200; 40]);
    assert!(served.audit("uid-65534").iter().any(|line| line["code"] == "too_many_requests"));
}

#[tokio::test]
async fn o1_a_pool_that_was_given_up_is_no_figure_any_more() {
    let served = Served::new();
    let [one, two] = ["one", "two"].map(|tag| Tag::parse(tag).unwrap());
    for (tag, size) in [(&one, 2), (&two, 3)] {
        pool::set_size(&served.app.home, tag, size, Mode::None).unwrap();
    }
    let line = |tag, size| format!("offshoot_pool_size{{template=\"{tag}\",network=\"none\"}} {size}");
    let figures = served.figures();
    assert!(figures.contains(&line("one", 2)) && figures.contains(&line("two", 3)), "{figures}");
    assert!(figures.contains("offshoot_pool_ready{template=\"one\",network=\"none\"} 0"), "{figures}");
    pool::end(&served.app.home, &one).unwrap();
    let figures = served.figures();
    assert!(!figures.contains("template=\"one\"") && figures.contains(&line("two", 3)), "{figures}");
}
