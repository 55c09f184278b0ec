//! The dialer of all egress listeners, which looks up a route and opens a stream on a tunnel of one of its nodes.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use proto::{DialError, Fault, Host, NodeName, Target};
use proto_net::{
    dialer::{Connection, DialFuture, Dialer, Origin},
    stream::Stream,
};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{sleep, timeout_at},
};

use crate::{
    directory::{Directory, PodLocation},
    routing::{Hop, Route, Via, cluster::KUBELET_PORT, preference, shared::SharedRoutes},
    tunnels::registry::Registry,
};

/// The number of candidates that one dial tries, besides the one of last resort.
const ATTEMPTS: usize = 3;
/// The pause between two looks for a first node that any dial may use.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Dials through tunnels and never directly.
pub struct TunnelDialer {
    registry: Arc<Registry>,
    routes: Arc<SharedRoutes>,
    timeout: Duration,
}

/// A node to try, and the target to ask it for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub node: NodeName,
    pub target: Target,
    /// Whether it is tried only when all others have failed.
    pub is_last_resort: bool,
}

impl TunnelDialer {
    pub fn new(registry: Arc<Registry>, routes: Arc<SharedRoutes>, timeout: Duration) -> Self {
        Self { registry, routes, timeout }
    }

    /// Returns the candidates for a route with the present tunnels, in the order in which to try them. There is at
    /// least one.
    pub fn candidates(&self, route: &Route) -> Result<Vec<Candidate>, DialError> {
        let mut found: Vec<Candidate> = route.hops.iter().flat_map(|hop| self.expand(hop)).collect();
        if found.len() > 1 {
            found = self.order(found);
        }
        found.truncate(ATTEMPTS);
        if let Some(last) = &route.last {
            let last = self.expand(last).into_iter().take(1);
            found.extend(last.map(|candidate| Candidate { is_last_resort: true, ..candidate }));
        }
        if found.is_empty() {
            let state = "no node with a node-agent is connected".to_owned();
            return Err(DialError::NoTunnel { node: "any".to_owned(), state });
        }
        Ok(found)
    }

    /// Returns the candidates, and waits for one while the first nodes come back after a start.
    async fn candidates_soon(&self, route: &Route) -> Result<Vec<Candidate>, DialError> {
        loop {
            let candidates = self.candidates(route);
            let has_time = tokio::time::Instant::now() < self.registry.patient_until();
            if candidates.is_ok() || !has_time {
                return candidates;
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    fn expand(&self, hop: &Hop) -> Vec<Candidate> {
        let candidate = |node| Candidate { node, target: hop.target.clone(), is_last_resort: false };
        match &hop.via {
            Via::Node(node) => vec![candidate(node.clone())],
            Via::AnyNode => self.registry.least_busy_agents(ATTEMPTS).into_iter().map(candidate).collect(),
        }
    }

    /// Puts connected nodes first, and draining ones last among them. Prefers near ones within bounds.
    fn order(&self, candidates: Vec<Candidate>) -> Vec<Candidate> {
        let reach = self.registry.round_trips(candidates.iter().map(|c| &c.node));
        let drains: Vec<_> = candidates.iter().map(|c| self.registry.drain(&c.node)).collect();
        let mut order = preference::order(&reach, &mut rand::rng());
        order.sort_by_key(|index| {
            let is_connected = reach.get(*index).is_some_and(Option::is_some);
            match drains.get(*index).copied().flatten() {
                None if is_connected => 0,
                Some(drain) if is_connected && !drain.is_over() => 1,
                Some(_) | None => 2,
            }
        });
        order.into_iter().filter_map(|index| candidates.get(index).cloned()).collect()
    }

    async fn dial_tunnel(&self, target: &Target, origin: &Origin) -> Result<Connection, DialError> {
        let began = Instant::now();
        let route = self.route(target).await?;
        let several = route.hops.len() > 1;
        let mut failed = None;
        let candidates = self.candidates_soon(&route).await?;
        let mut untried = candidates.len();
        let has_last_resort = candidates.iter().any(|candidate| candidate.is_last_resort);
        for Candidate { node, target: asked, .. } in candidates {
            // A silent endpoint must leave time for the next one.
            let left = match failed {
                None => self.timeout,
                Some(_) => self.timeout.saturating_sub(began.elapsed()),
            };
            let left = if several { left / u32::try_from(untried).unwrap_or(1).max(1) } else { left };
            untried -= 1;
            let error = match self.dial_node(&node, &asked, origin, left).await {
                Ok((stream, permit)) => {
                    let reason = if asked == *target {
                        route.reason
                    } else {
                        format!("{}, endpoint {asked}", route.reason)
                    };
                    return Ok(Connection { stream, node: Some(node), reason, permit: Some(permit) });
                }
                Err(error) => error,
            };
            // Another node's policy may allow what this one's refuses, and another endpoint may answer. The last resort is
            // no way around a policy.
            let elsewhere = match error.fault() {
                Fault::Policy => untried > 1 || !has_last_resort,
                Fault::Target => several,
                Fault::Caller | Fault::Route | Fault::Tunnel => error.retry_elsewhere(),
            };
            if !elsewhere {
                return Err(error);
            }
            failed.get_or_insert(error);
        }
        Err(failed.unwrap_or_else(|| DialError::NoRoute(target.to_string())))
    }

    /// Finds the route to a target. One that is missing may be there once the cluster has been read.
    async fn route(&self, target: &Target) -> Result<Route, DialError> {
        let find = || self.routes.read(|routes| routes.find(target));
        match find() {
            Err(DialError::NoRoute(_)) => {
                let _ = timeout_at(self.registry.patient_until(), self.routes.complete()).await;
                find()
            }
            found => found,
        }
    }

    async fn dial_node(
        &self,
        node: &NodeName,
        target: &Target,
        origin: &Origin,
        timeout: Duration,
    ) -> Result<(Stream, OwnedSemaphorePermit), DialError> {
        let began = Instant::now();
        let (picked, timeout) = match self.registry.pick(node) {
            Err(DialError::NoTunnel { .. }) => {
                let picked = self.registry.pick_soon(node).await;
                (picked, timeout.saturating_sub(began.elapsed()))
            }
            picked => (picked, timeout),
        };
        let (tunnel, permit) = picked?;
        let asked = match &target.host {
            // An sshd may not know the name under which its node is known here.
            Host::Name(name) if !tunnel.is_node_agent() && name == node.as_str() => {
                let address = self.routes.read(|routes| routes.node_address(node));
                Target::new(address.map_or_else(|| target.host.clone(), Host::Addr), target.port)
            }
            Host::Name(_) | Host::Addr(_) => target.clone(),
        };
        let began = Instant::now();
        let mut opened = tunnel.open(&asked, &origin.0, timeout).await;
        // The tunnel may have been retired and replaced since it was picked.
        if let Err(DialError::TunnelLost { .. }) = &opened
            && let Some(other) = self.registry.pick_again(node)
            && other.id != tunnel.id
        {
            let left = timeout.saturating_sub(began.elapsed());
            opened = other.open(&asked, &origin.0, left).await;
        }
        // The node may have been drained meanwhile, after its streams have been cut.
        match opened.and_then(|stream| self.registry.check_drain(node).map(|()| stream)) {
            Ok(stream) => Ok((stream, permit)),
            Err(error) => {
                if let Some(activity) = self.registry.activity(node) {
                    activity.failed(&asked, &error);
                }
                Err(error)
            }
        }
    }
}

impl Dialer for TunnelDialer {
    fn dial<'a>(&'a self, target: &'a Target, origin: &'a Origin) -> DialFuture<'a> {
        Box::pin(self.dial_tunnel(target, origin))
    }
}

impl Directory for TunnelDialer {
    fn kubelet_port(&self, node: &str) -> Result<u16, DialError> {
        self.routes.read(|routes| match routes.cluster.node(node) {
            Some(node) => Ok(node.kubelet_port),
            None if routes.has_node(node) => Ok(KUBELET_PORT),
            None => Err(DialError::NoRoute(format!("node {node}: it is not known"))),
        })
    }

    fn node_addresses(&self, node: &str) -> Vec<IpAddr> {
        self.routes.read(|routes| routes.node_addresses(node))
    }

    fn pod(&self, namespace: &str, name: &str) -> Result<PodLocation, DialError> {
        let key = format!("{namespace}/{name}");
        self.routes.read(|routes| {
            let pod = routes.cluster.pod(&key).ok_or_else(|| unknown("pod", &key))?;
            Ok(PodLocation { address: routes.pod_address(pod)?, first_port: pod.first_port })
        })
    }

    fn service_port(&self, namespace: &str, name: &str, port: &str) -> Result<u16, DialError> {
        let key = format!("{namespace}/{name}");
        self.routes.read(|routes| {
            let service = routes.cluster.service(&key).ok_or_else(|| unknown("service", &key))?;
            let found = match (port, service.ports.as_slice()) {
                ("", [only]) => Some(only),
                (port, all) => all
                    .iter()
                    .find(|p| p.name == port)
                    .or_else(|| all.iter().find(|p| !port.is_empty() && p.port.to_string() == port)),
            };
            found.map(|p| p.port).ok_or_else(|| {
                let ports: Vec<_> =
                    service.ports.iter().map(|p| format!("{} ({})", p.port, p.name)).collect();
                DialError::NoRoute(format!(
                    "service {key} has no TCP port {port:?}; it has {}",
                    ports.join(", ")
                ))
            })
        })
    }
}

fn unknown(kind: &str, key: &str) -> DialError {
    DialError::NoRoute(format!(
        "{kind} {key} is not known; pods and services come from the Kubernetes API (kubernetes:)"
    ))
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::SystemTime};

    use super::*;
    use crate::{
        routing::cluster::{Endpoint, EndpointSlice, Object, Service, ServicePort},
        tunnels::{
            absent::Absent,
            testing::{Master, n1},
        },
    };

    const HOUR: Duration = Duration::from_secs(3600);

    /// A service with an endpoint on n1 and another one.
    fn routes(other: NodeName) -> SharedRoutes {
        let endpoint = |address: &str, node: NodeName| Endpoint {
            address: address.parse().unwrap(),
            node: Some(node),
            hostname: None,
            ready: true,
        };
        let service = Service {
            key: "a/b".into(),
            created: 1,
            addresses: vec!["10.96.0.1".parse().unwrap()],
            ports: vec![ServicePort { name: String::new(), port: 80 }],
            external_name: None,
        };
        let slice = EndpointSlice {
            key: "a/b-1".into(),
            service: "a/b".into(),
            ports: vec![(String::new(), Some(8080))],
            endpoints: vec![endpoint("10.1.0.1", n1()), endpoint("10.1.0.2", other)],
        };
        let routes = SharedRoutes::new(String::new());
        routes.change(|routes| {
            routes.cluster.apply(Object::Service(service));
            routes.cluster.apply(Object::EndpointSlice(slice));
        });
        routes
    }

    #[tokio::test(start_paused = true)]
    async fn all_endpoints_are_tried_after_a_refusal_where_no_node_can_be_the_last_resort() {
        let master = Master::new(HOUR, 64);
        *master.node.sshd_forbids.lock().unwrap() = Some(vec!["10.1.0.1".to_owned()]);
        master.registry.expect(&[(n1(), (1, Absent::New))].into_iter().collect());
        let (tunnel, notices) = master.tunnel_in(&master.tasks).await;
        assert!(notices.is_none() && !tunnel.is_node_agent());
        let _registered = master.registry.register(Arc::new(tunnel)).unwrap();
        let (routes, registry) = (Arc::new(routes(n1())), master.registry.clone());
        let dialer = TunnelDialer::new(registry, routes, Duration::from_secs(9));
        let (target, origin) = ("10.96.0.1:80".parse().unwrap(), Origin("test".to_owned()));
        // The order is drawn at random.
        for _ in 0..32 {
            let connection = dialer.dial(&target, &origin).await.unwrap();
            assert_eq!(connection.reason, "service a/b, endpoint 10.1.0.2:8080");
        }
        *master.node.sshd_forbids.lock().unwrap() = Some(vec!["10.1.0.1".to_owned(), "10.1.0.2".to_owned()]);
        let refused = dialer.dial(&target, &origin).await.err().unwrap();
        assert_eq!(refused.fault(), Fault::Policy, "{refused}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_draining_node_still_gets_what_no_other_node_can_carry() {
        let mut master = Master::new(HOUR, 64);
        let n2: NodeName = "n2".parse().unwrap();
        let expected = [n1(), n2.clone()].map(|node| (node, (1, Absent::New)));
        master.registry.expect(&expected.into_iter().collect());
        let (tunnel, _notices, _node) = master.tunnel().await;
        let _registered = master.registry.register(Arc::new(tunnel)).unwrap();
        let (routes, registry) = (Arc::new(routes(n2)), master.registry.clone());
        let dialer = TunnelDialer::new(registry.clone(), routes, Duration::from_secs(9));
        let (target, origin) = ("10.96.0.1:80".parse().unwrap(), Origin("test".to_owned()));
        let drain = |seconds| {
            let until = SystemTime::now() + Duration::from_secs(seconds);
            registry.set_drains(HashMap::from([(n1(), until)]));
        };
        drain(60);
        // The order of nodes that can carry it is drawn at random, and n2 has no tunnel.
        for _ in 0..32 {
            let connection = dialer.dial(&target, &origin).await.unwrap();
            assert_eq!(connection.node, Some(n1()));
        }
        drain(0);
        let refused = dialer.dial(&target, &origin).await.err().unwrap();
        assert_eq!(refused.fault(), Fault::Tunnel, "{refused}");
        registry.set_drains(HashMap::new());
        dialer.dial(&target, &origin).await.unwrap();
    }
}
