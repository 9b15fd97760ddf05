//! What a request says, parsed at the door. No answer repeats a value: it may be a secret.

use axum::{
    extract::{
        FromRequest, FromRequestParts, Path, Query, Request,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, header, request::Parts},
};
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use crate::problem::Problem;

/// The bytes of a JSON body. They may hold secrets: they are wiped when they have been read.
pub(crate) struct Raw(pub(crate) Zeroizing<Vec<u8>>);

impl<S: Send + Sync> FromRequest<S> for Raw {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            let detail = "the body must be JSON; send Content-Type: application/json";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail));
        }
        let bytes = axum::body::Bytes::from_request(request, state).await.map_err(body_refused)?;
        Ok(Self(Zeroizing::new(Vec::from(bytes))))
    }
}

/// A JSON body.
#[derive(Debug)]
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let Raw(bytes) = Raw::from_request(request, state).await?;
        parse(&bytes).map(Self)
    }
}

/// Parses JSON; the error names the field.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = error.path().to_string();
        Problem::invalid(field, without_values(error.inner()))
    })?;
    json.end().map_err(|error| Problem::invalid("", without_values(&error)))?;
    Ok(value)
}

/// What serde says is wrong, without what it found there.
fn without_values(error: &serde_json::Error) -> String {
    let place = || format!("line {}, column {}", error.line(), error.column());
    if error.is_syntax() || error.is_eof() {
        return format!("the body is no JSON at {}", place());
    }
    what_is_wrong(error.to_string())
}

/// A message of serde's, without what it repeats of the values that it found.
fn what_is_wrong(text: String) -> String {
    for kind in ["invalid type", "invalid value", "invalid length", "unknown variant"] {
        if text.starts_with(kind) {
            let expected = text.rsplit_once(", expected ").map_or("something else", |(_, expected)| expected);
            return format!("{kind}: expected {expected}");
        }
    }
    text
}

fn body_refused(rejection: BytesRejection) -> Problem {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("a request's JSON has at most {} bytes; send larger files with PUT …/files", crate::MAX_JSON),
        ),
        _ => Problem::invalid("", "the body could not be read"),
    }
}

/// The parts of the path.
#[derive(Debug)]
pub(crate) struct At<T>(pub(crate) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for At<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(value) = Path::<T>::from_request_parts(parts, state)
            .await
            .map_err(|_: PathRejection| Problem::invalid("path", "a part of the path is not percent-encoded UTF-8"))?;
        Ok(Self(value))
    }
}

/// The query.
#[derive(Debug)]
pub(crate) struct Asked<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(value) = Query::<T>::from_request_parts(parts, state).await.map_err(query_refused)?;
        Ok(Self(value))
    }
}

fn query_refused(rejection: QueryRejection) -> Problem {
    let text: String = rejection.body_text().chars().take(300).collect();
    // What it says of a single field begins with the field's name.
    let text = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
    let named = |field: &&str| field.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_'));
    match text.split_once(": ").filter(|(field, _)| named(field)) {
        Some((field, text)) => Problem::invalid(field, what_is_wrong(text.to_owned())),
        None => Problem::invalid("query", what_is_wrong(text.to_owned())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Given {
        secrets: BTreeMap<String, u8>,
    }

    #[test]
    fn i15_an_error_names_the_field_and_not_what_was_in_it() {
        for body in [
            r#"{"secrets": "hunter2"}"#,
            r#"{"secrets": {"KEY": "hunter2"}}"#,
            r#"{"secrets": {"KEY": 1}} hunter2"#,
            r#"{"secrets": hunter2}"#,
        ] {
            let problem = parse::<Given>(body.as_bytes()).unwrap_err();
            let text = serde_json::to_string(&problem).unwrap();
            assert!(!text.contains("hunter2"), "{text}");
            assert_eq!(problem.code(), "invalid_request");
        }
        let text = serde_json::to_string(&parse::<Given>(br#"{"secrets": {"KEY": "x"}}"#).unwrap_err()).unwrap();
        assert!(text.contains(r#""field":"secrets.KEY""#), "{text}");
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Choice {
        This,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Query {
        count: Option<u8>,
        choice: Option<Choice>,
        flag: Option<bool>,
    }

    #[tokio::test]
    async fn i15_nor_do_a_query_s_and_a_path_s() {
        let problem = async |uri: &str| {
            let (mut parts, ()) = axum::http::Request::get(uri).body(()).unwrap().into_parts();
            let problem = Asked::<Query>::from_request_parts(&mut parts, &()).await.unwrap_err();
            let json = serde_json::to_value(&problem).unwrap();
            assert!(!json.to_string().contains("hunter2"), "{json}");
            json
        };
        for (uri, field) in [
            ("/?count=hunter2", "count"),
            ("/?choice=hunter2", "choice"),
            ("/?flag=hunter2", "flag"),
            ("/?count=1&count=hunter2", "query"),
            ("/?absent=hunter2", "absent"),
        ] {
            assert_eq!(problem(uri).await["field"], field, "{uri}");
        }
        assert!(problem("/?absent=1").await["detail"].as_str().unwrap().contains("absent"), "a name may be said");

        let service =
            axum::Router::<()>::new().route("/{number}/{text}", axum::routing::get(|At(_): At<(u8, String)>| async {}));
        for uri in ["/hunter2/x", "/1/hunter2%ff"] {
            let request = axum::http::Request::get(uri).body(axum::body::Body::empty()).unwrap();
            let answer = tower::ServiceExt::oneshot(service.clone(), request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
            let body = axum::body::to_bytes(answer.into_body(), 4096).await.unwrap();
            assert!(!String::from_utf8_lossy(&body).contains("hunter2"), "{body:?}");
        }
    }
}
