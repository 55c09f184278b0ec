//! The page: what `top`, `explain` and `compare` show, in a browser.
//!
//! One handler, in two places: below [`ADMIN`] of the admin address, for whoever had the agent's admin socket print a
//! login ([`login`]); below [`FRONT_END`] of the front end, behind its authentication and authorization. What is served
//! needs no other origin and runs no script but its own. What peers have a part in is sent as JSON, and becomes text.

mod guard;
mod live;
mod login;
mod sessions;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Body,
    header::{self, HeaderName, HeaderValue},
};
use proto::io::{
    admin::{self, Answer},
    dialer::Origin,
};
use tokio::time::Instant;

use crate::{
    activity::unix_milliseconds,
    agent::Agent,
    compare::{html, report::Report},
    registry::Registry,
};

pub use login::{serve, token};

use live::Live;
use sessions::Sessions;

/// Where the page is on the admin address.
pub const ADMIN: &str = "/page/";
/// Where it is on the front end.
pub const FRONT_END: &str = "/agent/page/";
/// What is told live, below either.
const EVENTS: &str = "events";
/// After so long on the front end, whoever watches is authorized again.
const AGAIN: Duration = Duration::from_secs(60);
/// Of what is to be explained.
const MAX_TARGET: usize = 1024;
/// For that to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Of a comparison that is handed over.
const MAX_COMPARISON: usize = 4 << 20;

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
     frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
/// Of the report, which is one file and has no scripts.
const REPORT_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; \
     form-action 'none'";

/// What there is only for the page.
pub struct Page {
    sessions: Sessions,
    live: Arc<Live>,
    comparison: Mutex<Option<Arc<Comparison>>>,
}

/// A report that `compare` handed over.
struct Comparison {
    unix_milliseconds: u64,
    report: Report,
}

impl Page {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { sessions: Sessions::default(), live: Live::new(registry), comparison: Mutex::default() }
    }

    fn comparison(&self) -> Option<Arc<Comparison>> {
        self.comparison.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes what `PUT /comparison` of the admin socket brings.
    pub async fn take_comparison<B>(&self, body: B) -> Answer
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let body = match Limited::new(body, MAX_COMPARISON).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                let message = format!("no comparison of at most {MAX_COMPARISON} bytes: {error}\n");
                return (StatusCode::PAYLOAD_TOO_LARGE, TEXT, message);
            }
        };
        let report = match serde_json::from_slice::<Report>(&body) {
            Ok(report) if report.version == 1 => report,
            Ok(Report { version, .. }) => {
                let message = format!("a comparison of version {version} is not known here\n");
                return (StatusCode::BAD_REQUEST, TEXT, message);
            }
            Err(error) => return (StatusCode::BAD_REQUEST, TEXT, format!("no comparison: {error}\n")),
        };
        let comparison = Comparison { unix_milliseconds: unix_milliseconds(SystemTime::now()), report };
        self.live.compared(comparison.unix_milliseconds);
        *self.comparison.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(comparison));
        (StatusCode::OK, TEXT, "ok\n".to_owned())
    }
}

/// What is asked for below the prefix on the front end; `None` of other paths.
pub fn on_front_end(path: &str) -> Option<&str> {
    below(path, FRONT_END)
}

/// Whether that goes on for as long as somebody watches.
pub fn is_long_running(path: &str) -> bool {
    on_front_end(path) == Some(EVENTS)
}

/// Who looks at the page.
struct Viewer {
    /// Of what it has dialled.
    origin: Origin,
    /// When it must ask again to be told what is live.
    end: Instant,
    on_front_end: bool,
}

/// Answers on the front end, where the caller, who is `origin`, is known and authorized.
pub async fn answer_on_front_end<B>(
    agent: &Arc<Agent>,
    path: &str,
    request: Request<B>,
    origin: Origin,
) -> Response<admin::Body>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Some(path) = on_front_end(path) else { return refusal(StatusCode::NOT_FOUND, "no such page") };
    let own = guard::own_page_through_proxies(&request);
    let viewer = Viewer { origin, end: Instant::now() + AGAIN, on_front_end: true };
    answer(agent, path, request, own, viewer).await
}

/// What is behind the prefix, or the prefix itself without its last slash.
fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix).or_else(|| (prefix.strip_suffix('/') == Some(path)).then_some(WITHOUT_SLASH))
}

/// No path below the prefix is so.
const WITHOUT_SLASH: &str = "/";

/// Answers what is asked for below the prefix. `own` says whether the page itself asks; only it may have
/// something done.
async fn answer<B>(
    agent: &Arc<Agent>,
    path: &str,
    request: Request<B>,
    own: Result<(), &'static str>,
    viewer: Viewer,
) -> Response<admin::Body>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let page = &agent.page;
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
        EVENTS => match page.live.watch(agent.draining.clone(), viewer.end, viewer.on_front_end) {
            Some(body) => {
                let mut response = Response::new(body);
                let stream = HeaderValue::from_static("text/event-stream");
                response.headers_mut().insert(header::CONTENT_TYPE, stream);
                guarded(response, POLICY)
            }
            None => refusal(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open; close one"),
        },
        "explain" => match own {
            Ok(()) => explain(agent, request.into_body(), viewer.origin).await,
            Err(reason) => refusal(StatusCode::FORBIDDEN, reason),
        },
        "comparison.json" => match page.comparison() {
            Some(comparison) => json(&Summary {
                unix_milliseconds: comparison.unix_milliseconds,
                started: &comparison.report.started,
                seconds: comparison.report.seconds,
                rounds: comparison.report.rounds,
                overview: comparison.report.overview(),
            }),
            None => refusal(StatusCode::NOT_FOUND, NO_COMPARISON),
        },
        "comparison.html" => match page.comparison() {
            Some(comparison) => {
                guarded(admin::respond((StatusCode::OK, HTML, html::page(&comparison.report))), REPORT_POLICY)
            }
            None => refusal(StatusCode::NOT_FOUND, NO_COMPARISON),
        },
        path => {
            let name = path.strip_prefix("nodes/").and_then(|name| name.parse().ok());
            match name.and_then(|name| agent.registry.detail(&name)) {
                Some(detail) => json(&detail),
                None => refusal(StatusCode::NOT_FOUND, "no such page, or no such node"),
            }
        }
    }
}

const NO_COMPARISON: &str = "nothing has been compared since the agent was started";

#[derive(serde::Serialize)]
struct Summary<'a> {
    unix_milliseconds: u64,
    started: &'a str,
    seconds: f64,
    rounds: usize,
    #[serde(flatten)]
    overview: crate::compare::report::Overview,
}

async fn explain<B>(agent: &Agent, body: B, origin: Origin) -> Response<admin::Body>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = Limited::new(body, MAX_TARGET).collect();
    let target = match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) | Err(_) => return refusal(StatusCode::BAD_REQUEST, "expected a target: HOST:PORT"),
    };
    match agent.explain(String::from_utf8_lossy(&target).trim(), origin).await {
        Ok(explanation) => json(&explanation),
        Err(error) => refusal(StatusCode::BAD_REQUEST, &error),
    }
}

fn json(value: &impl serde::Serialize) -> Response<admin::Body> {
    match serde_json::to_string(value) {
        Ok(text) => asset(JSON, &text),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn asset(content_type: &'static str, text: &str) -> Response<admin::Body> {
    guarded(admin::respond((StatusCode::OK, content_type, text.to_owned())), POLICY)
}

fn refusal(status: StatusCode, message: &str) -> Response<admin::Body> {
    guarded(admin::respond((status, TEXT, format!("{message}\n"))), POLICY)
}

fn redirect(to: &'static str, status: StatusCode) -> Response<admin::Body> {
    let mut response = refusal(status, "it is elsewhere");
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(to));
    response
}

/// What a browser is to keep to, whatever the answer.
fn guarded(mut response: Response<admin::Body>, policy: &'static str) -> Response<admin::Body> {
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
