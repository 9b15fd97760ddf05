//! Who asks, and what they may do.

mod rate;
mod token;

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{StatusCode, header, request::Parts},
    middleware::Next,
    response::Response,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub(crate) use rate::Rates;
pub use token::{NewToken, TokenError, TokenInfo, Tokens};

use crate::{App, problem::Problem};

/// What somebody may do. Each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Look at everything that no secret is in.
    Read,
    /// Make forks, and do anything in and to them.
    Fork,
    /// Templates, pools and tokens too.
    Admin,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Read => "read",
            Self::Fork => "fork",
            Self::Admin => "admin",
        })
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Read, Self::Fork, Self::Admin]
            .into_iter()
            .find(|scope| scope.to_string() == text)
            .ok_or_else(|| "a scope is read, fork or admin".to_owned())
    }
}

/// Where a connection comes from.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// The unix socket, with the user id that the kernel vouches for.
    Unix { uid: u32 },
    /// TCP, with TLS unless it is loopback.
    Tcp(SocketAddr),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { uid } => write!(f, "unix:{uid}"),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Principal {
    /// `uid-0`, `token-3f…`: fit for a file's name.
    pub(crate) id: Arc<str>,
    /// For people.
    pub(crate) name: Arc<str>,
    pub(crate) scope: Scope,
    /// Whether its requests are counted.
    limited: bool,
}

impl Principal {
    /// The holder of a token.
    pub(crate) fn of_token(id: &str, name: &str, scope: Scope) -> Self {
        Self { id: format!("token-{id}").into(), name: name.into(), scope, limited: true }
    }
}

/// Who asks, once it is known; for whoever writes it down, also if there is no answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Who(Arc<OnceLock<Principal>>);

impl Who {
    pub(crate) fn get(&self) -> Option<&Principal> {
        self.0.get()
    }
}

/// Finds out who asks, before anything else. A token counts wherever it comes from; without one the unix socket's peer counts.
pub(crate) async fn authenticate(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let peer = request.extensions().get::<Peer>().cloned();
    let principal = match (bearer(request.headers())?, peer) {
        (Some(token), _) => {
            let found = app.tokens.find(token).map_err(Problem::from)?;
            let info = found.ok_or_else(|| unauthorized("the token is not valid; it may be revoked or expired"))?;
            Principal::of_token(&info.id, &info.name, info.scope)
        }
        (None, Some(Peer::Unix { uid })) => {
            let is_own = uid == 0 || uid == rustix::process::geteuid().as_raw();
            Principal {
                id: format!("uid-{uid}").into(),
                name: format!("user {uid}").into(),
                scope: if is_own { Scope::Admin } else { app.socket_scope },
                limited: !is_own,
            }
        }
        (None, _) => return Err(unauthorized("this needs a token: send Authorization: Bearer TOKEN")),
    };
    // Before anything can fail: it is in the audit then.
    if let Some(who) = request.extensions().get::<Who>() {
        let _ = who.0.set(principal.clone());
    }
    if principal.limited && !app.rates.take(&principal.id) {
        let detail = "too many requests of this token or user; see Retry-After";
        return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", detail));
    }
    request.extensions_mut().insert(principal);
    Ok(next.run(request).await)
}

fn bearer(headers: &axum::http::HeaderMap) -> Result<Option<&str>, Problem> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let refused = || unauthorized("the Authorization header must be: Bearer TOKEN");
    let (scheme, token) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(refused)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(Some(token.trim())) } else { Err(refused()) }
}

fn unauthorized(detail: &str) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail).with_next("offshoot token create NAME --scope fork")
}

macro_rules! needs {
    ($(#[$doc:meta])* $type:ident, $scope:expr) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[allow(dead_code)] // Its being there is what counts.
        pub(crate) struct $type(pub(crate) Principal);

        impl<S: Send + Sync> FromRequestParts<S> for $type {
            type Rejection = Problem;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
                let principal = parts.extensions.get::<Principal>().cloned();
                let principal = principal.ok_or_else(|| unauthorized("this needs a token"))?;
                if principal.scope < $scope {
                    let detail = format!("this needs the scope {}; {} has {}", $scope, principal.name, principal.scope);
                    return Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail));
                }
                Ok(Self(principal))
            }
        }
    };
}

needs!(
    /// A request of somebody who may look.
    Reader,
    Scope::Read
);
needs!(
    /// A request of somebody who may fork.
    Forker,
    Scope::Fork
);
needs!(
    /// A request of somebody who may do everything.
    Admin,
    Scope::Admin
);
