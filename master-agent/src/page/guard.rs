//! Checks that a request comes from the page itself, since browsers also send requests on behalf of other pages.

use std::net::{IpAddr, SocketAddr};

use hyper::{HeaderMap, Request, header};

/// Returns the `Host` of a request, if it is a loopback address or `localhost` with this listener's port. Anything else
/// is a name that a browser was made to resolve to this host (DNS rebinding).
pub(super) fn local_host<B>(request: &Request<B>, listen: SocketAddr) -> Option<&str> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next()?.to_str().ok().filter(|_| hosts.next().is_none())?;
    let asked = request.uri().authority().map_or(host, |authority| authority.as_str());
    (asked == host && is_local(host, listen.port())).then_some(host)
}

fn is_local(host: &str, port: u16) -> bool {
    // A browser leaves out the default port of the scheme.
    let (name, asked) = match host.rsplit_once(':') {
        Some((name, asked)) if !asked.ends_with(']') => (name, asked.parse().ok()),
        _ => (host, Some(80)),
    };
    let address = match name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse().ok().map(IpAddr::V6),
        None => name.parse().ok().map(IpAddr::V4),
    };
    let loopback = address.map_or_else(
        || name.eq_ignore_ascii_case("localhost"),
        |address: IpAddr| address.to_canonical().is_loopback(),
    );
    loopback && asked == Some(port)
}

/// Checks by the origin and the site that the browser states that the page itself sends a request to `host`.
pub(super) fn own_page<B>(request: &Request<B>, host: &str) -> Result<(), &'static str> {
    match stated(request.headers()) {
        (Some(origin), _) if !is_origin(origin, "http", host) => Err(OTHER),
        (_, Some(site)) if site != SAME => Err(OTHER),
        (None, None) => Err(UNSAID),
        (Some(_), _) | (_, Some(_)) => Ok(()),
    }
}

/// Checks the same if there may be a proxy in front of this host, whose origin is then the page's. The site alone
/// decides, if the browser states it.
pub(super) fn own_page_through_proxies<B>(request: &Request<B>) -> Result<(), &'static str> {
    let authority = request.uri().authority().map(|authority| authority.as_str());
    let host = authority.or_else(|| request.headers().get(header::HOST)?.to_str().ok()).unwrap_or_default();
    match stated(request.headers()) {
        (_, Some(site)) if site == SAME => Ok(()),
        (_, Some(_)) => Err(OTHER),
        (Some(origin), None) if is_origin(origin, "https", host) => Ok(()),
        (Some(_), None) => Err(OTHER),
        (None, None) => Err(UNSAID),
    }
}

const SAME: &[u8] = b"same-origin";
const OTHER: &str = "a page of another origin asks, and is refused";
const UNSAID: &str = "only the page itself may ask: neither Origin nor Sec-Fetch-Site says that it does";

fn is_origin(origin: &[u8], scheme: &str, host: &str) -> bool {
    origin.eq_ignore_ascii_case(format!("{scheme}://{host}").as_bytes())
}

/// Returns `Origin` and `Sec-Fetch-Site`. A header that is present twice counts as that of another page.
fn stated(headers: &HeaderMap) -> (Option<&[u8]>, Option<&[u8]>) {
    let one = |name: &str| {
        let mut values = headers.get_all(name).iter();
        let first = values.next()?.as_bytes();
        Some(if values.next().is_some() { b"null" } else { first })
    };
    (one("origin"), one("sec-fetch-site"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let request = headers.iter().fold(Request::builder(), |r, (name, value)| r.header(*name, *value));
        request.uri(uri).body(()).unwrap()
    }

    #[test]
    fn only_this_host_and_port_are_local() {
        for (host, port, local) in [
            ("127.0.0.1:9070", 9070, true),
            ("127.0.0.2:9070", 9070, true),
            ("localhost:9070", 9070, true),
            ("LocalHost:9070", 9070, true),
            ("[::1]:9070", 9070, true),
            ("[::ffff:127.0.0.1]:9070", 9070, true),
            ("127.0.0.1", 80, true),
            ("[::1]", 80, true),
            ("127.0.0.1", 9070, false),
            ("127.0.0.1:9071", 9070, false),
            ("127.0.0.1:", 9070, false),
            ("127.0.0.1:9070x", 9070, false),
            ("localhost.:9070", 9070, false),
            ("a.localhost:9070", 9070, false),
            ("rebound.example:9070", 9070, false),
            ("127.0.0.1.rebound.example:9070", 9070, false),
            ("10.0.0.1:9070", 9070, false),
            ("0.0.0.0:9070", 9070, false),
            ("[::]:9070", 9070, false),
            ("[127.0.0.1]:9070", 9070, false),
            ("::1:9070", 9070, false),
            ("", 9070, false),
        ] {
            assert_eq!(is_local(host, port), local, "{host}");
        }
        let listen = "127.0.0.1:9070".parse().unwrap();
        let good = ("host", "localhost:9070");
        assert_eq!(local_host(&request("/page/", &[good]), listen), Some("localhost:9070"));
        assert_eq!(local_host(&request("/page/", &[]), listen), None);
        assert_eq!(local_host(&request("/page/", &[good, good]), listen), None);
        assert_eq!(local_host(&request("http://evil.example/page/", &[good]), listen), None);
    }

    #[test]
    fn only_the_page_itself_is_of_its_own_origin() {
        let host = ("host", "localhost:9070");
        for (headers, own, proxied) in [
            (&[][..], false, false),
            (&[("origin", "http://localhost:9070")][..], true, false),
            (&[("origin", "https://localhost:9070")], false, true),
            (&[("origin", "http://localhost:9071")], false, false),
            (&[("origin", "http://page.example")], false, false),
            (&[("origin", "null")], false, false),
            (&[("origin", "http://localhost:9070"), ("origin", "http://localhost:9070")], false, false),
            (&[("sec-fetch-site", "same-origin")], true, true),
            (&[("sec-fetch-site", "same-site")], false, false),
            (&[("sec-fetch-site", "cross-site")], false, false),
            (&[("sec-fetch-site", "none")], false, false),
            (&[("sec-fetch-site", "same-origin"), ("sec-fetch-site", "same-origin")], false, false),
            (&[("origin", "http://localhost:9070"), ("sec-fetch-site", "same-site")], false, false),
            (&[("origin", "http://page.example"), ("sec-fetch-site", "same-origin")], false, true),
        ] {
            let request = request("/page/explain", &[&[host], headers].concat());
            assert_eq!(own_page(&request, host.1).is_ok(), own, "{headers:?}");
            assert_eq!(own_page_through_proxies(&request).is_ok(), proxied, "{headers:?}");
        }
    }
}
