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

/// Answers requests for proxy URLs.
pub trait ProxyUrls: Send + Sync {
    fn answer(self: Arc<Self>, request: ProxyUrlRequest) -> BoxFuture<'static, Proxied>;
}

/// One request, with what is known of its caller.
pub struct ProxyUrlRequest {
    pub caller: Caller,
    /// The caller's address.
    pub peer: IpAddr,
    /// That of the connection that the request came over.
    pub activity: Activity,
    pub request: Request<Incoming>,
}

/// What became of a request.
pub struct Proxied {
    /// The node whose tunnel the request went through, if it got so far.
    pub node: Option<NodeName>,
    /// The target's response, with an upgrade that is to be carried once the response has been sent.
    pub answer: Result<(Response<Body>, Option<Upgrade>), Failure>,
}
