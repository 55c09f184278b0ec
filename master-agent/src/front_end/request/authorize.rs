//! Phase 5: decides whether the caller may do what it asks for, and on whose behalf the request goes on.
//!
//! kube-apiserver authorizes the requests that it answers itself. Requests that the front end answers are authorized
//! here, and so is every impersonation, since kube-apiserver does not learn of it.

use std::sync::Arc;

use access::{authn::Validity, authz::Verdict, request_info::RequestInfo, user::User};

use super::{
    join_token::{JOIN_TOKEN, NODE_NAME},
    rejection::Rejection,
    stages::{Authorized, CallHomeRequest, Handler, Reserved, Resolved},
};
use crate::{
    front_end::{connection::Connection, recorder::Recorder},
    tunnels::call_home::Purpose,
};

pub(super) async fn authorize(
    connection: &Connection,
    request: Reserved,
    record: &mut Recorder,
) -> Result<(Handler, Authorized), Rejection> {
    let Reserved { request, seat } = request;
    let may_last = request.may_last();
    let Resolved { head, body, mut caller, info, hop, handler, long_running } = request;
    let (authenticated, validity) = (caller.user.clone(), std::mem::take(&mut caller.validity));
    let joins = caller.authenticator == JOIN_TOKEN;
    let user = match &handler {
        Handler::CallHome(_) if joins => {
            record.decided(&joining());
            caller.user
        }
        Handler::CallHome(_) | Handler::ProxyUrl(_) | Handler::Page(_) => {
            let authorized = connection.authorize(&head, caller, &info, true, record).await;
            authorized.map_err(Rejection::NotAuthorized)?
        }
        Handler::Upstream => {
            let authorized = connection.authorize(&head, caller, &info, false, record).await;
            authorized.map_err(Rejection::NotAuthorized)?
        }
    };
    if let Handler::CallHome(call_home) = &handler
        && !(joins && call_home.purpose == Purpose::Join(None))
    {
        reject_other_node(call_home, &user, &info, record)?;
    }
    record.allowed();
    let validity = if may_last { validity } else { Validity::default() };
    let request =
        Authorized { head, body, info, hop, long_running, seat, caller: authenticated, user, validity };
    Ok((handler, request))
}

/// Returns the verdict for a caller with a join token, which always allows joining.
fn joining() -> Verdict {
    Verdict { allowed: true, authorizer: Some(JOIN_TOKEN), rule: "joining".to_owned(), reason: String::new() }
}

/// Rejects a call home whose credential belongs to another node than the one that the call names.
fn reject_other_node(
    call_home: &CallHomeRequest,
    user: &Arc<User>,
    info: &RequestInfo,
    record: &mut Recorder,
) -> Result<(), Rejection> {
    let Some(node) = node_of(user).filter(|node| *node != info.name) else { return Ok(()) };
    let reason = format!("a credential of node {node:?} can't call home as {:?}", info.name);
    tracing::warn!(peer = %call_home.peer, user = user.name, reason, "refused a call home");
    call_home.services.links.count_other_node(call_home.purpose.node(), &reason);
    record.decided(&Verdict {
        allowed: false,
        authorizer: Some("call-home"),
        rule: "not-its-own".to_owned(),
        reason: reason.clone(),
    });
    Err(Rejection::Forbidden(reason))
}

/// Returns the node to which a credential belongs, if it belongs to one.
fn node_of(user: &User) -> Option<&str> {
    user.node().or_else(|| user.extra.get(NODE_NAME)?.first().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_of_a_credential() {
        let user = |name: &str, groups: &[&str], node: Option<&str>| User {
            name: name.to_owned(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            extra: node.map(|n| (NODE_NAME.to_owned(), vec![n.to_owned()])).into_iter().collect(),
            ..User::default()
        };
        for (user, node) in [
            (user("system:node:n1", &["system:nodes"], None), Some("n1")),
            (user("system:node:n1", &[], None), None),
            (user("system:serviceaccount:a:b", &["system:serviceaccounts"], Some("n2")), Some("n2")),
            (user("system:bootstrap:abcdef", &["system:bootstrappers"], None), None),
        ] {
            assert_eq!(node_of(&user), node, "{user:?}");
        }
    }
}
