//! The handler of calls home, which are HTTP/1.1 requests whose connection changes to [`UPGRADE`] and then is a link.
//!
//! The request's credential only admits the call: its user must be allowed to `create` the `link` or `join` of the
//! node, and a credential that belongs to a node is good for that node alone. As on the call-home port, the SSH
//! identity inside the link decides which node it is, and both identities must name the same node.

use access::authn::Validity;
use hyper::{
    Method, Response, StatusCode, Version,
    body::Body,
    header::{self, HeaderValue},
    upgrade::OnUpgrade,
};
use proto::call_home::UPGRADE;

use super::{
    handled::{Handled, Upgrade, empty},
    link::PendingLink,
    rejection::Rejection,
    stages::{Authorized, CallHomeRequest},
};
use crate::{front_end::connection::Connection, http::hop::Hop};

/// Answers with a change of protocols, after which the link begins.
pub(super) fn answer(
    connection: &Connection,
    call_home: CallHomeRequest,
    request: Authorized,
) -> Result<Handled, Rejection> {
    let Authorized { mut head, body, seat, .. } = request;
    let upgrade = head.extensions.remove::<OnUpgrade>();
    let requested = Hop::of(&head.headers)
        .upgrade
        .is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(UPGRADE.as_bytes()));
    let requested = requested && head.version == Version::HTTP_11 && head.method == Method::POST;
    let upgrade = upgrade.filter(|_| requested).ok_or(Rejection::NoLinkRequested)?;
    if !body.is_end_stream() {
        return Err(Rejection::CallHomeWithBody);
    }
    if connection.front_end.draining.is_cancelled() {
        return Err(Rejection::Stopping);
    }
    let mut response = Response::new(empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(UPGRADE));
    let CallHomeRequest { services, peer, purpose } = call_home;
    let link = PendingLink { services, peer, purpose, upgrade, seat };
    // The SSH certificates inside the link limit its duration, and the credential that admitted it does not.
    Ok(Handled::upgrade(response, Upgrade::Link(link), Validity::default()))
}
