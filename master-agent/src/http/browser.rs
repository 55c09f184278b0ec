//! Keeps web pages of other origins from using a server through the browser of somebody who can reach it. Requests that
//! such a page makes are rejected, and on loopback also requests for another host (DNS rebinding).

use std::net::IpAddr;

use hyper::{
    HeaderMap, Uri,
    header::{self, HeaderValue},
};

/// Rejects requests for another host, whose name a browser was made to resolve to this one (DNS rebinding).
pub fn refuse_other_hosts(uri: &Uri, headers: &HeaderMap) -> Result<(), String> {
    let mut hosts = headers.get_all(header::HOST).iter().map(|h| h.to_str().unwrap_or("?"));
    let host = hosts.next().unwrap_or_default();
    if hosts.next().is_some() {
        return Err("more than one Host".to_owned());
    }
    for host in uri.authority().map(|a| a.as_str()).into_iter().chain([host]) {
        if !is_loopback(host) {
            return Err(format!(
                "Host {host:?} is not this host: only localhost and loopback addresses are served here"
            ));
        }
    }
    Ok(())
}

/// Rejects requests that a browser sends on behalf of a page from another origin than this server's. `proto` is the
/// scheme of this server, `http` or `https`.
pub fn refuse_other_origins(proto: &str, uri: &Uri, headers: &HeaderMap) -> Result<(), String> {
    let host = asked_host(uri, headers);
    for origin in headers.get_all(header::ORIGIN) {
        let same = origin.to_str().is_ok_and(|o| o.eq_ignore_ascii_case(&format!("{proto}://{host}")));
        if !same || host.is_empty() {
            return Err(format!("requests from pages of another origin ({origin:?}) are refused"));
        }
    }
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    match site {
        None | Some(b"same-origin" | b"none") => Ok(()),
        Some(_) => Err("requests that a page of another site makes are refused".to_owned()),
    }
}

/// Returns the host that the caller asks for, which is empty if it names none.
pub fn asked_host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> &'a str {
    let header = || headers.get(header::HOST).and_then(|host| host.to_str().ok());
    uri.authority().map(|authority| authority.as_str()).or_else(header).unwrap_or_default()
}

/// Whether a `Host` header names this host, as seen from this host.
fn is_loopback(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, port)) => (name, port),
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    if !port.is_empty() && !port.strip_prefix(':').is_some_and(|p| p.bytes().all(|b| b.is_ascii_digit())) {
        return false;
    }
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    match name.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => name.is_empty() || name == "localhost" || name.ends_with(".localhost"),
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderName;

    use super::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        headers
    }

    #[test]
    fn only_pages_of_this_host_are_served() {
        let check = |lines: &[(&str, &str)], uri: &str| {
            let (uri, headers) = (uri.parse().unwrap(), map(lines));
            refuse_other_hosts(&uri, &headers)
                .and_then(|()| refuse_other_origins("http", &uri, &headers))
                .is_ok()
        };
        for host in [
            "localhost",
            "LOCALHOST:8130",
            "a.localhost:1",
            "localhost.:80",
            "127.0.0.1",
            "127.8.9.1:1",
            "[::1]:8130",
            "[::1]",
            "[::ffff:127.0.0.1]:1",
            "",
        ] {
            assert!(check(&[("Host", host)], "/"), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8130",
            "localhost.evil.example",
            "notlocalhost",
            "10.0.0.1",
            "[fd00::1]:1",
            "0.0.0.0:8130",
            "[::]:1",
            "127.0.0.1.evil.example",
            "localhost:80@evil.example",
        ] {
            assert!(!check(&[("Host", host)], "/"), "{host}");
        }
        assert!(check(&[], "/"));
        assert!(!check(&[("Host", "localhost"), ("Host", "evil.example")], "/"));
        assert!(!check(&[("Host", "localhost")], "http://evil.example/"));
        let with = |name, value| check(&[("Host", "localhost:8130"), (name, value)], "/");
        assert!(with("Origin", "http://localhost:8130") && with("Origin", "HTTP://LOCALHOST:8130"));
        for origin in [
            "null",
            "http://evil.example",
            "http://localhost",
            "https://localhost:8130",
            "http://localhost:81300",
        ] {
            assert!(!with("Origin", origin), "{origin}");
        }
        assert!(!check(&[("Origin", "http://")], "/"));
        assert!(with("Sec-Fetch-Site", "none") && with("Sec-Fetch-Site", "same-origin"));
        assert!(!with("Sec-Fetch-Site", "cross-site") && !with("Sec-Fetch-Site", "same-site"));
    }
}
