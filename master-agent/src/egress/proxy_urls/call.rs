//! The egress listener of proxy URLs, and a connection that it has accepted.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use proto::NodeName;

use super::tls::TargetTls;
use crate::{
    directory::Directory,
    egress::outbound::Outbound,
    http::{
        claims::Claims,
        exchange::Upgrade,
        generations::{Generation, Generations},
        watched::Activity,
    },
    stream::caller::Caller,
};

/// The egress listener.
pub struct ProxyUrls {
    pub outbound: Outbound,
    pub directory: Arc<dyn Directory>,
    pub tls: Arc<TargetTls>,
    /// The identity headers that are removed from callers' requests to a target.
    pub claims: Arc<Claims>,
    /// How long a connection may wait for its next request, and a target for the next bytes of a request body.
    pub idle_timeout: Duration,
    pub generations: Generations,
}

/// One accepted connection.
pub(super) struct Call {
    pub listener: Arc<ProxyUrls>,
    pub caller: Caller,
    pub entrance: Entrance,
    pub activity: Activity,
    pub generation: Generation,
    /// The node whose tunnel the request went through.
    pub node: OnceLock<NodeName>,
    pub upgrade: Mutex<Option<Upgrade>>,
}

impl Call {
    pub(super) fn upgrade_to(&self, upgrade: Upgrade) {
        *self.upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    }

    pub(super) fn refused(&self, error: &dyn std::fmt::Display) {
        self.listener.outbound.bad_request(self.caller.listener, &self.caller.origin, error);
    }
}

/// How a caller reaches the listener.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entrance {
    Unix,
    Loopback(IpAddr),
    /// Through the front end, which has authenticated and authorized the caller.
    FrontEnd(IpAddr),
}

impl Entrance {
    pub(super) fn peer(self) -> Option<IpAddr> {
        match self {
            Self::Unix => None,
            Self::Loopback(peer) | Self::FrontEnd(peer) => Some(peer),
        }
    }

    /// Whether the caller was allowed to open the socket file.
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
