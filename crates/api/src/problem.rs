//! How failures reach a client: problem documents (RFC 9457).

use std::{borrow::Cow, error::Error};

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use host::codes::Coded;
use serde::Serialize;
use utoipa::ToSchema;

/// Why a request failed. Programs look at `code`; it is stable.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// `urn:offshoot:problem:` and the code.
    #[serde(rename = "type")]
    #[schema(example = "urn:offshoot:problem:name_conflict")]
    kind: String,
    /// What the status means.
    title: Cow<'static, str>,
    /// The HTTP status.
    status: u16,
    /// What happened, for people.
    detail: String,
    /// What happened, for programs: snake case, stable.
    #[schema(example = "name_conflict")]
    code: Cow<'static, str>,
    /// What led to it, the nearest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    causes: Vec<String>,
    /// The field of the request that is to blame.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "children[2].env")]
    field: Option<String>,
    /// What to do next.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// The code of a failed response, for the log and the audit.
#[derive(Debug, Clone)]
pub(crate) struct ProblemCode(pub(crate) Cow<'static, str>);

impl Problem {
    /// With a message of the API's own.
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:offshoot:problem:{code}"),
            title: status.canonical_reason().unwrap_or("Failed").into(),
            status: status.as_u16(),
            detail: detail.into(),
            code: code.into(),
            causes: Vec::new(),
            field: None,
            next: None,
        }
    }

    /// A request that can not be understood.
    pub(crate) fn invalid(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", detail).in_field(field)
    }

    /// A failure of the daemon itself.
    pub(crate) fn internal(error: &(dyn Error + 'static)) -> Self {
        let mut problem = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the daemon failed");
        problem.causes = chain(error);
        problem
    }

    /// The field that is to blame.
    pub(crate) fn in_field(mut self, field: impl Into<String>) -> Self {
        let field = field.into();
        self.field = (!field.is_empty() && field != ".").then_some(field);
        self
    }

    /// What to do next.
    pub(crate) fn with_next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    pub(crate) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    pub(crate) fn code(&self) -> &str {
        &self.code
    }
}

impl<E: Coded> From<E> for Problem {
    fn from(error: E) -> Self {
        let code = error.code();
        let mut messages = chain(&error).into_iter();
        let mut problem = Self::new(status_of(code, error.is_usage()), code, messages.next().unwrap_or_default());
        problem.causes = messages.collect();
        problem.next = error.next();
        problem
    }
}

/// The messages of an error and its causes; a cause that the message before repeats is left out.
fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut messages: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        next = error.source();
        let text: String = error
            .to_string()
            .trim_end()
            .chars()
            .map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c })
            .collect();
        if !messages.last().is_some_and(|last| last.contains(&text)) {
            messages.push(text);
        }
    }
    messages
}

/// In how many seconds it is worth another try, for those who are only too early.
const RETRY_AFTER: u32 = 1;

/// The status for a code. What is not known is the daemon's or its host's fault.
fn status_of(code: &str, is_usage: bool) -> StatusCode {
    let otherwise = if is_usage { StatusCode::BAD_REQUEST } else { StatusCode::INTERNAL_SERVER_ERROR };
    known_status(code).unwrap_or(otherwise)
}

/// The status of each code that `host` has: a new one needs a decision here.
fn known_status(code: &str) -> Option<StatusCode> {
    Some(match code {
        // The request itself is wrong, whatever there is; of the command line, exit code 2.
        "out_of_range"
        | "name_too_long"
        | "invalid_name"
        | "invalid_field"
        | "too_many_mailboxes"
        | "mailbox_twice"
        | "mailbox_reserved"
        | "payload_not_an_object"
        | "network_policy_invalid"
        | "no_network"
        | "needs_tap"
        | "one_port_many_forks"
        | "too_few_forks"
        | "pool_too_large"
        | "pool_network"
        | "engine_contradiction" => StatusCode::BAD_REQUEST,
        "template_not_found" | "fork_not_found" | "recipe_not_found" | "token_not_found" => StatusCode::NOT_FOUND,
        // What there is is not in the state for it.
        "name_conflict"
        | "template_exists"
        | "template_busy"
        | "template_in_use"
        | "template_gone"
        | "template_broken"
        | "template_incompatible"
        | "fork_dead"
        | "fork_not_running"
        | "fork_in_standby"
        | "fork_interrupted"
        | "fork_runs"
        | "fork_busy"
        | "snapshot_unusable"
        | "port_taken"
        | "network_busy" => StatusCode::CONFLICT,
        // This template, fork or host can not be asked for it.
        "mailbox_not_found"
        | "mailbox_ambiguous"
        | "mailbox_token_mismatch"
        | "payload_too_long"
        | "identity_too_long"
        | "variable_not_allowed"
        | "not_supported"
        | "no_network_card"
        | "network_section_invalid"
        | "limit_not_possible"
        | "network_denied"
        | "secrets_not_sealed"
        | "guest_refused"
        | "recipe_invalid"
        | "recipe_unreadable"
        | "template_not_clean"
        | "template_not_audited"
        | "port_privileged"
        | "passt_missing" => StatusCode::UNPROCESSABLE_ENTITY,
        // Later it may go.
        "port_closed" | "channels_busy" | "addresses_exhausted" | "too_many_nets" | "interrupted" => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        "ack_timeout" | "network_ack_timeout" | "guest_timeout" | "guest_stalled" | "engine_timeout" => {
            StatusCode::GATEWAY_TIMEOUT
        }
        // The guest did not do its part.
        "identity_refused" | "network_refused" | "ack_flood" | "fork_ended" | "connection_failed"
        | "mailboxes_unusable" | "guest_not_armed" | "rehearsal_failed" | "answer_unreadable" | "hostile_archive" => {
            StatusCode::BAD_GATEWAY
        }
        // The host did not do its part.
        "no_home"
        | "address_pool_invalid"
        | "directory_unusable"
        | "store_failed"
        | "state_failed"
        | "snapshot_file_failed"
        | "kill_failed"
        | "engine_missing"
        | "engine_failed"
        | "delivery_failed"
        | "ack_channel_failed"
        | "network_failed"
        | "no_random_bytes"
        | "kernel_unusable"
        | "root_image_failed"
        | "initramfs_failed"
        | "build_file_failed"
        | "local_io_failed"
        | "local_file_failed" => StatusCode::INTERNAL_SERVER_ERROR,
        _ => return None,
    })
}

/// The answer that a failure is, told for the first time or again. `body` is a problem document, perhaps with more in it.
pub(crate) fn failed(status: StatusCode, code: Cow<'static, str>, body: &impl Serialize) -> Response {
    let mut response = (status, Json(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        headers.insert(header::RETRY_AFTER, RETRY_AFTER.into());
    }
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response.extensions_mut().insert(ProblemCode(code));
    response
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        failed(self.status(), self.code.clone(), &self)
    }
}

#[cfg(test)]
mod tests {
    use host::forks::ForksError;

    use super::*;

    #[test]
    fn o5_a_problem_names_code_status_cause_and_next_step() {
        let source = std::io::Error::other("disk \x1b[2Jfull");
        let problem = Problem::from(ForksError::Kill { name: "a".into(), source });
        let json = serde_json::to_value(&problem).unwrap_or_default();
        assert_eq!(json["type"], "urn:offshoot:problem:kill_failed");
        assert_eq!((&json["status"], &json["code"]), (&500.into(), &"kill_failed".into()));
        assert_eq!(json["causes"][0], "disk \u{fffd}[2Jfull");
        assert_eq!(json["next"], "offshoot cleanup");
    }

    /// The codes that a source file has: texts of nothing but small letters and underscores.
    fn codes(source: &str) -> impl Iterator<Item = &str> {
        let is_code = |text: &&str| text.contains('_') && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_'));
        source.split('"').skip(1).step_by(2).filter(is_code)
    }

    #[test]
    fn o5_every_code_has_a_status_that_somebody_chose_and_is_documented() {
        let documented = include_str!("../../../docs/json.md");
        let all: Vec<&str> = codes(include_str!("../../host/src/codes.rs")).collect();
        assert!(all.len() > 90, "{all:?}");
        for code in all {
            assert!(known_status(code).is_some(), "{code} needs a status");
            assert!(documented.contains(&format!("`{code}`")), "{code} is not in docs/json.md");
        }
        assert_eq!(known_status("new_code"), None, "the check can fail");
    }

    #[test]
    fn what_a_client_can_mend_is_its_own_fault() {
        for (code, usage, status) in [
            ("variable_not_allowed", false, 422),
            ("template_in_use", false, 409),
            ("snapshot_unusable", false, 409),
            ("secrets_not_sealed", false, 422),
            ("too_many_nets", false, 503),
            ("ack_flood", false, 502),
            ("mailboxes_unusable", false, 502),
            ("needs_tap", true, 400),
            ("out_of_range", true, 400),
            ("name_conflict", false, 409),
            ("ack_timeout", false, 504),
            ("fork_in_standby", false, 409),
            ("fork_interrupted", false, 409),
            ("token_not_found", false, 404),
            ("new", false, 500),
            ("new", true, 400),
        ] {
            assert_eq!(status_of(code, usage).as_u16(), status, "{code}");
        }
    }
}
