//! What comes to be known of a request while it is served; its audit record is written at its end.

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
use proto_net::relay::Counters;

use super::{
    audit::{Audit, Full, Outcome, Queue, Record, RequestId, Room},
    counters::{Authentication, FrontEndMetrics, RequestOutcome},
    limits::Limits,
};
use crate::{
    http::status,
    traces::{self, Span, SpanContext},
};

/// Characters.
const KEPT: usize = 8 * 1024;

/// Dropping it writes the record: when the response has been passed on, or the caller has left.
pub(super) struct Recorder {
    audit: Audit,
    metrics: Arc<FrontEndMetrics>,
    /// It has been answered by this front end itself, as it can't be served.
    failed: bool,
    /// It is not to be measured by how long it takes.
    lasting: bool,
    room: Option<Room>,
    pub id: RequestId,
    received: SystemTime,
    began: Instant,
    source: String,
    /// Whose tunnel the caller came through, or the request went through.
    node: Option<NodeName>,
    method: Method,
    uri: Uri,
    user: Option<Arc<User>>,
    authenticator: Option<&'static str>,
    impersonated: Option<Arc<User>>,
    request: Option<Arc<RequestInfo>>,
    outcome: Outcome,
    authorizer: Option<&'static str>,
    rule: String,
    code: u16,
    /// Bytes of the request's body.
    pub received_bytes: Arc<AtomicU64>,
    sent_bytes: AtomicU64,
    /// Of an upgraded connection.
    pub carried: Counters,
    /// What the request is part of, as its caller says.
    parent: Option<SpanContext>,
    span: Span,
}

impl Recorder {
    pub(super) fn new<B>(
        audit: Audit,
        metrics: Arc<FrontEndMetrics>,
        peer: &Peer,
        request: &Request<B>,
    ) -> Self {
        Self {
            audit,
            metrics,
            failed: false,
            lasting: false,
            room: None,
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
            user: None,
            authenticator: None,
            impersonated: None,
            request: None,
            outcome: Outcome::Error,
            authorizer: None,
            rule: String::new(),
            code: 0,
            received_bytes: Arc::default(),
            sent_bytes: AtomicU64::new(0),
            carried: Counters::default(),
            parent: traces::parent(request.headers()),
            span: Span::default(),
        }
    }

    /// One more record of the same request, for what it led to.
    pub(super) fn again(&self) -> Self {
        Self {
            audit: self.audit.clone(),
            metrics: self.metrics.clone(),
            failed: self.failed,
            lasting: true,
            room: None,
            id: self.id,
            received: self.received,
            began: self.began,
            source: self.source.clone(),
            node: self.node.clone(),
            method: self.method.clone(),
            uri: self.uri.clone(),
            user: self.user.clone(),
            authenticator: self.authenticator,
            impersonated: self.impersonated.clone(),
            request: self.request.clone(),
            outcome: self.outcome,
            authorizer: self.authorizer,
            rule: self.rule.clone(),
            code: self.code,
            received_bytes: Arc::default(),
            sent_bytes: AtomicU64::new(0),
            carried: Counters::default(),
            parent: self.parent.clone(),
            span: Span::default(),
        }
    }

    pub(super) fn authenticated(&mut self, who: &Authenticated) {
        self.metrics.authentication(who.authenticator, Authentication::Ok);
        self.user = Some(who.user.clone());
        self.authenticator = Some(who.authenticator);
        // Nobody else has a part in traces.
        if self.queue() == Queue::Known {
            let name = || self.method.to_string();
            self.span = Span::start(SpanKind::Server, self.parent.as_ref(), self.received, name);
        } else {
            self.parent = None;
        }
    }

    /// What the request leads to is part of this.
    pub(super) fn span(&self) -> Option<SpanContext> {
        self.user.as_ref()?;
        self.span.context().or(self.parent.as_ref()).cloned()
    }

    /// Says so to whoever answers the request.
    pub(super) fn inject(&self, headers: &mut HeaderMap) {
        if let Some(span) = self.span.context() {
            traces::inject(span, headers);
        }
    }

    /// Nobody recognises the caller.
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

    pub(super) fn unauthenticated(&mut self) {
        self.outcome = Outcome::Unauthenticated;
    }

    /// Makes sure that there will be room for the record of a request that is to be served.
    pub(super) async fn reserve(&mut self, lasting: bool) -> Result<(), Full> {
        self.lasting = lasting;
        let queue = if lasting { Queue::Lasting } else { self.queue() };
        self.room = self.audit.room(queue).await?;
        Ok(())
    }

    /// The same for a request that is to be answered: what can't be recorded is not served.
    pub(super) async fn reserve_or_refuse(
        &mut self,
        lasting: bool,
        limits: &Limits,
    ) -> Result<(), status::Failure> {
        let Err(Full) = self.reserve(lasting).await else { return Ok(()) };
        limits.count("audit");
        self.limited();
        let message = "the request can't be recorded at the moment";
        Err(status::Failure::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(1))
    }

    /// Of a request that is not served: its line is lost if there is no room, but whoever makes many is slowed down.
    pub(super) async fn refused(&mut self) {
        self.failed = true;
        if self.room.is_none() {
            self.room = self.audit.room(self.queue()).await.ok().flatten();
        }
    }

    fn queue(&self) -> Queue {
        match &self.user {
            Some(user) if !user.in_group(UNAUTHENTICATED) => Queue::Known,
            Some(_) | None => Queue::Strangers,
        }
    }

    pub(super) fn limited(&mut self) {
        self.outcome = Outcome::Limited;
    }

    pub(super) fn about(&mut self, request: &Arc<RequestInfo>) {
        // A record is kept for as long as its response, and tells nothing of these.
        let RequestInfo { path, tail, field_selector, .. } = request.as_ref();
        self.request = Some(match path.len() + tail.len() <= KEPT && field_selector.is_empty() {
            true => request.clone(),
            false => {
                let (path, tail, field_selector) = Default::default();
                Arc::new(RequestInfo { path, tail, field_selector, ..RequestInfo::clone(request) })
            }
        });
    }

    pub(super) fn impersonates(&mut self, user: &Arc<User>) {
        self.impersonated = Some(user.clone());
    }

    pub(super) fn decided(&mut self, verdict: &Verdict) {
        self.metrics.decision(verdict.authorizer, verdict.allowed);
        self.authorizer = verdict.authorizer;
        self.rule.clone_from(&verdict.rule);
        if !verdict.allowed {
            self.outcome = Outcome::Deny;
        }
    }

    /// The request was answered at the end of a node's tunnel.
    pub(super) fn through(&mut self, node: NodeName) {
        self.node = Some(node);
    }

    /// The request goes on to who answers it.
    pub(super) fn allowed(&mut self) {
        self.outcome = Outcome::Allow;
    }

    pub(super) fn answered(&mut self, code: StatusCode) {
        self.code = code.as_u16();
        let outcome = match self.outcome {
            Outcome::Allow if !self.failed => RequestOutcome::Served,
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
        if let Some(request) = self.request.as_deref().filter(|request| request.is_resource) {
            let RequestInfo { verb, resource, subresource, .. } = request;
            let slash = if subresource.is_empty() { "" } else { "/" };
            span.name(format!("{verb} {resource}{slash}{subresource}"));
            span.set_text("k8s.namespace.name", &request.namespace);
        }
        span.set_text("http.request.method", self.method.as_str());
        span.set_text("url.path", self.uri.path());
        span.set_text("client.address", &self.source);
        span.set("http.response.status_code", i64::from(self.code));
        span.set("http.request.body.size", bytes(self.received_bytes.load(Ordering::Relaxed) + up));
        span.set("http.response.body.size", bytes(self.sent_bytes.load(Ordering::Relaxed) + down));
        if let Some(user) = &self.user {
            span.set_text("user.name", &user.name);
        }
        if let Some(user) = &self.impersonated {
            span.set_text("master_agent.impersonated", &user.name);
        }
        span.set("master_agent.request", self.id.to_string());
        span.set_text("master_agent.rule", &self.rule);
        match self.code {
            0 => {}
            500.. => span.fail("5xx", "the request failed"),
            _ => span.settle(),
        }
    }

    /// Bytes of the response's body.
    pub(super) fn sent(&self, bytes: u64) {
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// As much of a path and a query as a record keeps for as long as its response.
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
        match self.code {
            0 => self.metrics.request(RequestOutcome::Cancelled, None),
            _ if !self.lasting => self.metrics.short_request(self.began.elapsed()),
            _ => {}
        }
        let (up, down) = (self.carried.up.load(Ordering::Relaxed), self.carried.down.load(Ordering::Relaxed));
        let (queue, room) = (self.queue(), self.room.take());
        let trace_id = self.span().map(|span| traces::ids(&span).0);
        let record = Record {
            received: self.received,
            id: self.id,
            source: &self.source,
            user: self.user.as_deref(),
            authenticator: self.authenticator,
            impersonated: self.impersonated.as_deref(),
            method: self.method.as_str(),
            path: self.uri.path(),
            query: self.uri.query(),
            request: self.request.as_deref(),
            outcome: self.outcome,
            authorizer: self.authorizer,
            rule: &self.rule,
            code: self.code,
            bytes_in: self.received_bytes.load(Ordering::Relaxed) + up,
            bytes_out: self.sent_bytes.load(Ordering::Relaxed) + down,
            duration: self.began.elapsed(),
            node: self.node.as_ref().map(NodeName::as_str),
            // The records of streams have the request's id in their origin.
            stream: None,
            trace_id: trace_id.as_deref(),
        };
        self.audit.record(&record, queue, room);
        self.end_span(up, down);
    }
}
