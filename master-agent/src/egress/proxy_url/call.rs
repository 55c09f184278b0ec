//! The egress listener of proxy URLs, and one connection that it has accepted.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use proto::NodeName;
use tokio_util::sync::CancellationToken;

use super::tls::TargetTls;
use crate::{
    directory::Directory,
    egress::door::Common,
    http::{claims::Claims, exchange::Upgrade, watched::Activity},
    stream::caller::Caller,
};

/// The egress listener.
pub struct ProxyUrls {
    pub common: Common,
    pub directory: Arc<dyn Directory>,
    pub tls: TargetTls,
    /// The identity headers that are removed from callers' requests to a target.
    pub claims: Arc<Claims>,
    /// How long a connection may wait for its next request, and a target for the next bytes of a request's body.
    pub idle_timeout: Duration,
    /// Set when connections are to end after the request that they are at.
    pub draining: CancellationToken,
}

/// One accepted connection.
pub(super) struct Call {
    pub door: Arc<ProxyUrls>,
    pub caller: Caller,
    pub entrance: Entrance,
    pub activity: Activity,
    /// Whose tunnel the request went through.
    pub node: OnceLock<NodeName>,
    pub upgrade: Mutex<Option<Upgrade>>,
}

impl Call {
    pub(super) fn upgrade_to(&self, upgrade: Upgrade) {
        *self.upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    }

    pub(super) fn refused(&self, error: &dyn std::fmt::Display) {
        self.door.common.bad_request(self.caller.door, &self.caller.origin, error);
    }
}

/// How a caller comes here.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entrance {
    Unix,
    Loopback(IpAddr),
    /// The front end, which has authenticated and authorized it.
    FrontEnd(IpAddr),
}

impl Entrance {
    pub(super) fn peer(self) -> Option<IpAddr> {
        match self {
            Self::Unix => None,
            Self::Loopback(peer) | Self::FrontEnd(peer) => Some(peer),
        }
    }

    /// Who comes here may open the socket's file.
    pub(super) fn is_unix(self) -> bool {
        matches!(self, Self::Unix)
    }

    pub(super) fn proto(self) -> &'static str {
        match self {
            Self::Unix | Self::Loopback(_) => "http",
            Self::FrontEnd(_) => "https",
        }
    }
}
