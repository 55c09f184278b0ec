//! What the front end learns about a request while it serves it. The audit record is written at the request's end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use access::{
    authn::{Authenticated, Failure, Reason},
    authz::Verdict,
    peer::Peer,
    request_info::RequestInfo,
    user::{UNAUTHENTICATED, User},
};
use hyper::{HeaderMap, Method, Request, StatusCode, Uri};
use opentelemetry::trace::SpanKind;
use proto::NodeName;
use proto_net::{dialer::Origin, relay::Counters};

use super::{
    audit::{Audit, Full, Outcome, Queue, Record, RequestId, Room},
    counters::{Authentication, FrontEndMetrics, RequestOutcome},
};
use crate::traces::{self, Span, SpanContext};

/// Characters of a path or query that a record keeps for as long as its response.
const KEPT: usize = 8 * 1024;

/// Dropping it writes the record, when the response has been passed on or the caller has left.
pub(super) struct Recorder {
    audit: Audit,
    metrics: Arc<FrontEndMetrics>,
    facts: Facts,
    /// The request may last, so that its duration says nothing about how fast it was served.
    lasting: bool,
    room: Option<Room>,
    /// Bytes of the request's body so far.
    pub received_bytes: Arc<AtomicU64>,
    sent_bytes: AtomicU64,
    /// Bytes of the upgraded connection so far.
    pub carried: Counters,
    span: Span,
}

/// What is known about the request so far.
#[derive(Clone)]
struct Facts {
    id: RequestId,
    received: SystemTime,
    began: Instant,
    source: String,
    /// The node whose tunnel the caller came through, or the request went through.
    node: Option<NodeName>,
    method: Method,
    uri: Uri,
    /// The span that the request is part of, as its caller says.
    parent: Option<SpanContext>,
    user: Option<Arc<User>>,
    authenticator: Option<&'static str>,
    impersonated: Option<Arc<User>>,
    request: Option<Arc<RequestInfo>>,
    outcome: Outcome,
    /// The front end itself has rejected the request.
    rejected: bool,
    authorizer: Option<&'static str>,
    rule: String,
    /// The status of the answer; 0 before there is one.
    code: u16,
}

impl Facts {
    fn of<B>(request: &Request<B>, peer: &Peer) -> Self {
        Self {
            id: RequestId::random(),
            received: SystemTime::now(),
            began: Instant::now(),
            source: peer.to_string(),
            node: match peer {
                Peer::Address(_) | Peer::Local(_) => None,
                Peer::Node { name, .. } => Some(name.clone()),
            },
            method: request.method().clone(),
            uri: beginning(request.uri()),
            parent: traces::parent(request.headers()),
            user: None,
            authenticator: None,
            impersonated: None,
            request: None,
            outcome: Outcome::Error,
            rejected: false,
            authorizer: None,
            rule: String::new(),
            code: 0,
        }
    }
}

impl Recorder {
    pub(super) fn new<B>(
        audit: Audit,
        metrics: Arc<FrontEndMetrics>,
        peer: &Peer,
        request: &Request<B>,
    ) -> Self {
        Self::of(audit, metrics, Facts::of(request, peer))
    }

    /// One more record of the same request, for the link that it led to.
    pub(super) fn again(&self) -> Self {
        let mut again = Self::of(self.audit.clone(), self.metrics.clone(), self.facts.clone());
        again.lasting = true;
        again
    }

    fn of(audit: Audit, metrics: Arc<FrontEndMetrics>, facts: Facts) -> Self {
        Self {
            audit,
            metrics,
            facts,
            lasting: false,
            room: None,
            received_bytes: Arc::default(),
            sent_bytes: AtomicU64::new(0),
            carried: Counters::default(),
            span: Span::default(),
        }
    }

    pub(super) fn authenticated(&mut self, who: &Authenticated) {
        self.metrics.authentication(who.authenticator, Authentication::Ok);
        self.facts.user = Some(who.user.clone());
        self.facts.authenticator = Some(who.authenticator);
        // Callers who have not authenticated can't add to traces.
        if self.queue() == Queue::Authenticated {
            let name = || self.facts.method.to_string();
            self.span = Span::start(SpanKind::Server, self.facts.parent.as_ref(), self.facts.received, name);
        } else {
            self.facts.parent = None;
        }
    }

    /// The span that the consequences of the request are part of.
    pub(super) fn span(&self) -> Option<SpanContext> {
        self.facts.user.as_ref()?;
        self.span.context().or(self.facts.parent.as_ref()).cloned()
    }

    /// Tells whoever answers the request which span it is part of.
    pub(super) fn inject(&self, headers: &mut HeaderMap) {
        if let Some(span) = self.span.context() {
            traces::inject(span, headers);
        }
    }

    /// Who makes a request to a target, as the records of streams name it.
    pub(super) fn origin(&self, user: &User) -> Origin {
        Origin(format!("front-end request {} of {:?} from {}", self.facts.id, user.name, self.facts.source))
    }

    /// Counts what each authenticator said of a caller whom none of them recognizes.
    pub(super) fn unrecognized(&self, why: &Failure) {
        for (authenticator, reason) in why.by_authenticator() {
            let result = if matches!(reason, Reason::NotTried(_)) {
                Authentication::Limited
            } else if matches!(reason, Reason::Unavailable(_)) {
                Authentication::Unavailable
            } else {
                Authentication::Failed
            };
            self.metrics.authentication(authenticator, result);
        }
    }

    /// Reserves room for the record of a request that is to be served.
    pub(super) async fn reserve(&mut self, lasting: bool) -> Result<(), Full> {
        self.lasting = lasting;
        let queue = if lasting { Queue::Lasting } else { self.queue() };
        self.room = self.audit.room(queue).await?;
        Ok(())
    }

    /// The request is rejected, with this outcome unless that is clear already. Its line is lost if there is no room,
    /// but waiting for room slows down whoever makes many such requests.
    pub(super) async fn rejected(&mut self, outcome: Option<Outcome>) {
        self.facts.rejected = true;
        self.facts.outcome = outcome.unwrap_or(self.facts.outcome);
        if self.room.is_none() {
            self.room = self.audit.room(self.queue()).await.ok().flatten();
        }
    }

    fn queue(&self) -> Queue {
        match &self.facts.user {
            Some(user) if !user.in_group(UNAUTHENTICATED) => Queue::Authenticated,
            Some(_) | None => Queue::Unauthenticated,
        }
    }

    /// What the request asks for is known.
    pub(super) fn resolved(&mut self, request: &Arc<RequestInfo>) {
        // The audit line has none of these, and a record is kept for as long as its response.
        let RequestInfo { path, tail, field_selector, .. } = request.as_ref();
        self.facts.request = Some(match path.len() + tail.len() <= KEPT && field_selector.is_empty() {
            true => request.clone(),
            false => {
                let (path, tail, field_selector) = Default::default();
                Arc::new(RequestInfo { path, tail, field_selector, ..RequestInfo::clone(request) })
            }
        });
    }

    pub(super) fn impersonates(&mut self, user: &Arc<User>) {
        self.facts.impersonated = Some(user.clone());
    }

    pub(super) fn decided(&mut self, verdict: &Verdict) {
        self.metrics.decision(verdict.authorizer, verdict.allowed);
        self.facts.authorizer = verdict.authorizer;
        self.facts.rule.clone_from(&verdict.rule);
        if !verdict.allowed {
            self.facts.outcome = Outcome::Deny;
        }
    }

    /// The request went through this node's tunnel.
    pub(super) fn through(&mut self, node: NodeName) {
        self.facts.node = Some(node);
    }

    /// The request goes on to its handler.
    pub(super) fn allowed(&mut self) {
        self.facts.outcome = Outcome::Allow;
    }

    pub(super) fn answered(&mut self, code: StatusCode) {
        self.facts.code = code.as_u16();
        let outcome = match self.facts.outcome {
            Outcome::Allow if !self.facts.rejected => RequestOutcome::Served,
            Outcome::Unauthenticated => RequestOutcome::Unauthenticated,
            Outcome::Deny => RequestOutcome::Forbidden,
            Outcome::Limited => RequestOutcome::Limited,
            Outcome::Allow | Outcome::Error if code.is_server_error() => RequestOutcome::Unanswered,
            Outcome::Allow | Outcome::Error => RequestOutcome::Bad,
        };
        self.metrics.request(outcome, Some(code));
    }

    fn end_span(&mut self, up: u64, down: u64) {
        let span = &mut self.span;
        if !span.is_sent() {
            return;
        }
        let bytes = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        if let Some(request) = self.facts.request.as_deref().filter(|request| request.is_resource) {
            let RequestInfo { verb, resource, subresource, .. } = request;
            let slash = if subresource.is_empty() { "" } else { "/" };
            span.name(format!("{verb} {resource}{slash}{subresource}"));
            span.set_text("k8s.namespace.name", &request.namespace);
        }
        span.set_text("http.request.method", self.facts.method.as_str());
        span.set_text("url.path", self.facts.uri.path());
        span.set_text("client.address", &self.facts.source);
        span.set("http.response.status_code", i64::from(self.facts.code));
        span.set("http.request.body.size", bytes(self.received_bytes.load(Ordering::Relaxed) + up));
        span.set("http.response.body.size", bytes(self.sent_bytes.load(Ordering::Relaxed) + down));
        if let Some(user) = &self.facts.user {
            span.set_text("user.name", &user.name);
        }
        if let Some(user) = &self.facts.impersonated {
            span.set_text("master_agent.impersonated", &user.name);
        }
        span.set("master_agent.request", self.facts.id.to_string());
        span.set_text("master_agent.rule", &self.facts.rule);
        match self.facts.code {
            0 => {}
            500.. => span.fail("5xx", "the request failed"),
            _ => span.settle(),
        }
    }

    /// Counts bytes of the response's body.
    pub(super) fn sent(&self, bytes: u64) {
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// As much of a request's target as a record keeps.
fn beginning(uri: &Uri) -> Uri {
    let (path, query) = (uri.path(), uri.query());
    let authority = uri.authority().map_or(0, |authority| authority.as_str().len());
    if authority + path.len() + query.map_or(0, str::len) <= KEPT {
        return uri.clone();
    }
    let first = |text: &str| text.chars().take(KEPT).collect::<String>();
    let kept = match query {
        Some(query) => Uri::try_from(format!("{}?{}", first(path), first(query))),
        None => Uri::try_from(first(path)),
    };
    kept.unwrap_or_default()
}

impl Drop for Recorder {
    fn drop(&mut self) {
        match self.facts.code {
            0 => self.metrics.request(RequestOutcome::Cancelled, None),
            _ if !self.lasting => self.metrics.short_request(self.facts.began.elapsed()),
            _ => {}
        }
        let (up, down) = (self.carried.up.load(Ordering::Relaxed), self.carried.down.load(Ordering::Relaxed));
        let (queue, room) = (self.queue(), self.room.take());
        let trace_id = self.span().map(|span| traces::ids(&span).0);
        let record = Record {
            received: self.facts.received,
            id: self.facts.id,
            source: &self.facts.source,
            user: self.facts.user.as_deref(),
            authenticator: self.facts.authenticator,
            impersonated: self.facts.impersonated.as_deref(),
            method: self.facts.method.as_str(),
            path: self.facts.uri.path(),
            query: self.facts.uri.query(),
            request: self.facts.request.as_deref(),
            outcome: self.facts.outcome,
            authorizer: self.facts.authorizer,
            rule: &self.facts.rule,
            code: self.facts.code,
            bytes_in: self.received_bytes.load(Ordering::Relaxed) + up,
            bytes_out: self.sent_bytes.load(Ordering::Relaxed) + down,
            duration: self.facts.began.elapsed(),
            node: self.facts.node.as_ref().map(NodeName::as_str),
            trace_id: trace_id.as_deref(),
        };
        self.audit.record(&record, queue, room);
        self.end_span(up, down);
    }
}
