//! The recorder of a request, which collects what the front end learns about it and writes the audit record at its end.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use access::{
    authn::{Authenticated, AuthenticationFailure, FailureReason},
    authz::Verdict,
    peer::Peer,
    request_info::RequestInfo,
    user::{UNAUTHENTICATED, User},
};
use hyper::{HeaderMap, Method, Request, StatusCode, Uri, http::uri::PathAndQuery};
use opentelemetry::trace::SpanKind;
use proto::NodeName;
use proto_net::{dialer::Origin, relay::Counters};

use super::{
    audit::{Audit, Outcome, Queue, QueueFull, QueuePermit, Record, RequestId},
    counters::{Authentication, FrontEndMetrics, RequestOutcome},
};
use crate::traces::{self, Span, SpanContext};

/// The longest path or query that a recorder keeps in memory, in characters.
const MAX_KEPT: usize = 8 * 1024;

/// What the records of all requests of a connection have in common.
pub(super) struct ConnectionRecords {
    audit: Audit,
    metrics: Arc<FrontEndMetrics>,
    /// The caller, as records show it.
    source: String,
    /// The node through whose tunnel the caller comes.
    node: Option<NodeName>,
}

impl ConnectionRecords {
    pub(super) fn new(audit: Audit, metrics: Arc<FrontEndMetrics>, peer: &Peer) -> Self {
        let node = match peer {
            Peer::Address(_) | Peer::Local(_) => None,
            Peer::Node { name, .. } => Some(name.clone()),
        };
        Self { audit, metrics, source: peer.to_string(), node }
    }
}

/// Records one request. Dropping it, once the response has been sent or the caller has left, writes the audit record.
pub(super) struct Recorder {
    connection: Arc<ConnectionRecords>,
    facts: Facts,
    /// Whether the request is long-running, so that its duration says nothing about how fast it was served.
    long_running: bool,
    permit: Option<QueuePermit>,
    /// The number of bytes of the request's body so far, if it has one.
    received_bytes: OnceLock<Arc<AtomicU64>>,
    sent_bytes: AtomicU64,
    /// The numbers of bytes of the upgraded connection so far.
    pub carried: Counters,
    span: Span,
}

/// The facts that are known about the request so far.
#[derive(Clone)]
struct Facts {
    id: RequestId,
    received: SystemTime,
    began: Instant,
    /// The node whose tunnel the request went through.
    through: Option<NodeName>,
    method: Method,
    target: Option<PathAndQuery>,
    /// The span of which the request is part, according to its caller.
    parent: Option<SpanContext>,
    user: Option<Arc<User>>,
    authenticator: Option<&'static str>,
    impersonated: Option<Arc<User>>,
    request: Option<Arc<RequestInfo>>,
    outcome: Outcome,
    /// Whether the front end itself has rejected the request.
    rejected: bool,
    authorizer: Option<&'static str>,
    rule: String,
    /// The status of the answer, or 0 before there is one.
    code: u16,
}

impl Facts {
    fn of<B>(request: &Request<B>) -> Self {
        Self {
            id: RequestId::random(),
            received: SystemTime::now(),
            began: Instant::now(),
            through: None,
            method: request.method().clone(),
            target: truncated(request.uri()),
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

    /// Copies the target, which may be a small piece of a buffer with the headers of several requests. The record of a
    /// watch would otherwise keep the whole buffer in memory.
    fn detach_target(&mut self) {
        if let Some(target) = &mut self.target
            && let Ok(own) = PathAndQuery::try_from(target.as_str())
        {
            *target = own;
        }
    }
}

impl Recorder {
    pub(super) fn new<B>(connection: &Arc<ConnectionRecords>, request: &Request<B>) -> Self {
        Self::of(connection.clone(), Facts::of(request))
    }

    /// Returns the recorder of the link to which this request has led. It writes a record of its own.
    pub(super) fn for_link(&self) -> Self {
        let mut recorder = Self::of(self.connection.clone(), self.facts.clone());
        recorder.long_running = true;
        recorder
    }

    fn of(connection: Arc<ConnectionRecords>, facts: Facts) -> Self {
        Self {
            connection,
            facts,
            long_running: false,
            permit: None,
            received_bytes: OnceLock::new(),
            sent_bytes: AtomicU64::new(0),
            carried: Counters::default(),
            span: Span::default(),
        }
    }

    fn metrics(&self) -> &FrontEndMetrics {
        &self.connection.metrics
    }

    /// Returns the ID of the request in its record.
    pub(super) fn id(&self) -> RequestId {
        self.facts.id
    }

    /// Returns the counter of the bytes of the request's body.
    pub(super) fn received_bytes(&self) -> Arc<AtomicU64> {
        self.received_bytes.get_or_init(Arc::default).clone()
    }

    fn received(&self) -> u64 {
        self.received_bytes.get().map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }

    pub(super) fn authenticated(&mut self, who: &Authenticated) {
        self.metrics().authentication(who.authenticator, Authentication::Ok);
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

    /// Returns the span of which streams and requests that follow from this request are part.
    pub(super) fn span(&self) -> Option<SpanContext> {
        self.facts.user.as_ref()?;
        self.span.context().or(self.facts.parent.as_ref()).cloned()
    }

    /// Adds the trace context to the headers of the request that is passed on.
    pub(super) fn inject(&self, headers: &mut HeaderMap) {
        if let Some(span) = self.span.context() {
            traces::inject(span, headers);
        }
    }

    /// Returns the name of the caller in the records of streams that the request opens.
    pub(super) fn origin(&self, user: &User) -> Origin {
        let Self { connection, facts, .. } = self;
        Origin(format!("front-end request {} of {:?} from {}", facts.id, user.name, connection.source))
    }

    /// Counts the result of each authenticator for a caller whom none of them recognises.
    pub(super) fn unrecognized(&self, why: &AuthenticationFailure) {
        for (authenticator, reason) in why.by_authenticator() {
            let result = if matches!(reason, FailureReason::NotTried(_)) {
                Authentication::Limited
            } else if matches!(reason, FailureReason::Unavailable(_)) {
                Authentication::Unavailable
            } else {
                Authentication::Failed
            };
            self.metrics().authentication(authenticator, result);
        }
    }

    /// Reserves room for the record of a request that is to be served.
    pub(super) async fn reserve(&mut self, long_running: bool) -> Result<(), QueueFull> {
        self.long_running = long_running;
        if long_running {
            self.facts.detach_target();
        }
        let queue = if long_running { Queue::LongRunning } else { self.queue() };
        self.permit = self.connection.audit.reserve(queue).await?;
        Ok(())
    }

    /// Records that the request is rejected. `None` keeps the outcome that an earlier phase has recorded. The line is
    /// lost if the queue stays full, but the wait slows down callers that make many such requests.
    pub(super) async fn rejected(&mut self, outcome: Option<Outcome>) {
        self.facts.rejected = true;
        self.facts.outcome = outcome.unwrap_or(self.facts.outcome);
        if self.permit.is_none() {
            let reserved = self.connection.audit.reserve(self.queue()).await;
            self.permit = reserved.ok().flatten();
        }
    }

    fn queue(&self) -> Queue {
        match &self.facts.user {
            Some(user) if !user.in_group(UNAUTHENTICATED) => Queue::Authenticated,
            Some(_) | None => Queue::Unauthenticated,
        }
    }

    /// Records what the request asks for.
    pub(super) fn resolved(&mut self, request: &Arc<RequestInfo>) {
        // The audit line contains none of these fields, and the recorder stays in memory until the response ends.
        let RequestInfo { path, tail, field_selector, .. } = request.as_ref();
        self.facts.request = Some(match path.len() + tail.len() <= MAX_KEPT && field_selector.is_empty() {
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
        self.metrics().decision(verdict.authorizer, verdict.allowed);
        self.facts.authorizer = verdict.authorizer;
        self.facts.rule.clone_from(&verdict.rule);
        if !verdict.allowed {
            self.facts.outcome = Outcome::Deny;
        }
    }

    /// Records the node through whose tunnel the request went.
    pub(super) fn through(&mut self, node: NodeName) {
        self.facts.through = Some(node);
    }

    /// Records that the request goes on to its handler.
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
        self.metrics().request(outcome, Some(code));
    }

    fn end_span(&mut self, up: u64, down: u64) {
        if !self.span.is_sent() {
            return;
        }
        let received = self.received();
        let span = &mut self.span;
        let bytes = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        if let Some(request) = self.facts.request.as_deref().filter(|request| request.is_resource) {
            let RequestInfo { verb, resource, subresource, .. } = request;
            let slash = if subresource.is_empty() { "" } else { "/" };
            span.name(format!("{verb} {resource}{slash}{subresource}"));
            span.set_text("k8s.namespace.name", &request.namespace);
        }
        span.set_text("http.request.method", self.facts.method.as_str());
        span.set_text("url.path", self.facts.target.as_ref().map_or("", PathAndQuery::path));
        span.set_text("client.address", &self.connection.source);
        span.set("http.response.status_code", i64::from(self.facts.code));
        span.set("http.request.body.size", bytes(received + up));
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

/// Returns a request's target, truncated to what a recorder keeps.
fn truncated(uri: &Uri) -> Option<PathAndQuery> {
    let target = uri.path_and_query()?;
    if target.as_str().len() <= MAX_KEPT {
        return Some(target.clone());
    }
    let first = |text: &str| text.chars().take(MAX_KEPT).collect::<String>();
    let kept = match target.query() {
        Some(query) => format!("{}?{}", first(target.path()), first(query)),
        None => first(target.path()),
    };
    PathAndQuery::try_from(kept).ok()
}

impl Drop for Recorder {
    fn drop(&mut self) {
        match self.facts.code {
            0 => self.metrics().request(RequestOutcome::Cancelled, None),
            _ if !self.long_running => self.metrics().short_request(self.facts.began.elapsed()),
            _ => {}
        }
        let (up, down) = (self.carried.up.load(Ordering::Relaxed), self.carried.down.load(Ordering::Relaxed));
        let (queue, permit) = (self.queue(), self.permit.take());
        let trace_id = self.span().map(|span| traces::ids(&span).0);
        let record = Record {
            received: self.facts.received,
            id: self.facts.id,
            source: &self.connection.source,
            user: self.facts.user.as_deref(),
            authenticator: self.facts.authenticator,
            impersonated: self.facts.impersonated.as_deref(),
            method: self.facts.method.as_str(),
            path: self.facts.target.as_ref().map_or("", PathAndQuery::path),
            query: self.facts.target.as_ref().and_then(PathAndQuery::query),
            request: self.facts.request.as_deref(),
            outcome: self.facts.outcome,
            authorizer: self.facts.authorizer,
            rule: &self.facts.rule,
            code: self.facts.code,
            bytes_in: self.received() + up,
            bytes_out: self.sent_bytes.load(Ordering::Relaxed) + down,
            duration: self.facts.began.elapsed(),
            node: self.facts.through.as_ref().or(self.connection.node.as_ref()).map(NodeName::as_str),
            trace_id: trace_id.as_deref(),
        };
        self.connection.audit.record(&record, queue, permit);
        self.end_span(up, down);
    }
}
