//! The credentials of a request: the certificates of its connection and its bearer token.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::{
    HeaderMap,
    header::{self, HeaderName, HeaderValue},
    http::request::Parts,
};

use super::{
    certificates::Certificates,
    failure::AuthenticationFailure,
    guard::{Cost, Guard},
    reason::FailureReason,
};
use crate::secret::Secret;

/// The longest bearer token, in bytes.
pub(super) const MAX_TOKEN: usize = 16 * 1024;

/// The prefix of the WebSocket subprotocol with which a browser, which can't set headers, passes a token.
const SUBPROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// The credentials that a caller presents. A token in the query is ignored.
#[derive(Debug)]
pub struct Presented<'a> {
    /// The certificates of the connection.
    pub certificates: &'a Certificates,
    pub bearer: Option<Secret>,
    pub path: &'a str,
    /// Whether authentication has been costly, and the guard that decides whether it may be.
    pub(super) cost: Cost<'a>,
}

impl<'a> Presented<'a> {
    /// Reads the credentials of a request. An ambiguous or malformed credential is an error rather than none.
    pub fn of(head: &'a Parts, certificates: &'a Certificates) -> Result<Self, AuthenticationFailure> {
        let bearer = match (authorization(&head.headers)?, subprotocol(&head.headers)?) {
            (Some(_), Some(_)) => return Err(FailureReason::TwoTokens.into()),
            (token, None) | (None, token) => token,
        };
        if bearer.as_ref().is_some_and(|token| token.expose().len() > MAX_TOKEN) {
            return Err(FailureReason::TokenTooLong(MAX_TOKEN).into());
        }
        let path = head.uri.path();
        Ok(Self { certificates, bearer, path, cost: Cost::default() })
    }

    /// Sets the guard before costly steps.
    pub fn guarded(mut self, guard: &'a dyn Guard) -> Self {
        self.cost.guard(guard);
        self
    }

    /// Returns the reason why the caller is not recognised if no authenticator has returned one.
    pub(super) fn unrecognized(&self) -> FailureReason {
        match self.bearer.is_none() && self.certificates.is_empty() {
            true => FailureReason::NoCredential,
            false => FailureReason::Unrecognized,
        }
    }
}

/// Removes all credentials from the headers of a request that is passed on.
pub fn strip(headers: &mut HeaderMap) {
    headers.remove(header::AUTHORIZATION);
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL);
    if !offered.iter().any(|value| contains(value.as_bytes(), SUBPROTOCOL.as_bytes())) {
        return;
    }
    let kept: Vec<_> = protocols(headers).filter(|name| !name.starts_with(SUBPROTOCOL)).collect();
    let kept = HeaderValue::from_str(&kept.join(", ")).ok().filter(|kept| !kept.is_empty());
    headers.remove(header::SEC_WEBSOCKET_PROTOCOL);
    if let Some(kept) = kept {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, kept);
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn authorization(headers: &HeaderMap) -> Result<Option<Secret>, FailureReason> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = match (values.next(), values.next()) {
        (None, _) => return Ok(None),
        (Some(value), None) => value,
        (Some(_), Some(_)) => return Err(FailureReason::TwoAuthorizations),
    };
    let value = value.as_bytes().trim_ascii();
    let (scheme, token) =
        value.split_at(value.iter().position(u8::is_ascii_whitespace).unwrap_or(value.len()));
    if !scheme.eq_ignore_ascii_case(b"bearer") {
        return Ok(None);
    }
    let token = token.strip_prefix(b" ").and_then(|token| std::str::from_utf8(token).ok());
    // This allows the tokens of RFC 6750, section 2.1, and no byte that could begin another header.
    match token {
        Some(token) if !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic()) => {
            Ok(Some(Secret::new(token)))
        }
        Some(_) | None => Err(FailureReason::MalformedAuthorization),
    }
}

fn subprotocol(headers: &HeaderMap) -> Result<Option<Secret>, FailureReason> {
    if !(lists(headers, header::CONNECTION, "upgrade") && lists(headers, header::UPGRADE, "websocket")) {
        return Ok(None);
    }
    let (tokens, others): (Vec<_>, Vec<_>) =
        protocols(headers).partition(|name| name.starts_with(SUBPROTOCOL));
    let encoded = match tokens.as_slice() {
        [] => return Ok(None),
        [one] => one.strip_prefix(SUBPROTOCOL).unwrap_or_default(),
        [_, _, ..] => return Err(FailureReason::TwoTokens),
    };
    if others.is_empty() {
        return Err(FailureReason::LoneSubprotocol);
    }
    if encoded.len() / 4 * 3 > MAX_TOKEN {
        return Err(FailureReason::TokenTooLong(MAX_TOKEN));
    }
    let token = URL_SAFE_NO_PAD.decode(encoded).ok().and_then(|token| String::from_utf8(token).ok());
    match token {
        Some(token) if !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic()) => {
            Ok(Some(Secret::new(token)))
        }
        Some(_) | None => Err(FailureReason::MalformedSubprotocol),
    }
}

/// Returns the WebSocket subprotocols that a request offers.
fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).into_iter();
    let names = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    names.map(str::trim).filter(|name| !name.is_empty())
}

/// Whether a header that is a list contains an element.
fn lists(headers: &HeaderMap, name: HeaderName, element: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(element))
}
