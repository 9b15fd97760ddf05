//! Spare machines.

use std::sync::Arc;

use axum::{Json, extract::State};
use host::{engines, network::Mode, pool};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{block, templates::tag};
use crate::{
    App,
    auth::{Admin, Reader},
    extract::{At, Body},
    problem::Problem,
};

/// A template's pool.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Pool {
    /// The template.
    template: String,
    /// How many spares it is to have.
    size: usize,
    /// What their network cards lead to: `none` or `tap`.
    network: String,
    /// How many are ready.
    ready: usize,
    /// Bytes of memory that they have for themselves.
    private_bytes: u64,
}

impl From<pool::Pool> for Pool {
    fn from(pool: pool::Pool) -> Self {
        Self {
            template: pool.template.to_string(),
            size: pool.size,
            network: pool.network.to_string(),
            ready: pool.ready,
            private_bytes: pool.private_bytes,
        }
    }
}

/// All pools.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Pools)]
pub(super) struct All {
    pools: Vec<Pool>,
}

/// List pools
#[utoipa::path(get, path = "/v1/pools", tag = "templates", responses(
    (status = 200, description = "All", body = All),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The daemon failed", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(app): State<Arc<App>>, _: Reader) -> Result<Json<All>, Problem> {
    block(move || Ok(Json(All { pools: pool::list(&app.home)?.into_iter().map(Pool::from).collect() }))).await
}

/// A pool as it is to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PoolSize)]
pub(super) struct Size {
    /// How many machines to keep started; 0 ends them.
    #[schema(minimum = 0, maximum = 256)]
    size: usize,
    /// What their network cards lead to: `none` or `tap`; only forks that ask for the same use them. Without it as a fork without a mode.
    #[schema(nullable = false)]
    network: Option<String>,
}

/// Keep machines of a template started
///
/// Forks take them over instead of starting their own. Answers when they are ready.
#[utoipa::path(put, path = "/v1/pools/{tag}", tag = "templates", params(("tag" = String, Path, description = "The template's tag")), request_body = Size, responses(
    (status = 200, description = "All pools", body = All),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "They could not be started", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn set(
    State(app): State<Arc<App>>,
    _: Admin,
    At(text): At<String>,
    Body(asked): Body<Size>,
) -> Result<Json<All>, Problem> {
    let tag = tag(&text)?;
    let mode = match asked.network.as_deref().map(str::parse::<Mode>).transpose() {
        Ok(mode) => mode.unwrap_or_else(Mode::default_here),
        Err(error) => return Err(Problem::invalid("network", error.to_string())),
    };
    let share = app.work.moving()?;
    block(move || {
        let _share = share;
        let template = app.store.get(&tag)?;
        if asked.size == 0 {
            pool::end(&app.home, &tag)?;
        } else {
            let engine = engines::for_template(template.manifest())?;
            pool::set_size(&app.home, &tag, asked.size, mode)?;
            pool::fill(&app.home, engine.as_ref(), &template, true)?;
        }
        Ok(Json(All { pools: pool::list(&app.home)?.into_iter().map(Pool::from).collect() }))
    })
    .await
}
