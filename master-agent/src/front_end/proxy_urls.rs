//! The service that answers proxy URLs for the front end, which has authenticated and authorized their callers before.

use std::{net::IpAddr, sync::Arc};

use futures_util::future::BoxFuture;
use hyper::{Request, Response, body::Incoming};
use proto::NodeName;

use crate::{
    http::{
        exchange::{Body, Upgrade},
        status::StatusError,
        watched::Activity,
    },
    stream::caller::Caller,
};

/// Answers requests for proxy URLs.
pub trait ProxyUrls: Send + Sync {
    fn answer(self: Arc<Self>, request: ProxyUrlRequest) -> BoxFuture<'static, Proxied>;
}

/// A request for a proxy URL and its caller.
pub struct ProxyUrlRequest {
    pub caller: Caller,
    /// The caller's address.
    pub peer: IpAddr,
    /// The activity of the connection over which the request came.
    pub activity: Activity,
    pub request: Request<Incoming>,
}

/// The result of a request for a proxy URL.
pub struct Proxied {
    /// The node through whose tunnel the request went, if it went through one.
    pub node: Option<NodeName>,
    /// The target's response, with the upgrade that begins once the response has been sent.
    pub answer: Result<(Response<Body>, Option<Upgrade>), StatusError>,
}
