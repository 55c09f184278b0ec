//! The handler of requests that kube-apiserver answers. Headers tell it on whose behalf the request is made.

use std::time::Duration;

use access::authn::Validity;
use hyper::{Request, Response, StatusCode, Version, body::Body, upgrade::OnUpgrade};

use super::{
    handled::{Handled, Relay, Upgrade, empty},
    rejection::Rejection,
    stages::Authorized,
};
use crate::front_end::{
    answer::Content,
    connection::Connection,
    headers,
    limits::RequestPermit,
    recorder::Recorder,
    upstream::{BodyError, RequestBody, ResponseBody, UpstreamError},
};

pub(super) async fn answer(
    connection: &Connection,
    request: Authorized,
    record: &Recorder,
) -> Result<Handled, Rejection> {
    let front_end = &connection.front_end;
    let Authorized { mut head, body, info, hop, long_running, mut seat, caller, user, validity } = request;
    let identity = connection.identity_lines(&user)?;
    front_end.identity.rewrite(&mut head.headers, &hop, &identity);
    record.inject(&mut head.headers);
    head.version = Version::HTTP_11;
    let limits = front_end.body_limits();
    if body.size_hint().lower() > limits.max_bytes {
        return Err(Rejection::Body(BodyError::TooLarge));
    }
    let upgrade = head.extensions.remove::<OnUpgrade>().filter(|_| hop.upgrade.is_some());
    head.extensions.clear();
    let body = RequestBody::new(body, limits, || record.received_bytes());
    let request = Request::from_parts(head, body);
    let timeout = if long_running { validity.left() } else { Some(front_end.config.request_timeout) };
    let way = match &hop.upgrade {
        Some(_) => Way::Upgrade,
        None if long_running && info.verb != "watch" => Way::Alone,
        None => Way::Shared,
    };
    let mut response = send(connection, request, way, timeout).await?;
    seat.answered();

    let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    headers::response(response.headers_mut(), upgraded);
    *response.version_mut() = Version::HTTP_11;
    if !upgraded {
        // A refused upgrade becomes a short request.
        let validity = if long_running { validity } else { Validity::default() };
        return Ok(Handled::response(response.map(Content::Relayed), seat, validity));
    }
    let upgrade = upgrade.ok_or(Rejection::UnrequestedUpgrade)?;
    let seat = front_end.limits.upgraded(seat, &caller.name).map_err(Rejection::TooMany)?;
    Ok(switch(connection, upgrade, response, seat, validity))
}

/// The connection to kube-apiserver that a request takes.
enum Way {
    /// A connection that it may share with others: kube-apiserver writes the response itself.
    Shared,
    /// A connection of its own: kube-apiserver passes the response of another server on, or a log.
    Alone,
    /// A connection that may change its protocol.
    Upgrade,
}

/// Sends the request, and waits for the head of the response for at most `timeout`.
async fn send(
    connection: &Connection,
    request: Request<RequestBody>,
    way: Way,
    timeout: Option<Duration>,
) -> Result<Response<ResponseBody>, Rejection> {
    let upstream = &connection.front_end.upstream;
    let exchange = async {
        match way {
            Way::Shared => upstream.send(request).await,
            Way::Alone => upstream.send_alone(request).await,
            Way::Upgrade => upstream.upgrade(request).await,
        }
    };
    let exchanged = match timeout {
        None => exchange.await,
        Some(timeout) => {
            tokio::time::timeout(timeout, exchange).await.map_err(|_| Rejection::UpstreamTimedOut)?
        }
    };
    exchanged.map_err(|error| {
        match &error {
            // The caller is at fault.
            UpstreamError::Body(_) => {}
            UpstreamError::Unreachable(_) | UpstreamError::Broken(_) => {
                tracing::warn!(%error, "kube-apiserver gave no answer");
            }
        }
        Rejection::from(error)
    })
}

/// Upgrades the connection, which kube-apiserver has agreed to.
fn switch(
    connection: &Connection,
    caller: OnUpgrade,
    mut response: Response<ResponseBody>,
    seat: RequestPermit,
    validity: Validity,
) -> Handled {
    let server = hyper::upgrade::on(&mut response);
    let half_closed_timeout = connection.front_end.config.half_closed_timeout;
    let (head, body) = response.into_parts();
    let relay = Relay::Upstream { caller, server, lease: body.into_lease(), seat, half_closed_timeout };
    Handled::upgrade(Response::from_parts(head, empty()), Upgrade::Relay(relay), validity)
}
