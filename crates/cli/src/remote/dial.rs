//! Connections to a daemon.

use std::{
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

use super::address::Address;
use crate::error::Failure;

/// Time for a connection and its TLS handshake.
const LIMIT: Duration = Duration::from_secs(15);
/// Where Debian keeps the roots that the machine trusts.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A connection, of whatever kind.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection that goes on listening when the other side takes no more. A daemon that refuses an upload answers and closes at once: who
/// takes the failed write for the end of it all never hears why.
#[derive(Debug)]
pub struct Listening<S> {
    stream: S,
    refused: bool,
}

impl<S> Listening<S> {
    fn new(stream: S) -> Self {
        Self { stream, refused: false }
    }

    fn refuses(&mut self, error: &io::Error) -> bool {
        self.refused |= matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        self.refused
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Listening<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Listening<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.refused {
            return Poll::Pending;
        }
        match Pin::new(&mut self.stream).poll_write(cx, bytes) {
            // Whoever writes waits for the answer as well, which comes, or the end does.
            Poll::Ready(Err(error)) if self.refuses(&error) => Poll::Pending,
            polled => polled,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.refused {
            return Poll::Ready(Ok(()));
        }
        match Pin::new(&mut self.stream).poll_flush(cx) {
            Poll::Ready(Err(error)) if self.refuses(&error) => Poll::Ready(Ok(())),
            polled => polled,
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Opens connections to one daemon.
pub struct Dialer {
    address: Address,
    tls: Option<TlsConnector>,
}

impl Dialer {
    /// `ca`: roots to trust instead of the machine's.
    pub fn new(address: Address, ca: Option<&Path>) -> Result<Self, Failure> {
        let tls = match (&address, ca) {
            (Address::Tls { .. }, ca) => Some(connector(ca)?),
            (_, None) => None,
            (_, Some(_)) => return Err(Failure::usage("--ca is for https:// only: nothing else has a certificate")),
        };
        Ok(Self { address, tls })
    }

    /// Connects.
    pub async fn dial(&self) -> Result<Listening<Box<dyn Stream>>, Failure> {
        let connecting = timeout(LIMIT, self.connect());
        let stream = connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        stream.map(Listening::new).map_err(|error| self.failure(&error))
    }

    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match &self.address {
            Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
            Address::Loopback(address) => Box::new(tcp(TcpStream::connect(address).await?)?),
            Address::Tls { name, port } => {
                let stream = tcp(TcpStream::connect((name.as_str(), *port)).await?)?;
                let server = ServerName::try_from(name.clone()).map_err(io::Error::other)?;
                let connector = self.tls.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                Box::new(connector.connect(server, stream).await?)
            }
        })
    }

    fn failure(&self, error: &io::Error) -> Failure {
        let refused = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if let Some(rustls::Error::InvalidCertificate(_)) = refused {
            return Failure::new("host_untrusted", format!("the certificate of {} is not trusted", self.address))
                .with_causes([error.to_string()])
                .with_next("give the root certificate that it comes from: --ca FILE, or OFFSHOOT_CA");
        }
        let next = match &self.address {
            Address::Unix(path) => format!("offshoot serve --socket {}", path.display()),
            Address::Loopback(address) => format!("offshoot serve --listen {address}"),
            Address::Tls { port, .. } => {
                format!("on that machine: offshoot serve --listen 0.0.0.0:{port} --tls-cert FILE --tls-key FILE")
            }
        };
        Failure::new("host_unreachable", format!("no daemon can be reached at {}", self.address))
            .with_causes([error.to_string()])
            .with_next(next)
    }

    /// What requests say that they are for.
    pub fn authority(&self) -> String {
        match &self.address {
            Address::Unix(_) => "offshoot".into(),
            address => address.to_string().rsplit('/').next().unwrap_or_default().to_owned(),
        }
    }
}

fn tcp(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn connector(ca: Option<&Path>) -> Result<TlsConnector, Failure> {
    let file = ca.map_or_else(|| PathBuf::from(SYSTEM_ROOTS), Path::to_owned);
    let unusable = |reason: String| {
        Failure::new("ca_unusable", format!("{} holds no root certificates that can be used", file.display()))
            .with_causes([reason])
            .with_next("give them as PEM: --ca FILE, or OFFSHOOT_CA")
    };
    let pem = fs::read(&file).map_err(|error| unusable(error.to_string()))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
    let mut roots = RootCertStore::empty();
    // The machine's roots have some that nobody can read any more; one that was given must be read.
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(unusable("there is none in it".into()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(error.to_string()))?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn what_was_answered_before_the_other_side_closed_is_heard() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(b"refused").await.unwrap();
            drop(theirs);
            let (mut reading, mut writing) = tokio::io::split(Listening::new(ours));
            let mut heard = String::new();
            tokio::select! {
                written = writing.write_all(b"an upload") => panic!("{written:?}"),
                read = reading.read_to_string(&mut heard) => assert_eq!(read.unwrap(), 7),
            }
            assert_eq!(heard, "refused");
        });
    }
}
