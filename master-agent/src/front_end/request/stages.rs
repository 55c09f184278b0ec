//! A request as each phase leaves it. A later phase takes only the type of the phase before it.

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

/// The request's address is within its rate, and its head has one meaning.
pub(super) struct Admitted {
    pub head: Parts,
    pub body: Incoming,
}

/// The caller is known.
pub(super) struct Identified {
    pub head: Parts,
    pub body: Incoming,
    pub caller: Authenticated,
}

/// It is known what the request asks for, and who is to answer it.
pub(super) struct Resolved {
    pub head: Parts,
    pub body: Incoming,
    pub caller: Authenticated,
    pub info: Arc<RequestInfo>,
    /// What the request asks of its connection. An upgrade is one that kube-apiserver knows.
    pub hop: Hop,
    pub handler: Handler,
    /// The request may take as long as it likes.
    pub long_running: bool,
}

impl Resolved {
    /// Whether the exchange may outlast an ordinary request: an upgrade turns into a connection of any length.
    pub(super) fn may_last(&self) -> bool {
        self.long_running || self.hop.upgrade.is_some()
    }
}

/// The audit log has room for the request's record, and the request has a seat among those of its user.
pub(super) struct Reserved {
    pub request: Resolved,
    pub seat: RequestPermit,
}

/// The caller may do what it asks for. This is what a handler gets.
pub(super) struct Authorized {
    pub head: Parts,
    pub body: Incoming,
    pub info: Arc<RequestInfo>,
    pub hop: Hop,
    pub long_running: bool,
    pub seat: RequestPermit,
    /// Who authenticated, which is whose seat it is.
    pub caller: Arc<User>,
    /// On whose behalf the request is answered: the caller, or the user whom the caller impersonates.
    pub user: Arc<User>,
    /// How long the answer may go on. A short request may come to its end.
    pub validity: Validity,
}

/// Who answers a request.
pub(super) enum Handler {
    /// A node or a joining host whose connection becomes a link.
    CallHome(CallHomeRequest),
    /// What lies behind a proxy URL, reached through a tunnel.
    ProxyUrl(Arc<dyn ProxyUrls>),
    /// The agent's own page.
    Page(Arc<dyn Page>),
    /// kube-apiserver.
    Upstream,
}

/// A request to become a link, on the HTTPS port.
pub(super) struct CallHomeRequest {
    pub services: CallHomeServices,
    pub peer: SocketAddr,
    pub purpose: Purpose,
}
