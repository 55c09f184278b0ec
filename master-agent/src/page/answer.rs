//! The answers of the page at both of its sites.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Body,
    header::{self, HeaderValue},
};
use proto_net::{admin, dialer::Origin};
use tokio::time::Instant;

use super::{
    paths::{EVENTS, Site, WITHOUT_SLASH},
    response::{HTML, JSON, POLICY, REPORT_POLICY, asset, guarded, json, redirect, refusal},
    state::Page,
};
use crate::tunnels::explain::Explainer;

/// The longest target that is explained, in bytes.
const MAX_TARGET: usize = 1024;
/// The longest time until the target has arrived.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// The person who looks at the page.
pub(super) struct Viewer {
    /// The name of the viewer in the records of streams that the page opens.
    pub origin: Origin,
    /// When live events end, so that the viewer has to be authorized again.
    pub end: Instant,
    pub site: Site,
}

/// Answers a request for a path below the prefix. `own` says whether the page itself makes the request. Only such
/// requests may have effects.
pub(super) async fn answer<B>(
    page: &Page,
    path: &str,
    request: Request<B>,
    own: Result<(), &'static str>,
    viewer: Viewer,
) -> Response<admin::Body>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let allowed = if path == "explain" { Method::POST } else { Method::GET };
    if request.method() != allowed {
        let message = format!("only {allowed} is served here");
        let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED, &message);
        if let Ok(value) = HeaderValue::try_from(allowed.as_str()) {
            response.headers_mut().insert(header::ALLOW, value);
        }
        return response;
    }
    match path {
        WITHOUT_SLASH => redirect("page/", StatusCode::PERMANENT_REDIRECT),
        "" => asset(HTML, include_str!("assets/page.html")),
        "page.css" => asset("text/css; charset=utf-8", include_str!("assets/page.css")),
        "page.js" => asset("text/javascript; charset=utf-8", include_str!("assets/page.js")),
        "icon.svg" => asset("image/svg+xml", include_str!("assets/icon.svg")),
        EVENTS => match page.live.watch(page.draining.clone(), viewer.end, &viewer.site) {
            Some(body) => {
                let mut response = Response::new(body);
                let stream = HeaderValue::from_static("text/event-stream");
                response.headers_mut().insert(header::CONTENT_TYPE, stream);
                guarded(response, POLICY)
            }
            None => refusal(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open; close one"),
        },
        "explain" => match own {
            Ok(()) => explain_target(&page.explainer, request.into_body(), viewer.origin).await,
            Err(reason) => refusal(StatusCode::FORBIDDEN, reason),
        },
        "comparison.json" => match page.comparison() {
            Some(comparison) => asset(JSON, comparison.summary.clone()),
            None => refusal(StatusCode::NOT_FOUND, NO_COMPARISON),
        },
        "comparison.html" => match page.comparison() {
            Some(comparison) => {
                guarded(admin::respond((StatusCode::OK, HTML, comparison.page.clone())), REPORT_POLICY)
            }
            None => refusal(StatusCode::NOT_FOUND, NO_COMPARISON),
        },
        path => {
            let name = path.strip_prefix("nodes/").and_then(|name| name.parse().ok());
            match name.and_then(|name| page.registry.detail(&name)) {
                Some(detail) => json(&detail),
                None => refusal(StatusCode::NOT_FOUND, "no such page, or no such node"),
            }
        }
    }
}

const NO_COMPARISON: &str = "nothing has been compared since the agent was started";

async fn explain_target<B>(explainer: &Explainer, body: B, origin: Origin) -> Response<admin::Body>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = Limited::new(body, MAX_TARGET).collect();
    let target = match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) | Err(_) => return refusal(StatusCode::BAD_REQUEST, "expected a target: HOST:PORT"),
    };
    match explainer.explain(String::from_utf8_lossy(&target).trim(), origin).await {
        Ok(explanation) => json(&explanation),
        Err(error) => refusal(StatusCode::BAD_REQUEST, &error),
    }
}
