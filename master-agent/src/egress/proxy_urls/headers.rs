//! The headers of forwarded requests and responses: which ones are passed on, removed or added.

use std::net::IpAddr;

use access::authn;
use hyper::{
    HeaderMap,
    header::{self, HeaderName, HeaderValue},
};

use crate::http::{
    claims::Claims,
    hop::{Hop, remove_all, remove_hop_by_hop, tokens},
};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_URI: HeaderName = HeaderName::from_static("x-forwarded-uri");
/// Headers in which proxies record where a request comes from.
static FORWARDING: [HeaderName; 7] = [
    X_FORWARDED_FOR,
    X_FORWARDED_HOST,
    X_FORWARDED_PROTO,
    X_FORWARDED_URI,
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-real-ip"),
    header::FORWARDED,
];

/// Where a request came from, as the headers for the target state it.
pub(super) struct Forwarded<'a> {
    /// `http` or `https`.
    pub proto: &'static str,
    pub peer: Option<IpAddr>,
    /// The whole path, without its query.
    pub path: &'a str,
    /// The target's own host and port.
    pub host: &'a str,
}

/// Turns the headers of a caller's request into those of the request to its target.
pub(super) fn request(headers: &mut HeaderMap, hop: &Hop, forwarded: &Forwarded<'_>, claims: &Claims) {
    remove_hop_by_hop(headers);
    // Earlier proxies may say where the request comes from, but only in the usual headers.
    remove_all(headers, |name| claims.contains(name) && !FORWARDING.contains(name));
    announce_trailers(headers, claims);
    // As with kube-apiserver, credentials are not for the target.
    authn::strip(headers);

    let asked = headers.remove(header::HOST);
    if let Ok(host) = HeaderValue::try_from(forwarded.host) {
        headers.insert(header::HOST, host);
    }
    let uri = HeaderValue::try_from(forwarded.path).ok();
    let proto = Some(HeaderValue::from_static(forwarded.proto));
    for (name, value) in [(X_FORWARDED_HOST, asked), (X_FORWARDED_PROTO, proto), (X_FORWARDED_URI, uri)] {
        match value {
            Some(value) => headers.insert(name, value),
            None => headers.remove(name),
        };
    }
    if let Some(peer) = forwarded.peer {
        let before = tokens(headers, &X_FORWARDED_FOR).map(str::to_owned);
        let all: Vec<String> = before.chain([peer.to_string()]).collect();
        if let Ok(value) = HeaderValue::try_from(all.join(", ")) {
            headers.insert(X_FORWARDED_FOR, value);
        }
    }

    // Each request has its own connection.
    let connection = match (&hop.upgrade, hop.trailers) {
        (Some(_), _) => "Upgrade",
        (None, true) => "close, TE",
        (None, false) => "close",
    };
    headers.insert(header::CONNECTION, HeaderValue::from_static(connection));
    if let Some(upgrade) = &hop.upgrade {
        headers.insert(header::UPGRADE, upgrade.clone());
    } else if hop.trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if hop.chunked {
        headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Turns the trailers of a caller's request into those of the request to its target.
pub(super) fn trailers(trailers: &mut HeaderMap, claims: &Claims) {
    remove_hop_by_hop(trailers);
    trailers.remove(header::AUTHORIZATION);
    claims.remove(trailers);
}

/// Removes the trailers that [`trailers`] removes from their announcement.
fn announce_trailers(headers: &mut HeaderMap, claims: &Claims) {
    let claimed = |token: &&str| HeaderName::try_from(*token).is_ok_and(|name| claims.contains(&name));
    if !tokens(headers, &header::TRAILER).any(|token| claimed(&token)) {
        return;
    }
    let kept: Vec<&str> = tokens(headers, &header::TRAILER).filter(|token| !claimed(token)).collect();
    let kept = HeaderValue::try_from(kept.join(", ")).ok().filter(|kept| !kept.is_empty());
    headers.remove(header::TRAILER);
    if let Some(kept) = kept {
        headers.insert(header::TRAILER, kept);
    }
}

/// Turns the headers of a target's response into those of the response to the caller. `prefix` is the path up to `/proxy`.
/// A redirect to one of `hosts` leads to the same target again.
pub(super) fn response(headers: &mut HeaderMap, upgraded: bool, prefix: &str, hosts: &[&str]) {
    let upgrade = headers.get(header::UPGRADE).filter(|_| upgraded).cloned();
    remove_hop_by_hop(headers);
    // To a browser all targets are one origin, so a page of one must not act as its visitor towards the others.
    headers.append(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("sandbox allow-scripts allow-forms"),
    );
    headers.remove("service-worker-allowed");
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, upgrade);
    }
    let location = headers.get(header::LOCATION).and_then(|l| l.to_str().ok());
    if let Some(inside) = location.and_then(|location| location_inside(location, prefix, hosts))
        && let Ok(value) = HeaderValue::try_from(inside)
    {
        headers.insert(header::LOCATION, value);
    }
}

/// Rewrites a redirect to the same target for callers of this listener; `None` for one that stays as it is.
fn location_inside(location: &str, prefix: &str, hosts: &[&str]) -> Option<String> {
    let after_scheme = location.strip_prefix("http://").or_else(|| location.strip_prefix("https://"));
    let path = match after_scheme.or_else(|| location.strip_prefix("//")) {
        Some(rest) => {
            let (host, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
            hosts.iter().any(|known| known.eq_ignore_ascii_case(host)).then_some(path)?
        }
        None => location.starts_with('/').then_some(location)?,
    };
    let inside = path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    Some(if inside {
        path.to_owned()
    } else {
        format!("{prefix}{}{path}", if path.starts_with('/') { "" } else { "/" })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        headers
    }

    fn sorted(headers: &HeaderMap) -> Vec<String> {
        let mut lines: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    const FORWARDED: Forwarded<'_> =
        Forwarded { proto: "http", peer: None, path: "/api/v1/nodes/n1/proxy/a%2f", host: "n1:10250" };

    #[test]
    fn a_request_loses_what_is_not_for_its_target() {
        let mut headers = map(&[
            ("Host", "localhost:8130"),
            ("Connection", "keep-alive, X-Secret"),
            ("Keep-Alive", "timeout=5"),
            ("X-Secret", "1"),
            ("Authorization", "Bearer t"),
            ("Proxy-Authorization", "Basic x"),
            ("Upgrade", "h2c"),
            ("TE", "gzip"),
            ("Cookie", "a=b"),
            ("Accept", "*/*"),
            ("X-Forwarded-For", "10.0.0.1, 10.0.0.2"),
            ("X-Forwarded-Proto", "https"),
            ("X-Remote-User", "admin"),
            ("x_remote_user", "admin"),
            ("x.remote.group", "system:masters"),
            ("Impersonate-User", "admin"),
            ("X-Forwarded-User", "admin"),
            ("X-Forwarded-Access-Token", "abc"),
            ("X-Auth-Request-Groups", "system:masters"),
            ("x_forwarded_for", "10.0.0.3"),
            ("Trailer", "X-Remote-User, X-Sum, x_forwarded_email"),
        ]);
        let hop = Hop::of(&headers);
        assert_eq!(hop, Hop::default());
        let forwarded = Forwarded { peer: Some("127.0.0.1".parse().unwrap()), ..FORWARDED };
        request(&mut headers, &hop, &forwarded, &Claims::default());
        assert_eq!(
            sorted(&headers),
            [
                "accept: */*",
                "connection: close",
                "cookie: a=b",
                "host: n1:10250",
                "trailer: X-Sum",
                "x-forwarded-for: 10.0.0.1, 10.0.0.2, 127.0.0.1",
                "x-forwarded-host: localhost:8130",
                "x-forwarded-proto: http",
                "x-forwarded-uri: /api/v1/nodes/n1/proxy/a%2f",
            ]
        );
    }

    #[test]
    fn upgrades_trailers_and_chunks_are_requested_anew() {
        let mut headers = map(&[
            ("Connection", "keep-alive"),
            ("connection", "upgrade"),
            ("Upgrade", "SPDY/3.1"),
            ("Sec-WebSocket-Protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.Zm9v"),
        ]);
        let hop = Hop::of(&headers);
        request(&mut headers, &hop, &FORWARDED, &Claims::default());
        assert_eq!(headers["connection"], "Upgrade");
        assert_eq!(headers["upgrade"], "SPDY/3.1");
        assert_eq!(headers["sec-websocket-protocol"], "v5.channel.k8s.io");
        assert!(!headers.contains_key("x-forwarded-for") && !headers.contains_key("x-forwarded-host"));

        let mut headers =
            map(&[("TE", "trailers, deflate"), ("Transfer-Encoding", "chunked"), ("Trailer", "X-Sum")]);
        let hop = Hop::of(&headers);
        request(&mut headers, &hop, &FORWARDED, &Claims::default());
        assert_eq!(
            (&headers["connection"], &headers["te"]),
            (&"close, TE".parse().unwrap(), &"trailers".parse().unwrap())
        );
        assert_eq!(
            (&headers["transfer-encoding"], &headers["trailer"]),
            (&"chunked".parse().unwrap(), &"X-Sum".parse().unwrap())
        );
    }

    #[test]
    fn trailers_carry_no_identity() {
        let mut headers = map(&[
            ("X-Remote-User", "admin"),
            ("x_remote_group", "system:masters"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("Impersonate-User", "admin"),
            ("Authorization", "Bearer t"),
            ("Connection", "X-Sum2"),
            ("X-Sum", "1"),
        ]);
        trailers(&mut headers, &Claims::default());
        assert_eq!(sorted(&headers), ["x-sum: 1"]);
    }

    #[test]
    fn a_response_loses_hop_by_hop_headers_and_is_sandboxed() {
        let lines = [
            ("Connection", "Upgrade, X-Hop"),
            ("Upgrade", "websocket"),
            ("X-Hop", "1"),
            ("Set-Cookie", "a=b"),
            ("Service-Worker-Allowed", "/"),
        ];
        let sandbox = "content-security-policy: sandbox allow-scripts allow-forms";
        let mut headers = map(&lines);
        response(&mut headers, false, "/p", &[]);
        assert_eq!(sorted(&headers), [sandbox, "set-cookie: a=b"]);
        let mut headers = map(&lines);
        response(&mut headers, true, "/p", &[]);
        assert_eq!(
            sorted(&headers),
            ["connection: Upgrade", sandbox, "set-cookie: a=b", "upgrade: websocket"]
        );
    }

    #[test]
    fn redirects_stay_with_their_target() {
        let prefix = "/api/v1/nodes/n1/proxy";
        for (location, expected) in [
            ("/login?a=b#c", Some("/api/v1/nodes/n1/proxy/login?a=b#c")),
            ("/", Some("/api/v1/nodes/n1/proxy/")),
            ("https://N1:10250/x/", Some("/api/v1/nodes/n1/proxy/x/")),
            ("http://n1:10250", Some("/api/v1/nodes/n1/proxy/")),
            ("http://n1:10250?a", Some("/api/v1/nodes/n1/proxy/?a")),
            ("//localhost/x", Some("/api/v1/nodes/n1/proxy/x")),
            ("/api/v1/nodes/n1/proxy/x", Some("/api/v1/nodes/n1/proxy/x")),
            ("/api/v1/nodes/n1/proxyx", Some("/api/v1/nodes/n1/proxy/api/v1/nodes/n1/proxyx")),
            ("relative/x", None),
            ("?a=b", None),
            ("https://elsewhere/x", None),
            ("//elsewhere/x", None),
            ("mailto:a@b", None),
        ] {
            assert_eq!(
                location_inside(location, prefix, &["n1:10250", "localhost"]).as_deref(),
                expected,
                "{location}"
            );
        }
    }
}
