//! The counters of the front end, which count events as they happen.

use std::time::Duration;

use hyper::StatusCode;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use rustls::ProtocolVersion;

/// The outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOutcome {
    /// The request's handler has answered.
    Served,
    Unauthenticated,
    Forbidden,
    Limited,
    /// No server could answer the request.
    Unanswered,
    /// The request is invalid.
    Bad,
    /// The caller left before the answer.
    Cancelled,
}

impl RequestOutcome {
    fn label(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::Limited => "limited",
            Self::Unanswered => "unanswered",
            Self::Bad => "bad",
            Self::Cancelled => "cancelled",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    code: &'static str,
    outcome: &'static str,
}

/// The result of a TLS handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    Ok(Option<ProtocolVersion>),
    Failed,
    TimedOut,
    Evicted,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandshakeLabels {
    result: &'static str,
    version: &'static str,
}

/// The result of one authenticator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authentication {
    Ok,
    Failed,
    /// The service that verifies the credential is unavailable.
    Unavailable,
    /// The credential was not verified, because there were too many failures before.
    Limited,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AuthenticationLabels {
    authenticator: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    authorizer: &'static str,
    decision: &'static str,
}

/// The label with the name of the exceeded limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LimitLabel {
    pub limit: &'static str,
}

/// The handles of all counters.
pub struct FrontEndMetrics {
    requests: Family<RequestLabels, Counter>,
    request_seconds: Histogram,
    handshakes: Family<HandshakeLabels, Counter>,
    authentications: Family<AuthenticationLabels, Counter>,
    decisions: Family<DecisionLabels, Counter>,
    pub limited: Family<LimitLabel, Counter>,
    /// Audit records that could not be written.
    pub audit_lost: Counter,
}

impl Default for FrontEndMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            request_seconds: Histogram::new([
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
            ]),
            handshakes: Family::default(),
            authentications: Family::default(),
            decisions: Family::default(),
            limited: Family::default(),
            audit_lost: Counter::default(),
        }
    }
}

impl FrontEndMetrics {
    pub fn request(&self, outcome: RequestOutcome, code: Option<StatusCode>) {
        let code = match code.map(|code| code.as_u16() / 100) {
            Some(1) => "1xx",
            Some(2) => "2xx",
            Some(3) => "3xx",
            Some(4) => "4xx",
            Some(5) => "5xx",
            Some(_) | None => "none",
        };
        self.requests.get_or_create(&RequestLabels { code, outcome: outcome.label() }).inc();
    }

    /// Records the duration of a request that is not long-running.
    pub fn short_request(&self, took: Duration) {
        self.request_seconds.observe(took.as_secs_f64());
    }

    pub fn handshake(&self, handshake: Handshake) {
        let (result, version) = match handshake {
            Handshake::Ok(Some(ProtocolVersion::TLSv1_3)) => ("ok", "1.3"),
            Handshake::Ok(_) => ("ok", "1.2"),
            Handshake::Failed => ("failed", "none"),
            Handshake::TimedOut => ("timeout", "none"),
            Handshake::Evicted => ("evicted", "none"),
        };
        self.handshakes.get_or_create(&HandshakeLabels { result, version }).inc();
    }

    pub fn authentication(&self, authenticator: &'static str, result: Authentication) {
        let result = match result {
            Authentication::Ok => "ok",
            Authentication::Failed => "failed",
            Authentication::Unavailable => "unavailable",
            Authentication::Limited => "limited",
        };
        self.authentications.get_or_create(&AuthenticationLabels { authenticator, result }).inc();
    }

    /// Counts a decision. `authorizer` is `None` if no authorizer decided.
    pub fn decision(&self, authorizer: Option<&'static str>, allowed: bool) {
        let authorizer = authorizer.unwrap_or("none");
        let decision = if allowed { "allow" } else { "deny" };
        self.decisions.get_or_create(&DecisionLabels { authorizer, decision }).inc();
    }

    pub(super) fn register(&self, r: &mut Registry) {
        r.register("audit_records_lost", "Audit records that could not be written", self.audit_lost.clone());
        r.register(
            "front_end_requests",
            "Requests to the front end, by class of their status and what became of them",
            self.requests.clone(),
        );
        r.register(
            "front_end_request_duration_seconds",
            "Time to the end of the response, but for long-running requests",
            self.request_seconds.clone(),
        );
        r.register(
            "front_end_handshakes",
            "TLS handshakes with the front end, by result and version",
            self.handshakes.clone(),
        );
        r.register(
            "front_end_authentications",
            "Credentials that were looked at, by authenticator and result",
            self.authentications.clone(),
        );
        r.register(
            "front_end_decisions",
            "Requests that were authorized or denied here, by authorizer",
            self.decisions.clone(),
        );
        r.register(
            "front_end_limited",
            "What was turned away by a limit, by kind of limit",
            self.limited.clone(),
        );
    }
}
