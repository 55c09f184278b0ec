//! The handler of calls home, which are HTTP/1.1 requests whose connection changes to [`UPGRADE`] and then is a link.
//!
//! The request's credential only admits the call: its user must be allowed to `create` the `link` or `join` of the
//! node, and a credential that belongs to a node is good for that node alone. As on the call-home port, the SSH
//! identity inside the link decides which node it is, and both identities must name the same node.

use access::{
    authn::{Authenticated, Validity},
    authz::Verdict,
    request_info::RequestInfo,
    user::User,
};
use hyper::{
    Method, Response, StatusCode, Version,
    header::{self, HeaderValue},
    http::request::Parts,
    upgrade::OnUpgrade,
};
use proto::{call_home::UPGRADE, refusal::whole_seconds};

use super::{
    handled::{Handled, Upgrade, empty},
    join_token::{JOIN_TOKEN, NODE_NAME},
    link::PendingLink,
    rejection::Rejection,
    stages::{Authorized, CallHomeRequest},
};
use crate::{
    front_end::{connection::Connection, recorder::Recorder},
    http::hop::Hop,
    tunnels::call_home::Purpose,
};

/// Answers with a change of protocols, after which the link begins.
pub(super) fn answer(
    connection: &Connection,
    call_home: CallHomeRequest,
    request: Authorized,
) -> Result<Handled, Rejection> {
    let Authorized { mut head, seat, .. } = request;
    let upgrade = head.extensions.remove::<OnUpgrade>().ok_or(Rejection::NoLinkRequested)?;
    if connection.generation.draining.is_cancelled() {
        return Err(Rejection::Stopping);
    }
    let CallHomeRequest { services, peer, purpose } = call_home;
    if let Some(after) = services.links.turn_away(peer, &purpose) {
        return Err(Rejection::TooManyCalls(whole_seconds(after)));
    }
    let mut response = Response::new(empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(UPGRADE));
    let link = PendingLink { services, peer, purpose, upgrade, seat };
    // The SSH certificates inside the link limit its duration, and the credential that admitted it does not.
    Ok(Handled::upgrade(response, Upgrade::Link(link), Validity::default()))
}

/// Whether a request asks for its connection to become a link.
pub(super) fn asks_for_link(head: &Parts) -> bool {
    let upgrade = || Hop::of(&head.headers).upgrade;
    head.version == Version::HTTP_11
        && head.method == Method::POST
        && upgrade().is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(UPGRADE.as_bytes()))
}

/// Rejects a call home that names another node than the one to which its credential belongs.
pub(super) fn reject_caller_of_other_node(
    connection: &Connection,
    call_home: &CallHomeRequest,
    caller: &Authenticated,
    info: &RequestInfo,
    record: &mut Recorder,
) -> Result<(), Rejection> {
    // The name of a joining host may be left to its token.
    if caller.authenticator == JOIN_TOKEN && call_home.purpose == Purpose::Join(None) {
        return Ok(());
    }
    reject_other_node(connection, call_home, &caller.user, info, record)
}

/// Rejects a call home that names another node than the one that its user is or runs on.
pub(super) fn reject_other_node(
    connection: &Connection,
    call_home: &CallHomeRequest,
    user: &User,
    info: &RequestInfo,
    record: &mut Recorder,
) -> Result<(), Rejection> {
    let Some(node) = node_of(user).filter(|node| *node != info.name) else { return Ok(()) };
    let reason = format!("a credential of node {node:?} can't call home as {:?}", info.name);
    if let Some(times) = connection.front_end.other_nodes.count(1) {
        tracing::warn!(peer = %call_home.peer, user = user.name, reason, times, "refused a call home");
    }
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
pub(super) fn node_of(user: &User) -> Option<&str> {
    user.node().or_else(|| user.extra.get(NODE_NAME)?.first().map(String::as_str))
}

/// Returns the name under which limits count the links of a node. Many nodes may share one user, and each of them has
/// limits of its own. The caller chooses the node's name, so this is for callers to whom the name belongs, or who are
/// authorized for it.
pub(super) fn limited_as(user: &User, info: &RequestInfo) -> String {
    format!("{} calling home as {}", user.name, info.name)
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

    #[test]
    fn only_a_post_over_http_1_1_with_the_upgrade_asks_for_a_link() {
        let (both, upgrade) = (&["connection", "upgrade"][..], &["upgrade"][..]);
        for (method, version, headers, protocol, asks) in [
            (Method::POST, Version::HTTP_11, both, UPGRADE, true),
            (Method::POST, Version::HTTP_11, both, "Master-Agent-Link", true),
            (Method::POST, Version::HTTP_11, both, "websocket", false),
            (Method::POST, Version::HTTP_11, upgrade, UPGRADE, false),
            (Method::POST, Version::HTTP_2, both, UPGRADE, false),
            (Method::GET, Version::HTTP_11, both, UPGRADE, false),
            (Method::PUT, Version::HTTP_11, both, UPGRADE, false),
        ] {
            let request = hyper::Request::builder().method(&method).version(version);
            let request = headers.iter().fold(request, |request, name| match *name {
                "upgrade" => request.header("upgrade", protocol),
                name => request.header(name, "keep-alive, Upgrade"),
            });
            let (head, ()) = request.body(()).unwrap().into_parts();
            assert_eq!(asks_for_link(&head), asks, "{method} {version:?} {headers:?} {protocol}");
        }
    }
}
