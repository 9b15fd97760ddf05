//! Where a daemon is.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use thiserror::Error;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::error::Coded;

/// Where a daemon is, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket: the kernel says who asks.
    Unix(PathBuf),
    /// Plain TCP, on loopback only: nobody else hears the token.
    Loopback(SocketAddr),
    /// TCP with TLS.
    Tls {
        /// The name that its certificate must have.
        name: String,
        /// The port.
        port: u16,
    },
}

/// Why an address was refused. It is not repeated: somebody may have put a password into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AddressError {
    /// None of the three forms.
    #[error("--host is unix:///PATH, https://NAME:PORT, or on loopback http://127.0.0.1:PORT")]
    Form,
    /// A relative path.
    #[error("--host: the path of a unix socket is absolute: unix:///run/offshoot/api/offshoot.sock")]
    Relative,
    /// No port, or none that there is.
    #[error("--host: give the port, a number from 1 to 65535: https://NAME:PORT")]
    Port,
    /// More than name and port.
    #[error("--host ends after the port; a token comes from the variable OFFSHOOT_TOKEN")]
    TooMuch,
    /// Not a name.
    #[error("--host: what stands before the port is neither a host name nor an IP address")]
    Name,
    /// Plain HTTP to somewhere else.
    #[error("--host: http:// is for 127.0.0.1 only, because everybody on the way would read the token; use https://")]
    NotLoopback,
}

impl Coded for AddressError {
    fn code(&self) -> &'static str {
        "host_invalid"
    }

    fn is_usage(&self) -> bool {
        true
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = text.split_once("://").ok_or(AddressError::Form)?;
        match scheme {
            "unix" if rest.starts_with('/') && rest.len() > 1 && !rest.contains('\0') => Ok(Self::Unix(rest.into())),
            "unix" => Err(AddressError::Relative),
            "https" => {
                let (name, port) = name_and_port(rest)?;
                ServerName::try_from(name).map_err(|_| AddressError::Name)?;
                Ok(Self::Tls { name: name.to_owned(), port })
            }
            "http" => {
                let (name, port) = name_and_port(rest)?;
                let address = match name {
                    "localhost" => IpAddr::from(Ipv4Addr::LOCALHOST),
                    _ => name.parse().map_err(|_| AddressError::NotLoopback)?,
                };
                let loopback = address.is_loopback();
                loopback.then(|| Self::Loopback((address, port).into())).ok_or(AddressError::NotLoopback)
            }
            _ => Err(AddressError::Form),
        }
    }
}

/// `NAME:PORT` or `[IPv6]:PORT`, with a slash behind it at most.
fn name_and_port(text: &str) -> Result<(&str, u16), AddressError> {
    let text = text.strip_suffix('/').unwrap_or(text);
    if text.contains(['/', '?', '#', '@']) {
        return Err(AddressError::TooMuch);
    }
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:").ok_or(AddressError::Port)?,
        None => text.rsplit_once(':').ok_or(AddressError::Port)?,
    };
    // Of an IPv6 address without brackets nobody knows where it ends.
    let bracketed = text.starts_with('[');
    if bracketed != name.parse::<Ipv6Addr>().is_ok() || (!bracketed && name.contains(':')) {
        return Err(AddressError::Name);
    }
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0).ok_or(AddressError::Port)?;
    Ok((name, port))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Loopback(address) => write!(f, "http://{address}"),
            Self::Tls { name, port } if name.contains(':') => write!(f, "https://[{name}]:{port}"),
            Self::Tls { name, port } => write!(f, "https://{name}:{port}"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_are_parsed_and_printed_as_the_same() {
        let tls = |name: &str| Address::Tls { name: name.into(), port: 7443 };
        for (text, address) in [
            ("unix:///run/a.sock", Address::Unix("/run/a.sock".into())),
            ("unix:///a b/ü", Address::Unix("/a b/ü".into())),
            ("https://sandbox.example:7443", tls("sandbox.example")),
            ("https://192.0.2.7:7443", tls("192.0.2.7")),
            ("https://[2001:db8::7]:7443", tls("2001:db8::7")),
            ("http://127.0.0.1:80", Address::Loopback(([127, 0, 0, 1], 80).into())),
            ("http://[::1]:80", Address::Loopback((Ipv6Addr::LOCALHOST, 80).into())),
        ] {
            assert_eq!(text.parse(), Ok(address.clone()), "{text}");
            assert_eq!(address.to_string(), text);
        }
        assert_eq!("https://sandbox.example:7443/".parse(), Ok(tls("sandbox.example")));
        assert_eq!("http://localhost:80".parse(), Ok(Address::Loopback(([127, 0, 0, 1], 80).into())));
    }

    #[test]
    fn what_is_none_of_them_is_refused_by_type_and_not_repeated() {
        use AddressError::{Form, Name, NotLoopback, Port, Relative, TooMuch};
        for (text, wanted) in [
            ("", Form),
            ("sandbox.example:7443", Form),
            ("/run/a.sock", Form),
            ("ssh://sandbox.example:22", Form),
            ("tcp://127.0.0.1:80", Form),
            ("HTTPS://sandbox.example:7443", Form),
            ("unix://a.sock", Relative),
            ("unix://", Relative),
            ("unix:///", Relative),
            ("https://sandbox.example", Port),
            ("https://sandbox.example:", Port),
            ("https://sandbox.example:0", Port),
            ("https://sandbox.example:+1", Port),
            ("https://sandbox.example:65536", Port),
            ("https://[::1]", Port),
            ("https://::1:7443", Name),
            ("https://:7443", Name),
            ("https://2001:db8::7", Name),
            ("https://[sandbox.example]:7443", Name),
            ("http://::1:80", Name),
            ("https://a b:7443", Name),
            ("https://sandbox.example:7443/v1", TooMuch),
            ("https://sandbox.example:7443?x", TooMuch),
            ("https://user:hunter2@sandbox.example:7443", TooMuch),
            ("http://sandbox.example:80", NotLoopback),
            ("http://192.0.2.7:80", NotLoopback),
            ("http://0.0.0.0:80", NotLoopback),
            ("http://127.0.0.1.example:80", NotLoopback),
            ("http://localhost.example:80", NotLoopback),
        ] {
            let refused = text.parse::<Address>().unwrap_err();
            assert_eq!(refused, wanted, "{text}");
            assert!(refused.is_usage() && !refused.to_string().contains("hunter2"));
        }
    }
}
