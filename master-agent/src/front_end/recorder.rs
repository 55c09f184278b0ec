//! What comes to be known of a request while it is served; its audit record is written at its end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use hyper::{Method, Request, StatusCode, Uri};
use proto::{NodeName, io::relay::Counters};

use super::{
    audit::{Audit, Outcome, Record, RequestId},
    authn::Authenticated,
    authz::Verdict,
    request_info::RequestInfo,
    server::Peer,
    user::User,
};

/// Dropping it writes the record: when the response has been passed on, or the caller has left.
pub struct Recorder {
    audit: Audit,
    pub id: RequestId,
    received: SystemTime,
    began: Instant,
    source: String,
    /// Whose tunnel the caller came through.
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
}

impl Recorder {
    pub fn new<B>(audit: Audit, peer: &Peer, request: &Request<B>) -> Self {
        Self {
            audit,
            id: RequestId::random(),
            received: SystemTime::now(),
            began: Instant::now(),
            source: peer.to_string(),
            node: match peer {
                Peer::Address(_) | Peer::Local(_) => None,
                Peer::Node { name, .. } => Some(name.clone()),
            },
            method: request.method().clone(),
            uri: request.uri().clone(),
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
        }
    }

    pub fn authenticated(&mut self, who: &Authenticated) {
        self.user = Some(who.user.clone());
        self.authenticator = Some(who.authenticator);
    }

    pub fn unauthenticated(&mut self) {
        self.outcome = Outcome::Unauthenticated;
    }

    pub fn limited(&mut self) {
        self.outcome = Outcome::Limited;
    }

    pub fn about(&mut self, request: &Arc<RequestInfo>) {
        self.request = Some(request.clone());
    }

    pub fn impersonates(&mut self, user: &Arc<User>) {
        self.impersonated = Some(user.clone());
    }

    pub fn decided(&mut self, verdict: &Verdict) {
        self.authorizer = verdict.authorizer;
        self.rule.clone_from(&verdict.rule);
        if !verdict.allowed {
            self.outcome = Outcome::Deny;
        }
    }

    /// The request goes on to who answers it.
    pub fn allowed(&mut self) {
        self.outcome = Outcome::Allow;
    }

    pub fn answered(&mut self, code: StatusCode) {
        self.code = code.as_u16();
    }

    /// Bytes of the response's body.
    pub fn sent(&self, bytes: u64) {
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let (up, down) = (self.carried.up.load(Ordering::Relaxed), self.carried.down.load(Ordering::Relaxed));
        self.audit.record(&Record {
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
        });
    }
}
