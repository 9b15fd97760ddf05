//! The endpoint over agents outside a guest: every answer, and what is asked at each moment of a fork's life.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use guest_api::proto::{self, OnFork, Service, WarmRequest};
use http_body_util::BodyExt;
use hyper::client::conn::http1 as client;
use identity::{ForkIdentity, ForkName, Limits, Tag};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::*;
use crate::{
    Freeze,
    keeper::Keeper,
    payload::{Expected, Payload},
    state::{Identity, Phase},
    workload::Workload,
};

const ID: &str = "0123456789abcdef0123";
const OTHER: &str = "0123456789abcdef9999";

fn agent(delivery: Option<proto::Delivery>) -> Arc<AgentState> {
    let state = AgentState::new(Workload::bare().unwrap(), Keeper::bare(), Freeze::On);
    if let Some(delivery) = delivery {
        let fields = [("tenant".to_owned(), "TENANT".to_owned()), ("note".to_owned(), String::new())].into();
        let expected = proto::Expected { delivery: delivery.into(), port: 0, fields };
        assert!(state.expect(Expected::parse(&expected).unwrap()));
    }
    state
}

fn identity(id: &str, payload: Option<Payload>) -> Arc<Identity> {
    Arc::new(Identity {
        fork: ForkIdentity {
            id: ForkId::parse(id).unwrap(),
            name: ForkName::parse("w-1").unwrap(),
            hostname: ForkName::parse("w-1").unwrap(),
            template: Tag::parse("t").unwrap(),
            machine_id: "0".repeat(32),
            boot_id: "00000000-0000-4000-8000-000000000000".into(),
        },
        labels: [("team".to_owned(), "a".to_owned())].into(),
        env: BTreeMap::new(),
        limits: Limits::default(),
        payload,
    })
}

/// What the keeper does in a fork.
fn become_fork(state: &AgentState, identity: &Arc<Identity>) {
    state.set_identity(Arc::clone(identity));
    state.set_phase(Phase::Running);
    assert!(state.supervisor().after_thaw(identity).failure.is_none());
    state.announce_change();
}

async fn ask(state: &Arc<AgentState>, caller: Caller, request: Request<Full<Bytes>>) -> (u16, Value) {
    ask_within(state, caller, request, POST_LIMIT).await
}

async fn ask_within(
    state: &Arc<AgentState>,
    caller: Caller,
    request: Request<Full<Bytes>>,
    limit: Duration,
) -> (u16, Value) {
    let (ours, theirs) = tokio::io::duplex(1024);
    let serving = Arc::clone(state);
    tokio::spawn(async move {
        let service = service_fn(move |request| {
            let state = Arc::clone(&serving);
            async move { Ok::<_, Infallible>(respond(&state, caller, request, limit).await) }
        });
        http1::Builder::new().serve_connection(TokioIo::new(theirs), service).await
    });
    let (mut sender, connection) = client::handshake(TokioIo::new(ours)).await.unwrap();
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() })
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header(HOST, "localhost").body(Full::default()).unwrap()
}

fn payload(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(PAYLOAD).header(HOST, "localhost").body(Full::new(body.into())).unwrap()
}

async fn config(state: &Arc<AgentState>) -> (u16, Value) {
    ask(state, Caller::Workload, get(CONFIG)).await
}

fn later(state: &Arc<AgentState>, caller: Caller, request: Request<Full<Bytes>>) -> JoinHandle<(u16, Value)> {
    let state = Arc::clone(state);
    tokio::spawn(async move { ask(&state, caller, request).await })
}

/// One that waits for the identity.
fn service(name: &str, script: &str, ready_line: &str) -> Service {
    Service {
        name: name.into(),
        command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        ready_line: ready_line.into(),
        timeout_ms: 20_000,
        ..Service::default()
    }
}

async fn warm(state: &Arc<AgentState>, service: Service) {
    let supervisor = Arc::clone(state.supervisor());
    let request = WarmRequest { services: vec![service], ..WarmRequest::default() };
    tokio::task::spawn_blocking(move || supervisor.warm(request, |_| ()).unwrap()).await.unwrap();
}

/// Gives everybody else a turn, so that what is under way has come as far as it can.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn acme() -> Payload {
    [(identity::FieldName::parse("tenant").unwrap(), "acme".to_owned())].into()
}

#[tokio::test]
async fn i14_404_202_and_200_say_what_is_true() {
    for (delivery, in_template) in
        [(proto::Delivery::Off, 404), (proto::Delivery::Fork, 202), (proto::Delivery::Post, 202)]
    {
        let state = agent(Some(delivery));
        assert_eq!(config(&state).await.0, in_template, "{delivery:?}");
        let posted = delivery == proto::Delivery::Post;
        become_fork(&state, &identity(ID, (!posted).then(acme)));
        assert_eq!(config(&state).await.0, if posted { 202 } else { 200 }, "{delivery:?}");
        if posted {
            assert_eq!(ask(&state, Caller::Host, payload(r#"{"tenant": "acme"}"#)).await, (204, Value::Null));
        }
        let (status, who) = config(&state).await;
        assert_eq!(status, 200);
        assert_eq!((&who["id"], &who["name"], &who["template"]), (&json!(ID), &json!("w-1"), &json!("t")));
        assert_eq!((&who["labels"], &who["fields"]), (&json!({"team": "a"}), &json!({"tenant": "acme"})));
    }
}

#[tokio::test]
async fn i14_no_identity_is_told_that_is_not_true_any_more() {
    let state = agent(Some(proto::Delivery::Fork));
    become_fork(&state, &identity(ID, Some(acme())));
    assert_eq!(config(&state).await.1["id"], ID);
    for phase in [Phase::Quiesced, Phase::Applying, Phase::NetworkPending] {
        state.set_phase(phase);
        let asked = later(&state, Caller::Workload, get(CONFIG));
        settle().await;
        assert!(!asked.is_finished(), "{phase:?}");
        let new = if phase == Phase::Applying { OTHER } else { ID };
        become_fork(&state, &identity(new, Some(Payload::new())));
        let (status, who) = asked.await.unwrap();
        assert_eq!((status, &who["id"], &who["fields"]), (200, &json!(new), &json!({})), "{phase:?}");
    }
}

#[tokio::test]
async fn i14_who_waits_is_told_as_soon_as_it_is_known() {
    let state = agent(Some(proto::Delivery::Post));
    let in_template = later(&state, Caller::Workload, get("/internal/fork-identity/config?wait=300"));
    settle().await;
    become_fork(&state, &identity(ID, None));
    settle().await;
    assert!(!in_template.is_finished(), "nobody knows the payload yet");
    assert_eq!(ask(&state, Caller::Workload, get("/internal/fork-identity/config?wait=0")).await.0, 202);
    assert_eq!(ask(&state, Caller::Host, payload(r#"{"tenant": "acme"}"#)).await.0, 204);
    let (status, who) = in_template.await.unwrap();
    assert_eq!((status, &who["fields"]["tenant"]), (200, &json!("acme")));
    for wrong in ["wait=", "wait=-1", "wait=301", "wait=1&wait=2", "x=1"] {
        assert_eq!(ask(&state, Caller::Workload, get(&format!("{CONFIG}?{wrong}"))).await.0, 400, "{wrong}");
    }
}

#[tokio::test]
async fn i14_what_is_posted_is_applied_once() {
    let state = agent(Some(proto::Delivery::Post));
    let post = async |body: &str| ask(&state, Caller::Host, payload(body.to_owned())).await;
    let acme = r#"{"tenant": "acme"}"#;
    assert_eq!(post(acme).await.0, 409, "a template");
    become_fork(&state, &identity(ID, None));
    assert_eq!(ask(&state, Caller::Workload, payload(acme)).await.0, 403);
    for malformed in ["", "[]", "{", r#"{"tenant": {}}"#, r#"{"PATH": "/x"}"#] {
        assert_eq!(post(malformed).await.0, 400, "{malformed}");
    }
    let most = format!(r#"{{"tenant": "{}"}}"#, "x".repeat(MAX_PAYLOAD - 14));
    assert_eq!(most.len(), MAX_PAYLOAD);
    assert_eq!(post(&format!("{most} ")).await.0, 413);
    assert_eq!(config(&state).await.0, 202, "nothing of all that was applied");
    assert!(!state.environment().contains_key("TENANT"));

    assert_eq!(post(acme).await.0, 204);
    assert_eq!(state.environment()["TENANT"], "acme");
    assert_eq!(post(acme).await.0, 204, "again");
    assert_eq!(post(r#" {"note": null, "tenant": "acme"} "#).await.0, 204, "the same in other words");
    let (status, answer) = post(r#"{"tenant": "other"}"#).await;
    assert_eq!(status, 409);
    assert!(!answer.to_string().contains("other\""), "{answer}");
    assert_eq!(config(&state).await.1["fields"], json!({"tenant": "acme"}));

    // A fork of it has an identity of its own, and nothing of this one.
    state.set_phase(Phase::Applying);
    become_fork(&state, &identity(OTHER, None));
    assert_eq!(config(&state).await.0, 202);
    assert!(!state.environment().contains_key("TENANT"));
    assert_eq!(post(&most).await.0, 204);
}

#[tokio::test]
async fn i14_where_nothing_is_posted_only_the_same_is_accepted() {
    let state = agent(Some(proto::Delivery::Off));
    become_fork(&state, &identity(ID, Some(Payload::new())));
    assert_eq!(ask(&state, Caller::Host, payload("{}")).await.0, 409);
    let state = agent(Some(proto::Delivery::Fork));
    let again = Service {
        start_in_template: true,
        on_fork: OnFork::Restart.into(),
        ..service("again", "echo begun; sleep 100", "begun")
    };
    warm(&state, again).await;
    assert_eq!(ask(&state, Caller::Host, payload("{}")).await.0, 409);
    become_fork(&state, &identity(ID, Some(acme())));
    assert_eq!(begun(&state), 2, "in the template, and in the fork");
    assert_eq!(ask(&state, Caller::Host, payload("{}")).await.0, 409);
    assert_eq!(ask(&state, Caller::Host, payload(r#"{"tenant": "acme"}"#)).await.0, 204);
    assert_eq!(begun(&state), 2, "what came with the fork is told once");
}

/// How often a service has said that it has begun.
fn begun(state: &AgentState) -> usize {
    let mut follower = state.supervisor().logs().follow();
    let mut text = Vec::new();
    while let Some((_, bytes)) = follower.take() {
        text.extend(bytes);
    }
    String::from_utf8_lossy(&text).matches("begun").count()
}

#[tokio::test]
async fn i14_what_comes_early_is_kept() {
    for phase in [Phase::Quiesced, Phase::Applying, Phase::NetworkPending] {
        let state = agent(Some(proto::Delivery::Post));
        assert!(state.supervisor().prepare_quiesce(Instant::now() + POST_LIMIT).is_ok());
        state.set_phase(phase);
        let posted = later(&state, Caller::Host, payload(r#"{"tenant": "acme"}"#));
        settle().await;
        assert!(!posted.is_finished(), "{phase:?}");
        become_fork(&state, &identity(ID, None));
        assert_eq!(posted.await.unwrap().0, 204, "{phase:?}");
        assert_eq!(config(&state).await.1["fields"]["tenant"], "acme", "{phase:?}");
    }
}

#[tokio::test]
async fn i14_what_takes_too_long_is_504_and_the_same_again_joins_it() {
    let state = agent(Some(proto::Delivery::Post));
    state.set_phase(Phase::Applying);
    let limit = Duration::from_millis(200);
    assert_eq!(ask_within(&state, Caller::Host, payload("{}"), limit).await.0, 504, "no identity came");

    let state = agent(Some(proto::Delivery::Post));
    warm(&state, service("slow", "sleep 1; echo ready as $TENANT; sleep 100", "ready as acme")).await;
    become_fork(&state, &identity(ID, None));
    let acme = r#"{"tenant": "acme"}"#;
    assert_eq!(ask_within(&state, Caller::Host, payload(acme), limit).await.0, 504);
    assert_eq!(config(&state).await.0, 200, "it has its identity; its services are being started");
    assert_eq!(ask(&state, Caller::Host, payload(acme)).await.0, 204, "and now they have");
    assert_eq!(ask(&state, Caller::Host, payload("{}")).await.0, 409);
}

#[tokio::test]
async fn i14_a_service_that_does_not_take_it_is_an_error_with_its_last_words() {
    let state = agent(Some(proto::Delivery::Post));
    warm(&state, service("broken", "echo no such tenant; exit 3", "never")).await;
    become_fork(&state, &identity(ID, None));
    for _ in 0..2 {
        let (status, answer) = ask(&state, Caller::Host, payload(r#"{"tenant": "acme"}"#)).await;
        assert_eq!(status, 500);
        let text = answer["error"].as_str().unwrap();
        assert!(text.contains("exit code 3") && text.contains("no such tenant"), "{text}");
    }
    assert_eq!(ask(&state, Caller::Host, payload("{}")).await.0, 409);
}

#[tokio::test]
async fn other_paths_methods_and_names_are_refused() {
    let state = agent(Some(proto::Delivery::Fork));
    assert_eq!(ask(&state, Caller::Workload, get("/")).await.0, 404);
    assert_eq!(ask(&state, Caller::Workload, get(PAYLOAD)).await.0, 405);
    let delete = Request::delete(CONFIG).body(Full::default()).unwrap();
    assert_eq!(ask(&state, Caller::Host, delete).await.0, 405);
    for (host, local) in
        [("localhost:9511", true), ("127.0.0.1", true), ("evil.example", false), ("localhost.evil:80", false)]
    {
        for caller in [Caller::Workload, Caller::Host] {
            let request = Request::get(CONFIG).header(HOST, host).body(Full::default()).unwrap();
            assert_eq!(ask(&state, caller, request).await.0, if local { 202 } else { 421 }, "{host} {caller:?}");
        }
    }
    let odd = hyper::header::HeaderValue::from_bytes(b"\xff").unwrap();
    let request = Request::get(CONFIG).header(HOST, odd).body(Full::default()).unwrap();
    assert_eq!(ask(&state, Caller::Workload, request).await.0, 421);
}

#[tokio::test]
async fn i14_a_page_of_a_browser_posts_nothing_and_its_browser_guesses_nothing() {
    let state = agent(Some(proto::Delivery::Post));
    become_fork(&state, &identity(ID, None));
    for origin in ["null", "http://evil.example", "http://localhost:9000"] {
        let mut request = payload(r#"{"tenant": "acme"}"#);
        request.headers_mut().insert(ORIGIN, origin.parse().unwrap());
        assert_eq!(ask(&state, Caller::Host, request).await.0, 403, "{origin}");
    }
    assert_eq!(config(&state).await.0, 202, "nothing was applied");
    for answer in [empty(StatusCode::NO_CONTENT), problem(StatusCode::NOT_FOUND, ""), answer::waiting()] {
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
    }
}

#[tokio::test]
async fn i14_readers_see_it_whole_or_not_at_all() {
    let state = agent(Some(proto::Delivery::Post));
    become_fork(&state, &identity(ID, None));
    let reader = || {
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let (mut before, mut after) = (0, 0);
            while before + after < 1000 || after == 0 {
                match config(&state).await {
                    (202, _) => before += 1,
                    (200, who) => {
                        assert_eq!(who["fields"], json!({"tenant": "acme", "note": "x"}));
                        after += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
            (before, after)
        })
    };
    let readers = [reader(), reader()];
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(ask(&state, Caller::Host, payload(r#"{"tenant": "acme", "note": "x"}"#)).await.0, 204);
    for reader in readers {
        let (before, after) = reader.await.unwrap();
        assert!(before > 0 && after > 0, "{before} {after}");
    }
}
