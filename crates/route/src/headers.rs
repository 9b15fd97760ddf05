//! Which headers go on: what is about one connection stays there (RFC 9110, section 7.6.1), and who asked is said by us alone.

use std::net::IpAddr;

use hyper::{
    HeaderMap,
    header::{
        CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
        TE, TRANSFER_ENCODING, UPGRADE,
    },
};

/// About one connection, whether it says so or not.
const OF_THE_CONNECTION: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];
const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

/// Whether these ask for a WebSocket, or agree to one.
pub(crate) fn is_websocket(headers: &HeaderMap) -> bool {
    tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"))
        && headers.get_all(UPGRADE).iter().count() == 1
        && headers.get(UPGRADE).is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes()))
}

/// Says that they do.
pub(crate) fn set_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, WEBSOCKET);
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Removes what is about one connection.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let trailers = tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    // Of two lengths that one counts (RFC 9112, section 6.3).
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION).filter_map(|token| token.parse().ok()).collect();
    for name in OF_THE_CONNECTION.into_iter().chain(named) {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Says who asked for what, and that nobody else does: a fork may believe these.
pub(crate) fn set_forwarded(headers: &mut HeaderMap, client: IpAddr, host: &HeaderValue) {
    let claims: Vec<HeaderName> = headers.keys().filter(|name| is_claim(name)).cloned().collect();
    for name in claims {
        headers.remove(name);
    }
    headers.insert(HOST, host.clone());
    if let Ok(client) = HeaderValue::from_str(&client.to_canonical().to_string()) {
        headers.insert("x-forwarded-for", client);
    }
    headers.insert("x-forwarded-host", host.clone());
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
}

/// Also with underscores, which some programs take for dashes.
fn is_claim(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    name == FORWARDED.as_str() || name == "x-real-ip" || name.starts_with("x-forwarded-")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn what_is_about_a_connection_stays_there() {
        let mut given = headers(&[
            ("connection", "close, X-Hop"),
            ("connection", "host"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "close"),
            ("proxy-authorization", "x"),
            ("te", "gzip;q=0.5, trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("trailer", "x-sum"),
            ("host", "w.localhost"),
            ("content-length", "3"),
            ("cookie", "a=b"),
        ]);
        strip(&mut given);
        set_forwarded(&mut given, IpAddr::from([127, 0, 0, 1]), &"w.localhost".parse().unwrap());
        let kept = [
            ("te", "trailers"),
            ("trailer", "x-sum"),
            ("cookie", "a=b"),
            ("host", "w.localhost"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-host", "w.localhost"),
            ("x-forwarded-proto", "http"),
        ];
        assert_eq!(given, headers(&kept));
    }

    #[test]
    fn n4_nobody_else_says_who_asked() {
        let mut given = headers(&[
            ("x-forwarded-for", "8.8.8.8"),
            ("x_forwarded_for", "8.8.8.8"),
            ("x-forwarded-port", "1"),
            ("forwarded", "for=8.8.8.8"),
            ("x-real-ip", "8.8.8.8"),
            ("x-forwardedness", "kept"),
        ]);
        set_forwarded(&mut given, "::ffff:10.0.0.1".parse().unwrap(), &"w.localhost".parse().unwrap());
        assert!(!given.values().any(|value| value.to_str().unwrap().contains("8.8.8.8")), "{given:?}");
        assert_eq!(
            (&given["x-forwarded-for"], &given["x-forwardedness"]),
            (&"10.0.0.1".parse().unwrap(), &"kept".parse().unwrap())
        );
        assert!(!given.contains_key("x-forwarded-port"));
    }

    #[test]
    fn only_websockets_are_an_upgrade() {
        assert!(is_websocket(&headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")])));
        for other in [
            &[("connection", "upgrade")][..],
            &[("upgrade", "websocket")],
            &[("connection", "upgrade"), ("upgrade", "h2c")],
            &[("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "h2c")],
            &[("connection", "keep-alive"), ("upgrade", "websocket")],
        ] {
            assert!(!is_websocket(&headers(other)), "{other:?}");
        }
    }
}
