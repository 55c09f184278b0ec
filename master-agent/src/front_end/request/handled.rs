//! The result of a handler: the response, and the resources and upgrades that outlast its head.

use std::{future::poll_fn, pin::Pin, time::Duration};

use access::authn::Validity;
use http_body_util::Full;
use hyper::{Response, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use proto_net::relay::relay_until;

use super::{link::PendingLink, rejection::Rejection};
use crate::{
    front_end::{answer::Content, limits::RequestPermit, recorder::Recorder, upstream::Lease},
    http::{exchange, status::StatusError},
};

/// The result of a handler.
pub(super) struct Handled {
    pub response: Response<Content>,
    /// The request's seat, which is kept until the last byte of the response has been sent.
    pub seat: Option<RequestPermit>,
    /// How long the response or the upgraded connection may last.
    pub validity: Validity,
    pub upgrade: Option<Upgrade>,
}

impl Handled {
    /// Creates the result of a request that does not upgrade its connection.
    pub(super) fn response(response: Response<Content>, seat: RequestPermit, validity: Validity) -> Self {
        Self { response, seat: Some(seat), validity, upgrade: None }
    }

    /// Creates the result of a request that upgrades its connection. The upgraded connection keeps the seat.
    pub(super) fn upgrade(response: Response<Content>, upgrade: Upgrade, validity: Validity) -> Self {
        Self { response, seat: None, validity, upgrade: Some(upgrade) }
    }
}

impl From<Rejection> for Handled {
    fn from(rejection: Rejection) -> Self {
        let response = StatusError::from(rejection).response().map(Content::Own);
        Self { response, seat: None, validity: Validity::default(), upgrade: None }
    }
}

/// The use of an upgraded connection.
pub(super) enum Upgrade {
    /// The connection carries raw bytes to and from kube-apiserver or the target of a proxy URL.
    Relay(Relay),
    /// The connection is the link of a node or a joining host.
    Link(PendingLink),
}

/// A relay of raw bytes between the caller and the other end.
pub(super) enum Relay {
    Upstream {
        caller: OnUpgrade,
        server: OnUpgrade,
        lease: Lease,
        seat: RequestPermit,
        half_closed_timeout: Duration,
    },
    Target {
        upgrade: exchange::Upgrade,
        seat: RequestPermit,
    },
}

impl Relay {
    /// Relays until both directions have ended, or `expired` completes.
    pub(super) async fn run(self, record: &Recorder, expired: impl Future<Output = ()>) {
        match self {
            Self::Upstream { caller, mut server, mut lease, half_closed_timeout, seat: _seat } => {
                // The connection to kube-apiserver has no task of its own, so it is driven here until it is handed
                // over.
                let server = poll_fn(|cx| {
                    lease.drive(cx);
                    Pin::new(&mut server).poll(cx)
                });
                let (Ok(server), Ok(caller)) = (server.await, caller.await) else { return };
                let (caller, server) = (TokioIo::new(caller), TokioIo::new(server));
                let counters = &record.carried;
                let relayed = relay_until(caller, server, counters, half_closed_timeout, expired).await;
                if let Err(error) = relayed {
                    tracing::debug!(%error, "upgraded connection failed");
                }
            }
            Self::Target { upgrade, seat: _seat } => upgrade.carry(&record.carried, expired).await,
        }
    }
}

/// Returns an empty body.
pub(super) fn empty() -> Content {
    Content::Own(Full::default())
}
