//! What is answered.

use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    body::Bytes,
    header::{CACHE_CONTROL, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS},
};
use serde_json::json;

use super::{Answer, JSON};
use crate::state::Identity;

fn with(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    // It is true now, and nobody may show it later.
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

pub(super) fn empty(status: StatusCode) -> Answer {
    with(status, Bytes::new())
}

fn of_json(status: StatusCode, value: &serde_json::Value) -> Answer {
    let mut answer = with(status, value.to_string());
    let (name, kind) = JSON;
    answer.headers_mut().insert(name, kind);
    answer
}

pub(super) fn problem(status: StatusCode, detail: &str) -> Answer {
    of_json(status, &json!({ "status": status.as_u16(), "error": detail }))
}

pub(super) fn waiting() -> Answer {
    let mut answer = of_json(StatusCode::ACCEPTED, &json!({ "state": "waiting" }));
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    answer
}

/// Who this fork is. No secrets.
pub(super) fn applied(identity: &Identity) -> Answer {
    let fork = &identity.fork;
    let fields = identity.payload.iter().flatten().map(|(name, value)| (name.to_string(), value));
    let body = json!({
        "state": "applied",
        "id": fork.id,
        "name": fork.name,
        "hostname": fork.hostname,
        "template": fork.template,
        "labels": identity.labels,
        "fields": fields.collect::<std::collections::BTreeMap<_, _>>(),
    });
    of_json(StatusCode::OK, &body)
}
