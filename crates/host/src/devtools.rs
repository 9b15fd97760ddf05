//! Where the DevTools of a fork's browser are, as the browser itself says: `ready_cdp` of the recipe names its port.

use std::{num::NonZeroU16, time::Duration};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request,
    body::Bytes,
    client::conn::http1,
    header::{CONNECTION, HOST},
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use crate::{
    Home, forks,
    guest::{GuestChannel, GuestError},
    record::ForkRecord,
};

/// Most bytes of the answer; Chromium's has some 400.
const MAX_ANSWER: usize = 16 << 10;
/// Most bytes of its head.
const MAX_HEAD: usize = 16 << 10;
/// Longest path. That of Chromium has 54 bytes.
const MAX_PATH: usize = 128;

/// Why it is not known.
#[derive(Debug, Error)]
pub enum DevtoolsError {
    /// The fork.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// No answer in time.
    #[error("port {port} did not say within {} s where its DevTools are", limit.as_secs())]
    Late {
        /// The port.
        port: NonZeroU16,
        /// How long was waited.
        limit: Duration,
    },
    /// What answers is no browser, or no honest one.
    #[error("what listens on port {0} does not speak DevTools")]
    Other(NonZeroU16),
}

/// The path of a browser's DevTools: the guest says it, so it is one of few letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevtoolsPath(String);

impl DevtoolsPath {
    /// Of an answer to `GET /json/version`. Host and port in it are not looked at: which they are depends on who asks.
    fn read(answer: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Version {
            #[serde(rename = "webSocketDebuggerUrl")]
            url: String,
        }
        let Version { url } = serde_json::from_slice(answer).ok()?;
        let address = url.strip_prefix("ws://")?;
        let path = address.get(address.find('/')?..)?;
        let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'_' | b'-');
        (path.len() <= MAX_PATH && path.bytes().all(plain)).then(|| Self(path.to_owned()))
    }

    /// It begins with a slash.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Asks the browser at this port of a fork that runs.
///
/// # Errors
/// [`DevtoolsError`], at the latest after `limit`.
pub async fn of(
    home: &Home,
    record: &ForkRecord,
    port: NonZeroU16,
    limit: Duration,
) -> Result<DevtoolsPath, DevtoolsError> {
    let asking = async {
        let channel = GuestChannel::connect(&forks::dir(home, record), limit).await?;
        let stream = channel.forward(port.get()).await?;
        ask(stream.into_io(), port).await
    };
    timeout(limit, asking).await.unwrap_or(Err(DevtoolsError::Late { port, limit }))
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    port: NonZeroU16,
) -> Result<DevtoolsPath, DevtoolsError> {
    let other = || DevtoolsError::Other(port);
    let made = http1::Builder::new().max_buf_size(MAX_HEAD).handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = made.map_err(|_| other())?;
    let request = Request::get("/json/version").header(HOST, format!("127.0.0.1:{port}")).header(CONNECTION, "close");
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| other())?;
    let asking = async {
        let answer = sender.send_request(request).await.map_err(|_| other())?;
        if !answer.status().is_success() {
            return Err(other());
        }
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(|_| other())?;
        DevtoolsPath::read(&body.to_bytes()).ok_or_else(other)
    };
    tokio::select! {
        answered = asking => answered,
        // It ends before the answer only if it fails.
        Err(_) = connection => Err(other()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn version(url: &str) -> Vec<u8> {
        serde_json::json!({ "Browser": "HeadlessChrome", "webSocketDebuggerUrl": url }).to_string().into_bytes()
    }

    #[test]
    fn f5_of_what_a_guest_says_of_its_devtools_only_a_plain_path_is_taken() {
        let path = "/devtools/browser/0f2c_-Aa-9";
        for host in ["127.0.0.1:9222", "localhost", "elsewhere.example:1", "user@elsewhere.example", ""] {
            let answer = version(&format!("ws://{host}{path}"));
            assert_eq!(DevtoolsPath::read(&answer).unwrap().as_str(), path, "{host}");
        }
        let long = format!("ws://h/{}", "a".repeat(MAX_PATH));
        for url in [
            "",
            "ws://h",
            "wss://h/a",
            "http://h/a",
            "/devtools/browser/a",
            "ws://h/a b",
            "ws://h/a\nb",
            "ws://h/\u{1b}[31m",
            "ws://h/../a",
            "ws://h/a?b",
            "ws://h/a#b",
            "ws://h/a%2f",
            "ws://h/\u{e9}",
            &long,
        ] {
            assert_eq!(DevtoolsPath::read(&version(url)), None, "{url:?}");
        }
        for answer in [&b""[..], b"{}", b"[]", b"{\"webSocketDebuggerUrl\":1}", b"\xff"] {
            assert_eq!(DevtoolsPath::read(answer), None, "{answer:?}");
        }
    }

    /// What comes of an answer that is sent, and then goes on with `more` without end.
    async fn of_answer(answer: Vec<u8>, more: &'static [u8]) -> Result<DevtoolsPath, DevtoolsError> {
        let (here, mut there) = tokio::io::duplex(4096);
        let server = tokio::spawn(async move {
            let _ = there.read(&mut [0; 1024]).await;
            let _ = there.write_all(&answer).await;
            while !more.is_empty() && there.write_all(more).await.is_ok() {}
            // It keeps the connection, as a browser may.
            let _ = there.read_to_end(&mut Vec::new()).await;
        });
        let result = ask(here, NonZeroU16::new(9222).unwrap()).await;
        server.abort();
        result
    }

    #[tokio::test]
    async fn f5_an_answer_about_devtools_is_bounded_whatever_the_guest_sends() {
        let good = version("ws://127.0.0.1:9222/devtools/browser/a");
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", good.len());
        let whole = [head.as_bytes(), &good].concat();
        assert_eq!(of_answer(whole.clone(), b"").await.unwrap().as_str(), "/devtools/browser/a");
        for (answer, more) in [
            (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(), &b""[..]),
            (b"SSH-2.0-x\r\n".to_vec(), b""),
            (b"HTTP/1.1 200 OK\r\n".to_vec(), b"X: y\r\n"),
            (b"HTTP/1.1 200 OK\r\nX: ".to_vec(), b"yyyyyyyy"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(), b"4\r\n    \r\n"),
            (b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), b"    "),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".to_vec(), b"    "),
        ] {
            let shown = String::from_utf8_lossy(&answer).into_owned();
            let refused = timeout(Duration::from_secs(20), of_answer(answer, more)).await;
            assert!(matches!(refused, Ok(Err(DevtoolsError::Other(_)))), "{shown:?}: {refused:?}");
        }
    }
}
