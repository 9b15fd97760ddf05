//! What streams have in common.

use std::time::Duration;

use axum::response::sse::KeepAlive;
use serde::Serialize;
use utoipa::ToSchema;

/// Clients and what is between hold a connection that is silent for a minute for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One event of a stream, as its lines say it. For the document only.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ServerSent {
    /// What it is.
    event: String,
    /// More of it: JSON as text.
    data: String,
}

pub(super) fn keep_alive() -> KeepAlive {
    KeepAlive::new().interval(KEEP_ALIVE)
}
