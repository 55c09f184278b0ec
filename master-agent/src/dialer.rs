//! Route, registry, tunnel: the dialer behind every front door.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use proto::{
    DialError, Host, NodeName, Target,
    io::dialer::{Connection, DialFuture, Dialer, Origin},
};

use crate::{
    registry::Registry,
    routing::{Route, Routes, Via},
};

/// Dials through tunnels only; there is no direct path to fall back to.
pub struct TunnelDialer {
    registry: Arc<Registry>,
    routes: RwLock<Arc<Routes>>,
    timeout: Duration,
}

impl TunnelDialer {
    pub fn new(registry: Arc<Registry>, timeout: Duration) -> Self {
        Self { registry, routes: RwLock::default(), timeout }
    }

    pub fn routes(&self) -> Arc<Routes> {
        self.routes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_routes(&self, routes: Routes) {
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(routes);
    }

    /// The node that a route leads to now.
    pub fn node_for(&self, route: &Route, routes: &Routes) -> Result<NodeName, DialError> {
        match &route.via {
            Via::Node(node) => Ok(node.clone()),
            Via::AnyNode => {
                let connected = routes.names().filter(|name| self.registry.is_connected(name));
                let least_busy = connected.min_by_key(|name| {
                    self.registry.pick(name).map_or(usize::MAX, |(tunnel, _)| tunnel.streams())
                });
                least_busy.cloned().ok_or_else(|| DialError::NoTunnel {
                    node: "any".to_owned(),
                    state: "no node is connected".to_owned(),
                })
            }
        }
    }

    async fn dial_tunnel(&self, target: &Target, origin: &Origin) -> Result<Connection, DialError> {
        let routes = self.routes();
        let route = routes.find(target)?;
        let node = self.node_for(&route, &routes)?;
        let (tunnel, permit) = self.registry.pick(&node)?;
        let asked = match routes.node_address(&node) {
            Some(address) if !tunnel.is_node_agent() => as_seen_by_sshd(target, &node, address),
            Some(_) | None => target.clone(),
        };
        let stream = tunnel.open(&asked, &origin.0, self.timeout).await?;
        Ok(Connection { stream, node: Some(node), reason: route.reason, permit: Some(Box::new(permit)) })
    }
}

/// An sshd may not know the name the inventory gives its node.
fn as_seen_by_sshd(target: &Target, node: &NodeName, address: IpAddr) -> Target {
    match &target.host {
        Host::Name(name) if name == node.as_str() => Target::new(Host::Addr(address), target.port),
        Host::Name(_) | Host::Addr(_) => target.clone(),
    }
}

impl Dialer for TunnelDialer {
    fn dial<'a>(&'a self, target: &'a Target, origin: &'a Origin) -> DialFuture<'a> {
        Box::pin(self.dial_tunnel(target, origin))
    }
}
