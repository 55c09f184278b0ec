//! The identification of callers that no authenticator can recognise: hosts that join with a join token, and nodes that
//! call home while their credential can't be checked.

use std::sync::Arc;

use access::{
    authn::{self, Authenticated, Guard, Presented, Validity},
    user::User,
};
use hyper::http::request::Parts;
use proto::join::Admission;

use super::rejection::Rejection;
use crate::{
    front_end::{connection::Connection, limits::too_many},
    identity::store::TokenError,
};

/// The name in audit records, in place of an authenticator's.
pub(super) const JOIN_TOKEN: &str = "join-token";
/// The key of the extra value that names the node to which a token, or the pod of a token, is bound.
pub(super) const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Identifies a host that joins with a join token. Returns `None` for every other request. The token is not used up.
pub(super) async fn identify(
    connection: &Connection,
    head: &Parts,
) -> Result<Option<Authenticated>, Rejection> {
    let Some(services) = connection.front_end.call_home().filter(|_| is_path_of("join", head.uri.path()))
    else {
        return Ok(None);
    };
    // The authenticators report the fault of a malformed credential.
    let Ok(presented) = Presented::of(head, &connection.certificates) else { return Ok(None) };
    let admission = presented.bearer.as_ref().map(|bearer| Admission::parse(bearer.expose()));
    let Some(Ok(admission)) = admission else { return Ok(None) };
    let attempt = connection.front_end.limits.attempt(&connection.peer);
    attempt.pass().map_err(|after| Rejection::TooMany(too_many(after)))?;
    let id = admission.id.clone();
    match services.join_tokens.check(admission).await {
        Ok(bound) => {
            attempt.forgive();
            let mut user = User { name: format!("master-agent:join-token:{id}"), ..User::default() };
            user.extra.extend(bound.map(|node| (NODE_NAME.to_owned(), vec![node.to_string()])));
            Ok(Some(Authenticated {
                user: Arc::new(user),
                authenticator: JOIN_TOKEN,
                validity: Validity::default(),
            }))
        }
        Err(TokenError::Store(error)) => {
            attempt.forgive();
            tracing::error!(error, "join tokens can't be checked");
            Err(Rejection::CredentialUnchecked("join token"))
        }
        Err(error) => {
            attempt.fail().map_err(|exceeded| Rejection::TooMany(exceeded.into()))?;
            tracing::info!(peer = %connection.peer, %error, "joining host not recognized");
            Err(Rejection::Unauthenticated)
        }
    }
}

/// Identifies a node that calls home while the API server can't be asked whether the node's credential was withdrawn.
/// The API server may be reachable only through the tunnel that this call establishes. The SSH identity inside the link
/// still decides. A joining host has no such identity yet, so its credential must be checked, which needs no API server
/// if it is a join token.
pub(super) fn link_unchecked(
    connection: &Connection,
    head: &Parts,
    why: &authn::AuthenticationFailure,
) -> Option<Authenticated> {
    let caller = why.unchecked()?;
    if connection.front_end.call_home().is_none() || !is_path_of("link", head.uri.path()) {
        return None;
    }
    let user = &caller.user.name;
    tracing::info!(peer = %connection.peer, user, reason = %why, "a node may link by its SSH identity alone");
    Some(caller.clone())
}

/// Whether a path, as the caller sent it, is this subresource of a node. The subresource is `link` or `join`.
fn is_path_of(subresource: &str, path: &str) -> bool {
    let rest = path.strip_prefix("/apis/master-agent/v1/nodes/");
    let Some((node, last)) = rest.and_then(|rest| rest.split_once('/')) else { return false };
    last == subresource && !node.is_empty() && !node.contains('%')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_one_node_and_its_subresource() {
        for (path, joins) in [
            ("/apis/master-agent/v1/nodes/n1/join", true),
            ("/apis/master-agent/v1/nodes/-/join", true),
            ("/apis/master-agent/v1/nodes/n1/link", false),
            ("/apis/master-agent/v1/nodes//join", false),
            ("/apis/master-agent/v1/nodes/a/b/join", false),
            ("/apis/master-agent/v1/nodes/a%2Fb/join", false),
            ("/apis/master-agent/v1/nodes/n1/join/", false),
            ("/api/v1/nodes/n1/join", false),
        ] {
            assert_eq!(is_path_of("join", path), joins, "{path}");
        }
        assert!(is_path_of("link", "/apis/master-agent/v1/nodes/n1/link"));
        assert!(!is_path_of("link", "/apis/master-agent/v1/nodes/a/b/link"));
    }
}
