//! Failures of a daemon: problem documents (RFC 9457) become this command's own failures.

use hyper::StatusCode;
use serde::Deserialize;

use crate::{
    error::{Failure, USAGE},
    output::clean,
};

/// Why a request failed, as the daemon says it.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Problem {
    code: String,
    detail: String,
    #[serde(default)]
    status: u16,
    #[serde(default)]
    causes: Vec<String>,
    #[serde(default)]
    field: Option<String>,
    #[serde(default)]
    next: Option<String>,
}

impl Problem {
    /// From the body of a failed answer; from elsewhere than a daemon it may be anything.
    pub fn read(status: StatusCode, body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_else(|_| Self {
            code: "host_answer".into(),
            detail: format!("what answers is no offshoot daemon: {status}"),
            status: status.as_u16(),
            ..Self::default()
        })
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        let message = match &problem.field {
            Some(field) if problem.code == "invalid_request" => format!("{field}: {}", problem.detail),
            _ => problem.detail,
        };
        let failure = Self::new(clean::line(&problem.code), message);
        let failure = failure.with_causes(problem.causes.iter().map(|cause| clean::text(cause)));
        let failure = match &problem.next {
            Some(next) => failure.with_next(clean::line(next)),
            None => failure,
        };
        if problem.status == StatusCode::BAD_REQUEST.as_u16() { failure.with_exit(USAGE) } else { failure }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::FAILED;

    #[test]
    fn o5_a_problem_keeps_its_code_causes_and_next_step_and_can_not_drive_the_terminal() {
        let text = r#"{"type":"urn:x","title":"Conflict","status":409,"detail":"a\u001b[2J","code":"name_conflict","causes":["b\u001b[2J"],"next":"offshoot ls"}"#;
        let failure = Failure::from(Problem::read(StatusCode::CONFLICT, text.as_bytes()));
        let value = failure.to_value();
        assert_eq!((failure.code(), failure.exit()), ("name_conflict", FAILED));
        assert_eq!(value["message"], "a\\u{1b}[2J");
        assert_eq!((&value["causes"][0], &value["next"]), (&"b\\u{1b}[2J".into(), &"offshoot ls".into()));
    }

    #[test]
    fn what_is_wrong_with_a_request_is_wrong_usage_and_names_the_field() {
        let text = br#"{"status":400,"detail":"it is no base64","code":"invalid_request","field":"files[0]"}"#;
        let failure = Failure::from(Problem::read(StatusCode::BAD_REQUEST, text));
        assert_eq!((failure.exit(), failure.on_one_line().as_str()), (USAGE, "files[0]: it is no base64"));
    }

    #[test]
    fn an_answer_of_somebody_else_is_a_typed_error() {
        let failure = Failure::from(Problem::read(StatusCode::BAD_GATEWAY, b"<html>"));
        assert_eq!(failure.code(), "host_answer");
    }
}
