//! Route, registry, tunnel: the dialer behind every front door.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use proto::{
    DialError, Fault, Host, NodeName, Target,
    io::{
        dialer::{Connection, DialFuture, Dialer, Origin},
        stream::Stream,
    },
};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    directory::{Directory, Pod},
    registry::Registry,
    routing::{Route, Routes, Via},
};

/// Nodes that are tried for a target that any node may reach.
const ATTEMPTS: usize = 3;
/// Where kubelets listen unless their Node says otherwise.
const KUBELET_PORT: u16 = 10250;

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

    /// The nodes that a route leads to now, the best first; at least one.
    pub fn candidates(&self, route: &Route) -> Result<Vec<NodeName>, DialError> {
        match &route.via {
            Via::Node(node) => Ok(vec![node.clone()]),
            Via::AnyNode => {
                let mut nodes = self.registry.least_busy_agents();
                nodes.truncate(ATTEMPTS);
                if nodes.is_empty() {
                    let state = "no node with a node-agent is connected".to_owned();
                    return Err(DialError::NoTunnel { node: "any".to_owned(), state });
                }
                Ok(nodes)
            }
        }
    }

    async fn dial_tunnel(&self, target: &Target, origin: &Origin) -> Result<Connection, DialError> {
        let began = Instant::now();
        let routes = self.routes();
        let route = routes.find(target)?;
        let mut failed = None;
        for node in self.candidates(&route)? {
            let left = match failed {
                None => self.timeout,
                Some(_) => self.timeout.saturating_sub(began.elapsed()),
            };
            let error = match self.dial_node(&node, &routes, target, origin, left).await {
                Ok((stream, permit)) => {
                    let permit = Some(Box::new(permit) as _);
                    return Ok(Connection { stream, node: Some(node), reason: route.reason, permit });
                }
                Err(error) => error,
            };
            // Another node's policy may allow what this one's does not.
            if !error.retry_elsewhere() && error.fault() != Fault::Policy {
                return Err(error);
            }
            failed.get_or_insert(error);
        }
        Err(failed.unwrap_or_else(|| DialError::NoRoute(target.to_string())))
    }

    async fn dial_node(
        &self,
        node: &NodeName,
        routes: &Routes,
        target: &Target,
        origin: &Origin,
        timeout: Duration,
    ) -> Result<(Stream, OwnedSemaphorePermit), DialError> {
        let (tunnel, permit) = self.registry.pick(node)?;
        let asked = match routes.node_address(node) {
            Some(address) if !tunnel.is_node_agent() => as_seen_by_sshd(target, node, address),
            Some(_) | None => target.clone(),
        };
        Ok((tunnel.open(&asked, &origin.0, timeout).await?, permit))
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

/// What is known without a watch of the cluster.
impl Directory for TunnelDialer {
    fn kubelet_port(&self, node: &str) -> Result<u16, DialError> {
        match self.routes().has_node(node) {
            true => Ok(KUBELET_PORT),
            false => Err(DialError::NoRoute(format!("node {node}: it is not known"))),
        }
    }

    fn node_addresses(&self, node: &str) -> Vec<IpAddr> {
        self.routes().node_addresses(node)
    }

    fn pod(&self, namespace: &str, name: &str) -> Result<Pod, DialError> {
        Err(DialError::NoRoute(format!("pod {namespace}/{name}: pods are known from a Kubernetes API only")))
    }

    fn service_port(&self, namespace: &str, name: &str, _port: &str) -> Result<u16, DialError> {
        Err(DialError::NoRoute(format!(
            "service {namespace}/{name}: services are known from a Kubernetes API only"
        )))
    }
}
