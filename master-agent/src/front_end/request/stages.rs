//! The types in which the phases pass a request on. Each phase takes only the type of the previous phase.

use std::{net::SocketAddr, sync::Arc};

use access::{
    authn::{Authenticated, Validity},
    request_info::RequestInfo,
    user::User,
};
use hyper::{body::Incoming, http::request::Parts};

use crate::{
    front_end::{call_home::CallHomeServices, limits::RequestPermit, page::Page, proxy_urls::ProxyUrls},
    http::hop::Hop,
    tunnels::call_home::Purpose,
};

/// A request whose address is within its rate, and whose head is unambiguous.
pub(super) struct Admitted {
    pub head: Parts,
    pub body: Incoming,
}

/// A request whose caller is known.
pub(super) struct Identified {
    pub head: Parts,
    pub body: Incoming,
    pub caller: Authenticated,
}

/// A request of which it is known what it asks for, and which has a handler.
pub(super) struct Resolved {
    pub head: Parts,
    pub body: Incoming,
    pub caller: Authenticated,
    pub info: Arc<RequestInfo>,
    /// The hop-by-hop part of the head. An upgrade in it is one that kube-apiserver supports.
    pub hop: Hop,
    pub handler: Handler,
    /// Whether the request may take any time.
    pub long_running: bool,
}

impl Resolved {
    /// Whether the exchange may outlast a short request. An upgraded connection may take any time.
    pub(super) fn may_last(&self) -> bool {
        self.long_running || self.hop.upgrade.is_some()
    }
}

/// A request with room for its audit record, and with one of its user's seats.
pub(super) struct Reserved {
    pub request: Resolved,
    pub seat: RequestPermit,
}

/// An authorized request, which goes to its handler.
pub(super) struct Authorized {
    pub head: Parts,
    pub body: Incoming,
    pub info: Arc<RequestInfo>,
    pub hop: Hop,
    pub long_running: bool,
    pub seat: RequestPermit,
    /// The user who has authenticated, to whom the seat belongs.
    pub caller: Arc<User>,
    /// The user on whose behalf the request is answered: the caller, or the user whom the caller impersonates.
    pub user: Arc<User>,
    /// How long the answer may last. It is unlimited for a short request.
    pub validity: Validity,
}

/// The handler of a request.
pub(super) enum Handler {
    /// The connection becomes the link of a node or a joining host.
    CallHome(CallHomeRequest),
    /// The target of a proxy URL answers through a tunnel.
    ProxyUrl(Arc<dyn ProxyUrls>),
    /// The agent's own page answers.
    Page(Arc<dyn Page>),
    /// kube-apiserver answers.
    Upstream,
}

/// A request to the HTTPS port that asks to become a link.
pub(super) struct CallHomeRequest {
    pub services: CallHomeServices,
    pub peer: SocketAddr,
    pub purpose: Purpose,
}
