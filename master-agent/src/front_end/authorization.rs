//! The authorization of requests, which depends on the connection that they arrive on.

use std::sync::Arc;

use access::{
    authn::Authenticated,
    authz::{Attributes, Verdict, impersonate::Impersonation},
    peer::Peer,
    request_info::RequestInfo,
    user::User,
};
use hyper::{StatusCode, http::request::Parts};

use super::{connection::Connection, recorder::Recorder};
use crate::http::status::StatusError;

impl Connection {
    /// Rejects the credential of a node that is presented through the tunnel of another node. Each node has its own
    /// credential and its own tunnel, so such a credential has been stolen.
    pub(super) fn reject_credential_of_other_node(
        &self,
        caller: &Authenticated,
        record: &mut Recorder,
    ) -> Result<(), StatusError> {
        let (Peer::Node { name, .. }, Some(node)) = (&self.peer, caller.user.node()) else { return Ok(()) };
        if node == name.as_str() {
            return Ok(());
        }
        let reason =
            format!("a credential of node {node:?} can't be used through the tunnel of node {name:?}");
        if let Some(times) = self.front_end.other_nodes.count(1) {
            let user = &caller.user.name;
            tracing::warn!(peer = %self.peer, user, reason, times, "refused a node's credential");
        }
        record.decided(&Verdict {
            allowed: false,
            authorizer: Some("tunnel"),
            rule: "not-its-own".to_owned(),
            reason: reason.clone(),
        });
        Err(StatusError::new(StatusCode::FORBIDDEN, format!("forbidden: {reason}")))
    }

    /// Authorizes a request, and returns the user on whose behalf it is passed on.
    pub(super) async fn authorize(
        &self,
        head: &Parts,
        caller: Authenticated,
        info: &RequestInfo,
        served_here: bool,
        record: &mut Recorder,
    ) -> Result<Arc<User>, StatusError> {
        let front_end = &self.front_end;
        let denied = |reason: String| StatusError::new(StatusCode::FORBIDDEN, format!("forbidden: {reason}"));
        let impersonation = Impersonation::requested(&head.headers)
            .map_err(|error| StatusError::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        let user = match impersonation {
            None => caller.user,
            Some(impersonation) => match impersonation.allowed(&caller.user, &front_end.authz).await {
                Ok(user) => {
                    let user = Arc::new(user);
                    record.impersonates(&user);
                    user
                }
                Err(verdict) => {
                    record.decided(&verdict);
                    return Err(denied(verdict.reason));
                }
            },
        };
        if served_here || front_end.authorize_everything {
            let verdict = front_end.authz.decide(&Attributes { user: &user, request: info }).await;
            record.decided(&verdict);
            if !verdict.allowed {
                return Err(denied(verdict.reason));
            }
        }
        Ok(user)
    }
}
