//! Heads on their way through: what a caller may not say, and what the API server is told about it.

use std::net::IpAddr;

use hyper::{
    HeaderMap, StatusCode, Version,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::{authn, user::User};
use crate::http::{
    hop::{Hop, refuse_other_encodings, remove_all, remove_hop_by_hop},
    status::Failure,
};

const REMOTE_USER: HeaderName = HeaderName::from_static("x-remote-user");
const REMOTE_UID: HeaderName = HeaderName::from_static("x-remote-uid");
const REMOTE_GROUP: HeaderName = HeaderName::from_static("x-remote-group");
const REMOTE: &str = "x-remote-";
const IMPERSONATE: &str = "impersonate-";
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Others that tell of whoever came before, which nobody did.
const FORWARDED: [&str; 6] = [
    "forwarded",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-uri",
    "x-forwarded-port",
    "x-real-ip",
];

/// What an extra's key may not be written with in a header's name (RFC 9110 §5.6.2), and `%` itself.
const NOT_IN_KEYS: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'(')
    .add(b')')
    .add(b',')
    .add(b'/')
    .add(b':')
    .add(b';')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'@')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'{')
    .add(b'}')
    .add(b'%');

/// The protocols that kube-apiserver changes to. No other is asked of it.
pub fn known_upgrade(hop: &Hop) -> Option<&HeaderValue> {
    let known = |value: &&HeaderValue| {
        let value = value.as_bytes();
        value.eq_ignore_ascii_case(b"websocket") || value.eq_ignore_ascii_case(b"SPDY/3.1")
    };
    hop.upgrade.as_ref().filter(known)
}

/// Refuses heads that two servers could read in two ways.
pub fn refuse_ambiguous(parts: &Parts) -> Result<(), Failure> {
    let bad = |message: &str| Err(Failure::new(StatusCode::BAD_REQUEST, message));
    match parts.headers.get_all(header::HOST).iter().count() {
        0 if parts.version == Version::HTTP_11 => return bad("there is no Host"),
        0 | 1 => {}
        _ => return bad("more than one Host"),
    }
    if parts.version < Version::HTTP_11 {
        return bad("HTTP/1.0 is not served here");
    }
    if refuse_other_encodings(&parts.headers).is_err() {
        return bad("no Transfer-Encoding but chunked is served here");
    }
    if parts.headers.contains_key(header::TRANSFER_ENCODING)
        && parts.headers.contains_key(header::CONTENT_LENGTH)
    {
        return bad("Content-Length and Transfer-Encoding exclude each other");
    }
    if parts.headers.get_all(header::CONTENT_LENGTH).iter().count() > 1 {
        return bad("more than one Content-Length");
    }
    if let (Some(authority), Some(host)) = (parts.uri.authority(), parts.headers.get(header::HOST))
        && !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
    {
        return bad("Host is another than that of the request's target");
    }
    if !parts.uri.path().starts_with('/') {
        return bad("the request's target is no path");
    }
    Ok(())
}

/// Makes the head of a caller's request that of the request to an API server, on behalf of `user`.
pub fn request(headers: &mut HeaderMap, hop: &Hop, user: &User, peer: IpAddr) -> Result<(), Failure> {
    remove_hop_by_hop(headers);
    authn::strip(headers);
    remove_claims(headers);
    for name in [header::EXPECT, header::TRAILER, header::HOST] {
        headers.remove(name);
    }
    join_cookies(headers);
    headers.insert(FORWARDED_FOR, text(&peer.to_canonical().to_string())?);
    headers.insert(REMOTE_USER, text(&user.name)?);
    if let Some(uid) = &user.uid {
        headers.insert(REMOTE_UID, text(uid)?);
    }
    for group in &user.groups {
        headers.append(REMOTE_GROUP, text(group)?);
    }
    for (key, values) in &user.extra {
        let name = format!("{REMOTE}extra-{}", utf8_percent_encode(key, NOT_IN_KEYS));
        let name = HeaderName::try_from(name).map_err(|_| unsayable())?;
        for value in values {
            headers.append(name.clone(), text(value)?);
        }
    }
    if let Some(upgrade) = &hop.upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, upgrade.clone());
    }
    Ok(())
}

/// Removes what a caller says of who it is and where it comes from.
pub fn remove_claims(headers: &mut HeaderMap) {
    remove_all(headers, is_not_the_callers);
}

/// Makes the head of an API server's response that of the response to the caller.
pub fn response(headers: &mut HeaderMap, upgraded: bool) {
    let upgrade = headers.get(header::UPGRADE).filter(|_| upgraded).cloned();
    remove_hop_by_hop(headers);
    headers.remove(header::TRAILER);
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, upgrade);
    }
}

/// Names that only an authenticating proxy may use, however they are spelled: some servers take `_` for `-`.
fn is_not_the_callers(name: &HeaderName) -> bool {
    let name = name.as_str();
    let begins_with = |prefix: &str| {
        let mut bytes = name.bytes().map(|byte| if byte == b'_' { b'-' } else { byte });
        prefix.bytes().all(|byte| bytes.next() == Some(byte))
    };
    let is = |other: &str| name.len() == other.len() && begins_with(other);
    begins_with(REMOTE)
        || begins_with(IMPERSONATE)
        || is(FORWARDED_FOR.as_str())
        || FORWARDED.iter().any(|other| is(other))
}

/// HTTP/2 may send cookies one by one (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

/// A name as a header's value. Servers cut spaces off values: `admin ` must not become `admin`.
fn text(text: &str) -> Result<HeaderValue, Failure> {
    if text.is_empty() || text.trim() != text {
        return Err(unsayable());
    }
    HeaderValue::from_bytes(text.as_bytes()).map_err(|_| unsayable())
}

fn unsayable() -> Failure {
    Failure::new(
        StatusCode::FORBIDDEN,
        "your user name, a group or an extra of yours can't be passed on in a header",
    )
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        headers
    }

    fn shown(headers: &HeaderMap) -> Vec<String> {
        let mut lines: Vec<String> =
            headers.iter().map(|(n, v)| format!("{n}: {}", String::from_utf8_lossy(v.as_bytes()))).collect();
        lines.sort();
        lines
    }

    fn user() -> User {
        User {
            name: "jane".to_owned(),
            uid: Some("7".to_owned()),
            groups: vec!["a".to_owned(), "b,c".to_owned()],
            extra: [("example.org/k%y".to_owned(), vec!["1".to_owned(), "2".to_owned()])].into(),
        }
    }

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn the_server_hears_who_it_is_and_nothing_of_what_the_caller_says_about_it() {
        let mut headers = map(&[
            ("X-Remote-User", "admin"),
            ("x_remote_user", "admin"),
            ("X-REMOTE_group", "system:masters"),
            ("X-Remote-Extra-Scopes", "all"),
            ("X-Remote-Anything", "1"),
            ("Impersonate-User", "admin"),
            ("impersonate_group", "system:masters"),
            ("Authorization", "Bearer abc"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("X_Forwarded_For", "10.0.0.1"),
            ("X-Real-IP", "10.0.0.1"),
            ("Connection", "keep-alive, X-Remote-User, X-Other"),
            ("X-Other", "1"),
            ("Trailer", "X-Remote-User"),
            ("Host", "outside"),
            ("Cookie", "a=1"),
            ("Cookie", "b=2"),
            ("Accept", "application/json"),
        ]);
        let hop = Hop::of(&headers);
        request(&mut headers, &hop, &user(), PEER).unwrap();
        assert_eq!(
            shown(&headers),
            [
                "accept: application/json",
                "cookie: a=1; b=2",
                "x-forwarded-for: 192.0.2.1",
                "x-remote-extra-example.org%2fk%25y: 1",
                "x-remote-extra-example.org%2fk%25y: 2",
                "x-remote-group: a",
                "x-remote-group: b,c",
                "x-remote-uid: 7",
                "x-remote-user: jane",
            ]
        );
    }

    #[test]
    fn an_upgrade_stays_one() {
        let mut headers =
            map(&[("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Remote-User", "admin")]);
        let hop = Hop::of(&headers);
        let nobody = User { name: "jane".to_owned(), ..User::default() };
        request(&mut headers, &hop, &nobody, PEER).unwrap();
        let expected =
            ["connection: Upgrade", "upgrade: SPDY/3.1", "x-forwarded-for: 192.0.2.1", "x-remote-user: jane"];
        assert_eq!(shown(&headers), expected);
    }

    #[test]
    fn names_that_servers_would_read_differently_are_not_passed_on() {
        for name in ["", " ", "admin ", "\tadmin", "a\nb", "a\0", "\u{a0}admin"] {
            let user = User { name: name.to_owned(), ..User::default() };
            let refused = request(&mut HeaderMap::new(), &Hop::default(), &user, PEER);
            assert_eq!(refused.unwrap_err().code, StatusCode::FORBIDDEN, "{name:?}");
            let user = User { name: "jane".to_owned(), groups: vec![name.to_owned()], ..User::default() };
            assert!(request(&mut HeaderMap::new(), &Hop::default(), &user, PEER).is_err(), "{name:?}");
        }
        let user = User { name: "j\u{e4}ne".to_owned(), ..User::default() };
        assert!(request(&mut HeaderMap::new(), &Hop::default(), &user, PEER).is_ok());
    }

    #[test]
    fn ambiguous_heads() {
        let check = |uri: &str, lines: &[(&str, &str)]| {
            let mut parts = Request::builder().uri(uri).body(()).unwrap().into_parts().0;
            parts.headers = map(lines);
            if !lines.iter().any(|(name, _)| *name == "Host") {
                parts.headers.insert(header::HOST, HeaderValue::from_static("a"));
            }
            refuse_ambiguous(&parts).is_ok()
        };
        assert!(check("/api", &[("Host", "a")]));
        assert!(check("https://a/api", &[("Host", "A")]));
        assert!(check("https://a/api", &[]));
        assert!(check("/api", &[("Transfer-Encoding", "chunked")]));
        for lines in [
            &[("Host", "a"), ("Host", "a")][..],
            &[("Transfer-Encoding", "gzip, chunked")],
            &[("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
            &[("Transfer-Encoding", "chunked"), ("Content-Length", "3")],
            &[("Content-Length", "3"), ("Content-Length", "3")],
        ] {
            assert!(!check("/api", lines), "{lines:?}");
        }
        assert!(!check("https://a/api", &[("Host", "b")]));
        assert!(!check("*", &[("Host", "a")]));
    }

    #[test]
    fn responses() {
        let mut headers = map(&[
            ("Connection", "close, X-Hop"),
            ("X-Hop", "1"),
            ("Transfer-Encoding", "chunked"),
            ("Audit-Id", "1"),
        ]);
        response(&mut headers, false);
        assert_eq!(shown(&headers), ["audit-id: 1"]);
    }
}
