//! Whether a service that listens answers: on a port, or over HTTP.
//!
//! Nothing tells a process that another one has begun to listen, so it is asked, less and less often, until it answers or has ended.

use std::{
    fmt::Display,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request,
    body::Bytes,
    client::conn::http1,
    header::{CONNECTION, HOST},
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// Time for one attempt: a service that has just begun may take its time for its first answer.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Most bytes of an answer that are looked at.
const MAX_ANSWER: usize = 256 << 10;
/// The first pause between attempts; each further one is half as long again, up to [`LONGEST`].
pub(super) const FIRST: Duration = Duration::from_millis(20);
/// The longest pause.
pub(super) const LONGEST: Duration = Duration::from_millis(500);

/// What a service must answer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Readiness {
    /// On the guest's loopback.
    pub(crate) port: u16,
    /// What must come back over HTTP; without it a connection that is taken will do.
    pub(crate) http: Option<Http>,
}

/// A question over HTTP: it must be answered with a status of 200 to 299.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Http {
    /// Begins with a slash; no blanks, no control characters.
    pub(crate) path: String,
    /// What the answer must contain.
    pub(crate) text: String,
}

impl Readiness {
    /// Asks once. What is wrong is for people.
    pub(crate) fn ask(&self) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("port {} could not be asked: {error}", self.port))?;
        let asked = runtime.block_on(async { timeout(ATTEMPT, self.answer()).await });
        asked.unwrap_or_else(|_| Err("was not answered in time".into())).map_err(|wrong| match &self.http {
            Some(http) => format!("GET {} at port {} {wrong}", http.path, self.port),
            None => format!("port {} {wrong}", self.port),
        })
    }

    async fn answer(&self) -> Result<(), String> {
        let failed = |error: &dyn Display| format!("was not answered: {error}");
        let stream = match TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await {
            Ok(stream) => stream,
            Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, self.port)).await.map_err(|_| failed(&error))?,
        };
        let Some(http) = &self.http else { return Ok(()) };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
        let request = Request::get(&http.path)
            .header(HOST, format!("127.0.0.1:{}", self.port))
            .header(CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed(&error))?;
        let asking = async {
            let answer = sender.send_request(request).await.map_err(|error| failed(&error))?;
            if !answer.status().is_success() {
                return Err(format!("was answered with status {}", answer.status().as_u16()));
            }
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(|error| failed(&error))?;
            let body = body.to_bytes();
            let text = http.text.as_bytes();
            match text.is_empty() || body.windows(text.len()).any(|window| window == text) {
                true => Ok(()),
                false => Err(format!("was answered without {:?}", http.text)),
            }
        };
        tokio::select! {
            answered = asking => answered,
            // It ends before the answer only if it fails.
            Err(error) = connection => Err(failed(&error)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
        thread,
    };

    use super::*;

    fn answering(answer: &'static [u8], then_close: bool) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(answer);
            if !then_close {
                thread::sleep(Duration::from_secs(60));
            }
        });
        port
    }

    #[test]
    fn an_answer_counts_with_its_status_and_its_text() {
        for (answer, close, text, ready) in [
            (&b"HTTP/1.1 200 OK\r\n\r\n[\"warm\"]"[..], true, "\"warm\"", true),
            (b"HTTP/1.1 204 No Content\r\n\r\n", true, "", true),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwarm", false, "warm", true),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ncold", false, "warm", false),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ncold\r\n0\r\n\r\n", false, "warm", false),
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nwa\r\n2\r\nrm\r\n0\r\n\r\n",
                false,
                "warm",
                true,
            ),
            (b"HTTP/1.1 503 Busy\r\n\r\nwarm", true, "warm", false),
            (b"HTTP/1.1 200 OK\r\n", true, "", false),
            (b"SSH-2.0-x\r\n\r\nwarm", true, "warm", false),
            (b"", true, "", false),
        ] {
            let http = Http { path: "/".into(), text: text.into() };
            let readiness = Readiness { port: answering(answer, close), http: Some(http) };
            assert_eq!(readiness.ask().is_ok(), ready, "{:?}", String::from_utf8_lossy(answer));
        }
    }

    #[test]
    fn a_port_that_takes_connections_is_ready_and_one_that_does_not_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let readiness = Readiness { port: listener.local_addr().unwrap().port(), http: None };
        readiness.ask().unwrap();
        drop(listener);
        assert!(readiness.ask().unwrap_err().contains("port"));
    }
}
