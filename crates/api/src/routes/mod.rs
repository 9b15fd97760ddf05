//! The routes, and the document that describes them.
// What the macros of utoipa are given looks like it to the lint.
#![allow(unused_qualifications)]

mod exec;
mod files;
mod forks;
mod jobs;
mod logs;
mod meta;
mod pools;
mod ports;
mod stream;
mod templates;
mod tokens;

use std::{borrow::Cow, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{HeaderValue, Method, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use host::{ForkRecord, forks as host_forks, guest::GuestChannel};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use meta::Readiness;

use crate::{
    App, MAX_JSON,
    audit::Outcome,
    auth,
    problem::{Problem, ProblemCode},
};

/// Time for a fork's agent to answer: it may have to be read in from disk on a busy machine.
const CONNECT_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "offshoot",
        description = "Fork a warm sandbox; every fork wakes up as itself.\n\nForks are addressed by name, by id, or by the unique beginning of an id (6 digits or more). \
Failures are problem documents (RFC 9457, `application/problem+json`) whose `code` is stable. Without a token, only the unix socket's own user (and root) may do \
everything.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "templates", description = "Captured warm sandboxes"),
        (name = "forks", description = "Running clones, each with an identity of its own"),
        (name = "jobs", description = "Long work and its progress"),
        (name = "daemon", description = "The daemon itself"),
    ),
    components(schemas(files::Format, crate::events::Event)),
    modifiers(&Secured),
    security(("token" = [])),
)]
struct Document;

struct Secured;

impl Modify for Secured {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(
            "A token made with `offshoot token create`. Its scope (read, fork, admin) says what it may do; each includes those before it.",
        ));
        document.components.get_or_insert_default().add_security_scheme("token", SecurityScheme::Http(scheme.build()));
    }
}

fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(templates::list, templates::build))
        .routes(routes!(templates::get, templates::remove))
        .routes(routes!(templates::mailboxes))
        .routes(routes!(templates::verify))
        .routes(routes!(forks::list, forks::create))
        .routes(routes!(forks::get, forks::remove))
        .routes(routes!(forks::ping))
        .routes(routes!(forks::standby))
        .routes(routes!(forks::resume))
        .routes(routes!(forks::eval))
        .routes(routes!(exec::run, exec::attach))
        .routes(routes!(ports::connect))
        .routes(routes!(files::download, files::upload))
        .routes(routes!(logs::logs))
        .routes(routes!(pools::list))
        .routes(routes!(pools::set))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::get))
        .routes(routes!(jobs::events))
        .routes(routes!(meta::events))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::remove))
        .routes(routes!(meta::version))
        .routes(routes!(meta::metrics))
}

/// What needs no token.
fn open() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(meta::live)).routes(routes!(meta::ready))
}

/// The document (OpenAPI 3.1) that describes every route.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    described().merge(open()).to_openapi()
}

/// The whole service.
pub(crate) fn service(app: &Arc<App>) -> Router {
    let (protected, _) = described().split_for_parts();
    let (public, _) = open().split_for_parts();
    let protected = protected
        .layer(DefaultBodyLimit::max(MAX_JSON))
        .layer(middleware::from_fn_with_state(Arc::clone(app), auth::authenticate));
    public
        .merge(meta::pages())
        .merge(protected)
        .fallback(|| async {
            Problem::new(StatusCode::NOT_FOUND, "no_such_route", "there is no such route; see /docs")
        })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this route does not take that; see /docs",
            )
        })
        .layer(middleware::from_fn_with_state(Arc::clone(app), account))
        .with_state(Arc::clone(app))
}

/// Counts, logs and writes down every request; gives each a number.
async fn account(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let number = app.next_request();
    let who = auth::Who::default();
    request.extensions_mut().insert(who.clone());
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let mut entry = Entry {
        number,
        begun: Instant::now(),
        who,
        from: request.extensions().get::<auth::Peer>().map_or_else(String::new, ToString::to_string),
        method: known(request.method()),
        path: request.uri().path().to_owned(),
        route: matched.unwrap_or("none").to_owned(),
        answer: None,
        app,
    };
    let mut response = next.run(request).await;
    let code = response.extensions().get::<ProblemCode>().map(|code| code.0.clone());
    entry.answer = Some((response.status().as_u16(), code));
    drop(entry);
    let headers = response.headers_mut();
    headers.insert("x-request-id", HeaderValue::from(number));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// The name of a method, if it is one: what a client makes up neither becomes a label nor fills the audit.
fn known(method: &Method) -> &'static str {
    const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"];
    METHODS.into_iter().find(|known| *known == method.as_str()).unwrap_or("OTHER")
}

/// A request that is being worked on. It is written down when this value goes: with its answer, or because its client went away before there
/// was one, which must not keep it out of the audit.
#[derive(Debug)]
struct Entry {
    app: Arc<App>,
    number: u64,
    begun: Instant,
    who: auth::Who,
    from: String,
    method: &'static str,
    path: String,
    route: String,
    answer: Option<(u16, Option<Cow<'static, str>>)>,
}

/// The status that is noted for a client that did not wait for one.
const CLIENT_GONE: u16 = 499;

impl Drop for Entry {
    fn drop(&mut self) {
        let took = self.begun.elapsed();
        let (status, code) = self.answer.take().unwrap_or_else(|| (CLIENT_GONE, Some("client_gone".into())));
        let (app, method, route, code) = (&self.app, self.method, self.route.as_str(), code.as_deref());
        app.metrics.answered(method, route, status, took);
        let who = self.who.get();
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        tracing::info!(
            request = self.number,
            who = who.map_or("nobody", |who| &who.id),
            method,
            route,
            status,
            code = code.unwrap_or_default(),
            micros,
            "answered"
        );
        // Health is asked for all the time, by nobody in particular.
        if route == "/healthz" || route == "/readyz" {
            return;
        }
        let (request, from, path) = (self.number, self.from.as_str(), self.path.as_str());
        let outcome = Outcome { request, from, method, path, status, code, micros };
        if let Err(error) = app.audit.write(who, &outcome) {
            tracing::error!(%error, "the audit could not be written");
        }
    }
}

/// Runs what blocks, to its end even if the client goes away.
async fn block<T: Send + 'static>(work: impl FnOnce() -> Result<T, Problem> + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Problem::internal(&error))?
}

/// A fork by name, id or the beginning of its id.
async fn find(app: &Arc<App>, wanted: String) -> Result<ForkRecord, Problem> {
    let app = Arc::clone(app);
    block(move || host_forks::get(&app.home, &wanted).map_err(Problem::from)).await
}

/// A fork that runs, and a channel to its agent.
async fn connect(app: &Arc<App>, wanted: String) -> Result<(ForkRecord, GuestChannel), Problem> {
    let found = Arc::clone(app);
    let record = block(move || host_forks::get_alive(&found.home, &wanted).map_err(Problem::from)).await?;
    let channel = app.channels.get(&app.home, &record, CONNECT_LIMIT).await?;
    Ok((record, channel))
}

/// JSON with a status.
fn answer<T: serde::Serialize>(status: StatusCode, body: &T) -> Response {
    (status, axum::Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    /// Everything below a value, itself too.
    fn all(value: &Value) -> Vec<&Value> {
        let below: Vec<&Value> = match value {
            Value::Array(items) => items.iter().collect(),
            Value::Object(fields) => fields.values().collect(),
            _ => Vec::new(),
        };
        std::iter::once(value).chain(below.into_iter().flat_map(all)).collect()
    }

    #[test]
    fn the_document_says_where_parameters_are_and_refers_to_what_it_has() {
        let document = json!(super::openapi());
        let mut seen = 0;
        for (path, methods) in document["paths"].as_object().into_iter().flatten() {
            for parameter in all(methods).iter().filter_map(|value| value["parameters"].as_array()).flatten() {
                let name = parameter["name"].as_str().unwrap_or_default();
                let is_in_path = path.contains(&format!("{{{name}}}"));
                assert!(parameter["in"] != "path" || is_in_path, "{path}: {name} is no part of it");
                seen += usize::from(parameter["in"] == "query");
            }
        }
        assert!(seen >= 10, "only {seen} parameters of queries are described");
        for reference in all(&document).iter().filter_map(|value| value["$ref"].as_str()) {
            let there = document.pointer(reference.trim_start_matches('#'));
            assert!(there.is_some(), "{reference} leads nowhere");
        }
    }
}
