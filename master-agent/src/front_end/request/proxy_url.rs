//! The handler of proxy URLs, whose targets answer through a tunnel. A target learns nothing about the caller.

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
    // An unknown upgrade was not taken into account when the request was authorized, but the target might perform it.
    if hop.upgrade.is_none() && Hop::of(&head.headers).upgrade.is_some() {
        return Err(Rejection::UnknownUpgrade);
    }
    connection.front_end.identity.claims.remove(&mut head.headers);
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
