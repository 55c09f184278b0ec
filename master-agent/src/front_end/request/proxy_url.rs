//! Handler: a proxy URL, answered by its target through a tunnel. The target learns nothing of who asks.

use std::sync::Arc;

use hyper::Request;

use super::{
    handled::{Handled, Relay, Upgrade},
    rejection::Rejection,
    stages::Authorized,
};
use crate::{
    front_end::{
        answer::Content,
        connection::Connection,
        proxy_urls::{Proxied, ProxyUrlRequest, ProxyUrls},
        recorder::Recorder,
        server::LISTENER,
    },
    http::hop::Hop,
    stream::caller::Caller,
};

pub(super) async fn answer(
    connection: &Connection,
    proxy_urls: Arc<dyn ProxyUrls>,
    request: Authorized,
    record: &mut Recorder,
) -> Result<Handled, Rejection> {
    let Authorized { mut head, body, hop, seat, user, validity, .. } = request;
    // The request was authorized as what it is without the upgrade, which would then be made to the target alone.
    if hop.upgrade.is_none() && Hop::of(&head.headers).upgrade.is_some() {
        return Err(Rejection::UnknownUpgrade);
    }
    connection.front_end.introduction.claims.remove(&mut head.headers);
    record.inject(&mut head.headers);
    let caller = Caller { listener: LISTENER, origin: record.origin(&user), span: record.span() };
    let Proxied { node, answer } = proxy_urls
        .answer(ProxyUrlRequest {
            caller,
            peer: connection.peer.ip(),
            activity: connection.activity.clone(),
            request: Request::from_parts(head, body),
        })
        .await;
    if let Some(node) = node {
        record.through(node);
    }
    let (response, upgrade) = answer.map_err(Rejection::ProxyUrl)?;
    let response = response.map(Content::Target);
    Ok(match upgrade {
        None => Handled::response(response, seat, validity),
        Some(upgrade) => {
            Handled::upgrade(response, Upgrade::Relay(Relay::Target { upgrade, seat }), validity)
        }
    })
}
