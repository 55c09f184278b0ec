//! The responses of the page, with the headers that restrict what a browser does with them.

use bytes::Bytes;
use hyper::{
    Response, StatusCode,
    header::{self, HeaderName, HeaderValue},
};
use proto_net::admin;

pub(super) const HTML: &str = "text/html; charset=utf-8";
pub(super) const JSON: &str = "application/json";
pub(super) const TEXT: &str = "text/plain; charset=utf-8";
pub(super) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
     frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
/// The policy of the report, which is one file without scripts.
pub(super) const REPORT_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; \
     form-action 'none'";

pub(super) fn json(value: &impl serde::Serialize) -> Response<admin::Body> {
    match serde_json::to_string(value) {
        Ok(text) => asset(JSON, text),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

pub(super) fn asset(content_type: &'static str, text: impl Into<Bytes>) -> Response<admin::Body> {
    guarded(admin::respond((StatusCode::OK, content_type, text)), POLICY)
}

pub(super) fn refusal(status: StatusCode, message: &str) -> Response<admin::Body> {
    guarded(admin::respond((status, TEXT, format!("{message}\n"))), POLICY)
}

pub(super) fn redirect(to: &'static str, status: StatusCode) -> Response<admin::Body> {
    let mut response = refusal(status, "the page has another address");
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(to));
    response
}

/// Adds the headers that every response has.
pub(super) fn guarded(mut response: Response<admin::Body>, policy: &'static str) -> Response<admin::Body> {
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
