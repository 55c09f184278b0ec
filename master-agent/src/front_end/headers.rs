//! The heads that pass between callers and API servers: the rejection of ambiguous heads, and the headers that tell an
//! API server who the caller is.

use std::net::IpAddr;

use access::{authn, user::User};
use hyper::{
    HeaderMap, Version,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use proto_config::{At, Section};

use crate::http::{
    claims::{Claims, fold},
    hop::{Hop, refuse_other_encodings, remove_hop_by_hop},
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The headers that tell kube-apiserver who a caller is, under the names that kube-apiserver is configured to read. The
/// front end sends the first of each kind, and removes all of them from what callers send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityHeaders {
    /// `--requestheader-username-headers`
    pub username: Vec<HeaderName>,
    /// `--requestheader-uid-headers`
    pub uid: Vec<HeaderName>,
    /// `--requestheader-group-headers`
    pub group: Vec<HeaderName>,
    /// `--requestheader-extra-headers-prefix`
    pub extra_prefix: Vec<HeaderName>,
}

impl Default for IdentityHeaders {
    fn default() -> Self {
        Self {
            username: vec![HeaderName::from_static("x-remote-user")],
            uid: vec![HeaderName::from_static("x-remote-uid")],
            group: vec![HeaderName::from_static("x-remote-group")],
            extra_prefix: vec![HeaderName::from_static("x-remote-extra-")],
        }
    }
}

impl IdentityHeaders {
    /// Reads the names from the fields of the `upstream` section.
    pub fn read(s: &Section<'_>) -> Self {
        let names = |field: &'static str, default: Vec<HeaderName>| {
            if s.at(field).is_none() {
                return default;
            }
            let names: Vec<_> = s.items(field).iter().filter_map(header_name).collect();
            if s.items(field).is_empty() {
                s.error(
                    field,
                    "names no header: leave it out, or give what kube-apiserver's flag of this name has",
                );
            }
            names
        };
        let default = Self::default();
        for (field, name) in [
            ("requestheader_username_headers", "[X-Remote-User]"),
            ("requestheader_uid_headers", "[X-Remote-Uid]"),
            ("requestheader_group_headers", "[X-Remote-Group]"),
            ("requestheader_extra_headers_prefix", "[X-Remote-Extra-]"),
        ] {
            s.states_default(field, name);
        }
        let this = Self {
            username: names("requestheader_username_headers", default.username),
            uid: names("requestheader_uid_headers", default.uid),
            group: names("requestheader_group_headers", default.group),
            extra_prefix: names("requestheader_extra_headers_prefix", default.extra_prefix),
        };
        if let Some(confusion) = this.confusion() {
            s.section_error(format!("{confusion}: kube-apiserver could not tell them apart"));
        }
        this
    }

    /// Returns the headers that callers must not send.
    pub fn claims(&self) -> Claims {
        let names = [&self.username, &self.uid, &self.group].into_iter().flatten();
        Claims::with(names.map(HeaderName::as_str), self.extra_prefix.iter().map(HeaderName::as_str))
    }

    /// Returns why kube-apiserver could confuse one of these headers with another one, if it could.
    pub fn confusion(&self) -> Option<String> {
        let kinds = [&self.username, &self.uid, &self.group];
        let folded = kinds.map(|names| names.iter().map(|name| fold(name.as_str())).collect::<Vec<_>>());
        let [username, uid, group] = &folded;
        for (names, others) in [(username, uid), (username, group), (uid, group)] {
            if let Some(name) = names.iter().find(|name| others.contains(name)) {
                return Some(format!("header {name} has two meanings"));
            }
        }
        let prefixes: Vec<String> = self.extra_prefix.iter().map(|prefix| fold(prefix.as_str())).collect();
        let mut names = folded.iter().flatten().map(String::as_str).chain(NOT_FOR_IDENTITY);
        names.find_map(|name| {
            let prefix = prefixes.iter().find(|prefix| name.starts_with(prefix.as_str()))?;
            Some(format!("header {name} begins with the prefix {prefix} of extra headers"))
        })
    }

    /// Whether a header has another meaning in a request to kube-apiserver.
    pub fn is_taken(name: &HeaderName) -> bool {
        let name = fold(name.as_str());
        name.starts_with("impersonate-")
            || name.starts_with("sec-")
            || NOT_FOR_IDENTITY.contains(&name.as_str())
    }
}

fn header_name(at: &At<'_>) -> Option<HeaderName> {
    let text = at.text()?;
    match HeaderName::try_from(text) {
        Ok(name) if !IdentityHeaders::is_taken(&name) => return Some(name),
        Ok(_) => {
            at.error(format!("{text:?} has another meaning: give a header of its own, such as X-Remote-User"))
        }
        Err(_) => {
            at.error(format!("{text:?} is not the name of a header: expected one such as X-Remote-User"))
        }
    }
    None
}

/// The headers that have another meaning for HTTP or kube-apiserver.
const NOT_FOR_IDENTITY: [&str; 26] = [
    "accept",
    "accept-encoding",
    "audit-id",
    "authorization",
    "baggage",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "keep-alive",
    "origin",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "x-forwarded-for",
    "x-stream-protocol-version",
];

/// The characters that a header's name can't contain (RFC 9110, section 5.6.2), and `%`, which escapes them.
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

/// Returns the upgrade that a request asks for, if kube-apiserver supports it. Others are not passed on.
pub(super) fn known_upgrade(hop: &Hop) -> Option<&HeaderValue> {
    let known = |value: &&HeaderValue| {
        let value = value.as_bytes();
        value.eq_ignore_ascii_case(b"websocket") || value.eq_ignore_ascii_case(b"SPDY/3.1")
    };
    hop.upgrade.as_ref().filter(known)
}

/// Why servers could interpret a head differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AmbiguousHead {
    #[error("there is no Host")]
    NoHost,
    #[error("more than one Host")]
    ManyHosts,
    #[error("HTTP/1.0 is not served here")]
    Http10,
    #[error("no Transfer-Encoding but chunked is served here")]
    TransferEncoding,
    #[error("Content-Length and Transfer-Encoding exclude each other")]
    TwoFramings,
    #[error("more than one Content-Length")]
    ManyLengths,
    #[error("Host differs from the host of the request's target")]
    OtherHost,
    #[error("the request's target is not a path")]
    NoPath,
}

/// Rejects heads that servers could interpret differently.
pub(super) fn reject_ambiguous(head: &Parts) -> Result<(), AmbiguousHead> {
    let Parts { uri, version, headers, .. } = head;
    match headers.get_all(header::HOST).iter().count() {
        0 if *version == Version::HTTP_11 => return Err(AmbiguousHead::NoHost),
        0 | 1 => {}
        _ => return Err(AmbiguousHead::ManyHosts),
    }
    if *version < Version::HTTP_11 {
        return Err(AmbiguousHead::Http10);
    }
    if refuse_other_encodings(headers).is_err() {
        return Err(AmbiguousHead::TransferEncoding);
    }
    if headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH) {
        return Err(AmbiguousHead::TwoFramings);
    }
    if headers.get_all(header::CONTENT_LENGTH).iter().count() > 1 {
        return Err(AmbiguousHead::ManyLengths);
    }
    if let (Some(authority), Some(host)) = (uri.authority(), headers.get(header::HOST))
        && !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
    {
        return Err(AmbiguousHead::OtherHost);
    }
    if !uri.path().starts_with('/') {
        return Err(AmbiguousHead::NoPath);
    }
    Ok(())
}

/// The error of a user whose name, group or extra value can't be passed on in a header unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("your user name, a group or an extra of yours can't be passed on in a header")]
pub struct UnsendableIdentity;

/// Passes the identity of callers to API servers.
pub struct IdentityForwarder {
    headers: IdentityHeaders,
    /// The headers that are removed from callers' requests.
    pub claims: Claims,
}

/// The headers that tell an API server on whose behalf a request is made, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityLines(Vec<(HeaderName, HeaderValue)>);

impl IdentityLines {
    /// Returns how many bytes the headers have.
    pub fn size(&self) -> usize {
        self.0.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
    }

    fn add<'a>(
        &mut self,
        names: &[HeaderName],
        values: impl IntoIterator<Item = &'a String>,
    ) -> Result<(), UnsendableIdentity> {
        for value in values {
            let name = names.first().ok_or(UnsendableIdentity)?.clone();
            self.0.push((name, text(value)?));
        }
        Ok(())
    }
}

impl IdentityForwarder {
    pub fn new(headers: IdentityHeaders) -> Self {
        Self { claims: headers.claims(), headers }
    }

    /// Returns the headers of requests that a caller at `peer` makes on behalf of `user`.
    pub fn lines(&self, user: &User, peer: IpAddr) -> Result<IdentityLines, UnsendableIdentity> {
        let mut lines = IdentityLines(vec![(FORWARDED_FOR, text(&peer.to_canonical().to_string())?)]);
        let IdentityHeaders { username, uid, group, extra_prefix } = &self.headers;
        lines.add(username, [&user.name])?;
        lines.add(uid, &user.uid)?;
        lines.add(group, &user.groups)?;
        let prefix = extra_prefix.first().map_or("", HeaderName::as_str);
        for (key, values) in &user.extra {
            let name = format!("{prefix}{}", utf8_percent_encode(key, NOT_IN_KEYS));
            let name = HeaderName::try_from(name).map_err(|_| UnsendableIdentity)?;
            lines.add(&[name], values)?;
        }
        Ok(lines)
    }

    /// Rewrites the headers of a caller's request into those of a request to an API server.
    pub fn rewrite(&self, headers: &mut HeaderMap, hop: &Hop, identity: &IdentityLines) {
        remove_hop_by_hop(headers);
        authn::strip(headers);
        self.claims.remove(headers);
        for name in [header::EXPECT, header::TRAILER, header::HOST] {
            headers.remove(name);
        }
        join_cookies(headers);
        for (name, value) in &identity.0 {
            headers.append(name, value.clone());
        }
        if let Some(upgrade) = &hop.upgrade {
            headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(header::UPGRADE, upgrade.clone());
        }
    }
}

/// Rewrites the headers of an API server's response into those of the response to the caller.
pub(super) fn response(headers: &mut HeaderMap, upgraded: bool) {
    let upgrade = headers.get(header::UPGRADE).filter(|_| upgraded).cloned();
    remove_hop_by_hop(headers);
    headers.remove(header::TRAILER);
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, upgrade);
    }
}

/// Joins cookies, which HTTP/2 may send one by one (RFC 9113, section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

/// Returns a name as a header's value. Servers trim values, so a name with spaces around it is an error: `admin ` must
/// not become `admin`.
fn text(text: &str) -> Result<HeaderValue, UnsendableIdentity> {
    if text.is_empty() || text.trim() != text {
        return Err(UnsendableIdentity);
    }
    HeaderValue::from_bytes(text.as_bytes()).map_err(|_| UnsendableIdentity)
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

    fn forwarder() -> IdentityForwarder {
        IdentityForwarder::new(IdentityHeaders::default())
    }

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn rewrite(forwarder: &IdentityForwarder, headers: &mut HeaderMap, user: &User) {
        let hop = Hop::of(headers);
        forwarder.rewrite(headers, &hop, &forwarder.lines(user, PEER).unwrap());
    }

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
            ("x.remote.user", "admin"),
            ("X-Forwarded-User", "admin"),
            ("x_forwarded_groups", "system:masters"),
            ("X-Forwarded-Access-Token", "abc"),
            ("X-Auth-Request-Email", "admin@example.org"),
            ("Connection", "keep-alive, X-Remote-User, X-Other"),
            ("X-Other", "1"),
            ("Trailer", "X-Remote-User"),
            ("Host", "outside"),
            ("Cookie", "a=1"),
            ("Cookie", "b=2"),
            ("Accept", "application/json"),
        ]);
        rewrite(&forwarder(), &mut headers, &user());
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
    fn the_headers_have_the_names_that_the_server_reads() {
        let names = |names: &[&str]| names.iter().map(|name| HeaderName::try_from(*name).unwrap()).collect();
        let forwarder = IdentityForwarder::new(IdentityHeaders {
            username: names(&["X-Kube-User", "X-Old-User"]),
            uid: names(&["X-Kube-Uid"]),
            group: names(&["X-Kube-Group"]),
            extra_prefix: names(&["X-Kube-Extra-", "X-More-"]),
        });
        let mut headers = map(&[
            ("X-Kube-User", "admin"),
            ("x_kube_user", "admin"),
            ("X-Old-User", "admin"),
            ("x.old.user", "admin"),
            ("X_Kube-Uid", "0"),
            ("X-Kube-Group", "system:masters"),
            ("x_kube_extra_scopes", "all"),
            ("X-More-Scopes", "all"),
            // Servers may still read these as well.
            ("X-Remote-User", "admin"),
            ("X-Remote-Extra-Scopes", "all"),
            (
                "Connection",
                "close, X-Kube-User, x-kube-group, X-Kube-Extra-Example.org%2fk%25y, X-Forwarded-For",
            ),
            ("Connection", "X-Kube-Uid"),
            ("X-Kube-Users", "1"),
        ]);
        rewrite(&forwarder, &mut headers, &user());
        assert_eq!(
            shown(&headers),
            [
                "x-forwarded-for: 192.0.2.1",
                "x-kube-extra-example.org%2fk%25y: 1",
                "x-kube-extra-example.org%2fk%25y: 2",
                "x-kube-group: a",
                "x-kube-group: b,c",
                "x-kube-uid: 7",
                "x-kube-user: jane",
                "x-kube-users: 1",
            ]
        );
    }

    #[test]
    fn an_upgrade_stays_one() {
        let mut headers =
            map(&[("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Remote-User", "admin")]);
        rewrite(&forwarder(), &mut headers, &User { name: "jane".to_owned(), ..User::default() });
        let expected =
            ["connection: Upgrade", "upgrade: SPDY/3.1", "x-forwarded-for: 192.0.2.1", "x-remote-user: jane"];
        assert_eq!(shown(&headers), expected);
    }

    #[test]
    fn names_that_servers_would_read_differently_are_not_passed_on() {
        for name in ["", " ", "admin ", "\tadmin", "a\nb", "a\0", "\u{a0}admin"] {
            let user = User { name: name.to_owned(), ..User::default() };
            assert_eq!(forwarder().lines(&user, PEER), Err(UnsendableIdentity), "{name:?}");
            let user = User { name: "jane".to_owned(), groups: vec![name.to_owned()], ..User::default() };
            assert!(forwarder().lines(&user, PEER).is_err(), "{name:?}");
        }
        let user = User { name: "j\u{e4}ne".to_owned(), ..User::default() };
        assert!(forwarder().lines(&user, PEER).is_ok());
    }

    #[test]
    fn ambiguous_heads_are_rejected() {
        let check = |uri: &str, lines: &[(&str, &str)]| {
            let mut parts = Request::builder().uri(uri).body(()).unwrap().into_parts().0;
            parts.headers = map(lines);
            if !lines.iter().any(|(name, _)| *name == "Host") {
                parts.headers.insert(header::HOST, HeaderValue::from_static("a"));
            }
            reject_ambiguous(&parts).is_ok()
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
    fn a_response_keeps_no_hop_by_hop_headers() {
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
