//! What answers proxy URLs for the front end, which has authenticated and authorized the callers.

use std::{net::IpAddr, sync::Arc};

use futures_util::future::BoxFuture;
use hyper::{Request, Response, body::Incoming};
use proto::NodeName;

use crate::{
    http::{
        exchange::{Body, Upgrade},
        status::Failure,
        watched::Activity,
    },
    stream::caller::Caller,
};

/// A response, with an upgrade that is to be carried once it is on its way; and through whose tunnel it came.
pub type Answered = (Result<(Response<Body>, Option<Upgrade>), Failure>, Option<NodeName>);

/// Answers requests for proxy URLs.
pub trait ProxyUrls: Send + Sync {
    /// Answers one request of a `caller` at the address `peer`, on a connection with this `activity`.
    fn answer(
        self: Arc<Self>,
        caller: Caller,
        peer: IpAddr,
        activity: Activity,
        request: Request<Incoming>,
    ) -> BoxFuture<'static, Answered>;
}
