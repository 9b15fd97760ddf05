//! Requests to a daemon, one after the other on one connection.

use std::{env, io, os::unix::ffi::OsStringExt, path::Path, time::Duration};

use http_body_util::{BodyExt, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1::{self, SendRequest},
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, RETRY_AFTER},
};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{address::Address, dial::Dialer, problem::Problem};
use crate::error::Failure;

/// Most bytes of a document: a thousand forks have some megabytes.
const MOST: usize = 64 << 20;
/// How often a request is sent again that was one too many in its second.
const PATIENCE: u32 = 60;
/// Longest time that is waited before that.
const LONGEST_WAIT: u64 = 5;
/// Variable with the token. An argument could be read by everybody on this machine.
const TOKEN: &str = "OFFSHOOT_TOKEN";

/// The body of a request.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Asks a daemon.
pub struct Client {
    dialer: Dialer,
    authorization: Option<HeaderValue>,
    connection: Option<SendRequest<Body>>,
}

/// A body that is there.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// One part of a path or of a query, whatever is in it.
pub fn part(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

impl Client {
    /// With the token of the environment, if there is one. Nothing is sent yet.
    pub fn new(address: Address, ca: Option<&Path>) -> Result<Self, Failure> {
        let authorization = match env::var_os(TOKEN).filter(|token| !token.is_empty()) {
            None => None,
            Some(token) => {
                let header = HeaderValue::from_bytes(&[b"Bearer ", token.into_vec().as_slice()].concat());
                let mut header = header.map_err(|_| Failure::usage(format!("{TOKEN} holds no token")))?;
                header.set_sensitive(true);
                Some(header)
            }
        };
        Ok(Self { dialer: Dialer::new(address, ca)?, authorization, connection: None })
    }

    /// GET of a document.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Failure> {
        self.document(Method::GET, path, None).await
    }

    /// POST of a document, answered by one.
    pub async fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        self.post_bytes(path, json(body)?).await
    }

    /// The same where the document is written already.
    pub async fn post_bytes<T: DeserializeOwned>(&mut self, path: &str, body: Bytes) -> Result<T, Failure> {
        self.document(Method::POST, path, Some(body)).await
    }

    /// PUT of a document, answered by one.
    pub async fn put<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        self.document(Method::PUT, path, Some(json(body)?)).await
    }

    /// DELETE.
    pub async fn delete(&mut self, path: &str) -> Result<(), Failure> {
        self.patiently(Method::DELETE, path, None).await.map(drop)
    }

    async fn document<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<T, Failure> {
        let answer = self.patiently(method, path, body).await?;
        let bytes = whole(answer).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Failure::new("host_answer", "the daemon's answer can not be read; is it of another version?")
                .with_causes([error.to_string()])
                .with_next("offshoot version")
        })
    }

    /// Sends it, again if the daemon said that it was one too many: it was not begun then.
    async fn patiently(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Response<Incoming>, Failure> {
        let mut tries = 0;
        loop {
            let kind = body.as_ref().map(|_| (CONTENT_TYPE, HeaderValue::from_static("application/json")));
            let sent = body.clone().map_or_else(|| full(Bytes::new()), full);
            let answer = self.send(method.clone(), path, kind, sent).await?;
            if answer.status() != StatusCode::TOO_MANY_REQUESTS || tries == PATIENCE {
                return good(answer).await;
            }
            tries += 1;
            let after = answer.headers().get(RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
            tokio::time::sleep(Duration::from_secs(after.unwrap_or(1).min(LONGEST_WAIT))).await;
            whole(answer).await?;
        }
    }

    /// A request whose body is a stream.
    pub async fn upload(&mut self, path: &str, body: Body) -> Result<(), Failure> {
        let kind = (CONTENT_TYPE, HeaderValue::from_static("application/x-tar"));
        let answer = self.send(Method::PUT, path, Some(kind), body).await?;
        if !answer.status().is_success() {
            // The rest of the body is still on its way.
            self.connection = None;
        }
        good(answer).await.map(drop)
    }

    /// A request whose answer is a stream.
    pub async fn download(&mut self, path: &str) -> Result<Response<Incoming>, Failure> {
        self.patiently(Method::GET, path, None).await
    }

    /// A request that asks for another protocol.
    pub async fn upgrade(
        &mut self,
        path: &str,
        headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
    ) -> Result<Response<Incoming>, Failure> {
        let answer = self.send(Method::GET, path, headers, full(Bytes::new())).await?;
        // On this connection there is no further request.
        self.connection = None;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS { Ok(answer) } else { good(answer).await }
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
        body: Body,
    ) -> Result<Response<Incoming>, Failure> {
        let internal = |error: &(dyn std::error::Error + 'static)| Failure::of("internal", error);
        let mut request = Request::builder().method(method).uri(path).header(HOST, self.dialer.authority());
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|error| internal(&error))?;
        // The one before, unless the daemon has closed it.
        let mut reused = self.connection.take();
        if let Some(connection) = &mut reused
            && connection.ready().await.is_err()
        {
            reused = None;
        }
        let mut connection = match reused {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let answer = connection.send_request(request).await.map_err(|error| lost(&error))?;
        self.connection = Some(connection);
        Ok(answer)
    }

    async fn connect(&self) -> Result<SendRequest<Body>, Failure> {
        let stream = TokioIo::new(self.dialer.dial().await?);
        let (sender, connection) = http1::handshake(stream).await.map_err(|error| lost(&error))?;
        tokio::spawn(async move {
            // Whoever waits for an answer is told.
            let _ = connection.with_upgrades().await;
        });
        Ok(sender)
    }
}

fn json(body: &impl Serialize) -> Result<Bytes, Failure> {
    serde_json::to_vec(body).map(Bytes::from).map_err(|error| Failure::of("internal", &error))
}

/// The answer, or the problem that it tells.
async fn good(answer: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    Err(Problem::read(status, &whole(answer).await?).into())
}

async fn whole(answer: Response<Incoming>) -> Result<Bytes, Failure> {
    let collected = Limited::new(answer.into_body(), MOST).collect().await;
    let whole = collected.map_err(|error| Failure::new("host_lost", LOST).with_causes([error.to_string()]))?;
    Ok(whole.to_bytes())
}

/// What is said of a daemon that went away in the middle.
const LOST: &str = "the connection to the daemon ended in the middle; what it had begun it may have finished";

/// The daemon went away in the middle.
pub fn lost(error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut causes = vec![error.to_string()];
    causes.extend(error.source().map(ToString::to_string));
    Failure::new("host_lost", LOST).with_causes(causes).with_next("see what is there: offshoot ls")
}

/// A stream of the daemon's ended early.
pub fn ended() -> Failure {
    Failure::new("host_lost", LOST).with_next("see what is there: offshoot ls")
}

/// A list below a field, whatever else there is.
pub fn list<T: DeserializeOwned>(document: &Value, field: &str) -> Result<Vec<T>, Failure> {
    read(&document[field])
}

/// A part of a document.
pub fn read<T: DeserializeOwned>(value: &Value) -> Result<T, Failure> {
    T::deserialize(value).map_err(|error| {
        Failure::new("host_answer", "the daemon's answer can not be read; is it of another version?")
            .with_causes([error.to_string()])
            .with_next("offshoot version")
    })
}
