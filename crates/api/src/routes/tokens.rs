//! Tokens.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State, http::StatusCode, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{answer, block};
use crate::{
    App,
    auth::{Admin, Scope, TokenInfo},
    extract::{At, Body},
    problem::Problem,
};

/// All tokens, without what makes them tokens.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Tokens)]
pub(super) struct All {
    tokens: Vec<TokenInfo>,
}

/// List tokens
#[utoipa::path(get, path = "/v1/tokens", tag = "daemon", responses(
    (status = 200, description = "All", body = All),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(app): State<Arc<App>>, _: Admin) -> Result<Json<All>, Problem> {
    block(move || Ok(Json(All { tokens: app.tokens.list()? }))).await
}

/// A token to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateToken)]
pub(super) struct Wanted {
    /// What it is for.
    #[schema(example = "ci", min_length = 1, max_length = 64)]
    name: String,
    /// What it allows.
    scope: Scope,
    /// How long it is good for, in seconds; without it until it is removed.
    #[schema(minimum = 1, nullable = false)]
    expires_s: Option<u64>,
}

/// A token that was made.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CreatedToken)]
pub(super) struct Made {
    #[serde(flatten)]
    info: TokenInfo,
    /// The token: it is shown this once.
    #[schema(format = Password)]
    token: String,
}

/// Make a token
#[utoipa::path(post, path = "/v1/tokens", tag = "daemon", request_body = Wanted, responses(
    (status = 201, description = "It", body = Made),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    _: Admin,
    Body(wanted): Body<Wanted>,
) -> Result<Response, Problem> {
    if wanted.expires_s == Some(0) {
        return Err(Problem::invalid("expires_s", "a token is good for a second at least"));
    }
    block(move || {
        let made = app.tokens.create(&wanted.name, wanted.scope, wanted.expires_s.map(Duration::from_secs))?;
        let token = String::from_utf8_lossy(made.token.expose()).into_owned();
        Ok(answer(StatusCode::CREATED, &Made { info: made.info, token }))
    })
    .await
}

/// Remove a token
///
/// It ends at once.
#[utoipa::path(delete, path = "/v1/tokens/{id}", tag = "daemon", params(("id" = String, Path, description = "Its id")), responses(
    (status = 204, description = "It is gone"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn remove(State(app): State<Arc<App>>, _: Admin, At(id): At<String>) -> Result<StatusCode, Problem> {
    block(move || Ok(app.tokens.remove(&id)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}
