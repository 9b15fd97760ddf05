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
    /// In how many seconds it is worth another try.
    #[serde(skip)]
    retry_after: Option<u32>,
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
            retry_after: (status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::SERVICE_UNAVAILABLE)
                .then_some(1),
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

/// The status for a code. What is not listed is the daemon's or its host's fault.
fn status_of(code: &str, is_usage: bool) -> StatusCode {
    match code {
        "template_not_found" | "fork_not_found" | "recipe_not_found" | "token_not_found" => StatusCode::NOT_FOUND,
        "name_conflict"
        | "template_exists"
        | "template_busy"
        | "fork_dead"
        | "fork_not_running"
        | "fork_in_standby"
        | "fork_interrupted"
        | "fork_runs"
        | "template_gone"
        | "fork_busy"
        | "port_taken"
        | "network_busy"
        | "template_broken"
        | "template_incompatible" => StatusCode::CONFLICT,
        "mailbox_not_found"
        | "mailbox_ambiguous"
        | "mailbox_token_mismatch"
        | "payload_too_long"
        | "identity_too_long"
        | "not_supported"
        | "no_network_card"
        | "limit_not_possible"
        | "network_denied"
        | "needs_tap"
        | "guest_refused"
        | "recipe_invalid"
        | "template_not_clean"
        | "template_not_audited"
        | "recipe_unreadable"
        | "port_privileged"
        | "passt_missing" => StatusCode::UNPROCESSABLE_ENTITY,
        "port_closed" | "channels_busy" | "addresses_exhausted" => StatusCode::SERVICE_UNAVAILABLE,
        "interrupted" => StatusCode::SERVICE_UNAVAILABLE,
        "ack_timeout" | "network_ack_timeout" | "guest_timeout" | "guest_stalled" | "engine_timeout" => {
            StatusCode::GATEWAY_TIMEOUT
        }
        "identity_refused" | "fork_ended" | "connection_failed" | "network_refused" => StatusCode::BAD_GATEWAY,
        _ if is_usage => StatusCode::BAD_REQUEST,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, code, retry_after) = (self.status(), ProblemCode(self.code.clone()), self.retry_after);
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(code);
        response
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

    #[test]
    fn what_a_client_can_mend_is_its_own_fault() {
        for (code, usage, status) in [
            ("out_of_range", true, 400),
            ("name_conflict", false, 409),
            ("ack_timeout", false, 504),
            ("fork_in_standby", false, 409),
            ("fork_interrupted", false, 409),
            ("token_not_found", false, 404),
            ("new", false, 500),
        ] {
            assert_eq!(status_of(code, usage).as_u16(), status, "{code}");
        }
    }
}
