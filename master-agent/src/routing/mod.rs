//! Finds the node that reaches a target, and the reason, from what the inventory and the cluster say. There is no I/O.
//!
//! An exact match precedes a general one: a name or address of the inventory, of a service, of a node, of a pod, then
//! the longest CIDR of a node or of services, then the node marked `default_route`. What the operator wrote precedes
//! what the API server assigns, and that precedes what a kubelet reports of its node and its pods. No route leads to a
//! direct connection.

mod claims;
pub mod cluster;
pub mod inventory;
pub mod preference;
pub mod shared;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use proto::{DialError, Host, NodeName, Target};

use claims::{Prefixes, Since};
use cluster::{ClusterIndex, Endpoint, Pod, Service, ServicePort};
use inventory::Inventory;

/// The most endpoints of a service that are considered for one dial.
const ENDPOINTS: usize = 16;

/// The sources of all routes.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    pub inventory: InventoryRoutes,
    pub cluster: ClusterIndex,
    /// What cluster DNS appends to the names of services, for instance `cluster.local`.
    pub cluster_domain: String,
}

/// The routes of the inventory, which are replaced as a whole.
#[derive(Clone, Debug, Default)]
pub struct InventoryRoutes {
    /// The addresses of each node.
    nodes: HashMap<NodeName, Vec<IpAddr>>,
    addresses: HashMap<IpAddr, NodeName>,
    cidrs: Prefixes<NodeName>,
    services: Prefixes<()>,
    default_route: Option<NodeName>,
}

/// Where a target leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The ways to the target, of which there is at least one. As far as routing knows, none is better than another.
    pub hops: Vec<Hop>,
    /// The way to try when all others have failed.
    pub last: Option<Hop>,
    /// Why this is the route, as `explain` and logs show it.
    pub reason: String,
}

/// One way to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub via: Via,
    /// What the node is asked for: a service is resolved to one of its endpoints.
    pub target: Target,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Via {
    Node(NodeName),
    /// Any node with a tunnel will do.
    AnyNode,
}

impl InventoryRoutes {
    pub fn new(inventory: &Inventory) -> Self {
        let mut routes = Self::default();
        for node in inventory.nodes() {
            let addresses: Vec<IpAddr> = node.addresses.iter().map(IpAddr::to_canonical).collect();
            routes.addresses.extend(addresses.iter().map(|address| (*address, node.name.clone())));
            routes.nodes.insert(node.name.clone(), addresses);
            for net in &node.cidrs {
                routes.cidrs.claim(*net, Since::default(), node.name.clone(), false);
            }
            if node.default_route {
                routes.default_route = Some(node.name.clone());
            }
        }
        for net in inventory.service_cidrs() {
            routes.services.claim(*net, Since::default(), (), false);
        }
        routes
    }
}

impl Routes {
    /// Finds the way to `target`.
    pub fn find(&self, target: &Target) -> Result<Route, DialError> {
        let found = match &target.host {
            Host::Name(name) => self.by_name(name, target)?,
            Host::Addr(addr) => self.by_address(addr.to_canonical(), target)?,
        };
        found.or_else(|| self.by_default(target)).ok_or_else(|| {
            DialError::NoRoute(format!(
                "{target}: no node, pod or service has this name or address, no CIDR holds it, and no node is the default route"
            ))
        })
    }

    pub fn has_node(&self, name: &str) -> bool {
        NodeName::from_str(name).is_ok_and(|node| self.inventory.nodes.contains_key(&node))
            || self.cluster.node(name).is_some()
    }

    /// The address that stands for a node's name where the node can't resolve it itself (a plain sshd).
    pub fn node_address(&self, name: &NodeName) -> Option<IpAddr> {
        let of_cluster = || self.cluster.node(name.as_str())?.addresses.first().copied();
        let of_inventory = self.inventory.nodes.get(name).and_then(|addresses| addresses.first());
        of_inventory.copied().or_else(of_cluster)
    }

    /// All addresses of a node.
    pub fn node_addresses(&self, name: &str) -> Vec<IpAddr> {
        let of_inventory = NodeName::from_str(name).ok().and_then(|name| self.inventory.nodes.get(&name));
        let mut addresses = of_inventory.cloned().unwrap_or_default();
        let of_cluster = self.cluster.node(name).into_iter().flat_map(|node| &node.addresses);
        // An address that two nodes claim proves nothing about the one that does not own it.
        addresses.extend(
            of_cluster.filter(|a| self.cluster.node_of_address(**a).is_some_and(|n| n.as_str() == name)),
        );
        addresses
    }

    /// The address at which a pod is dialled: its first one, if that leads to the pod's own node. Its kubelet may report
    /// any address, even one of another node, pod or service, to which a caller who asks for the pod must not be led.
    pub fn pod_address(&self, pod: &Pod) -> Result<IpAddr, DialError> {
        let key = &pod.key;
        let unreachable = |why: String| DialError::Unreachable(format!("pod {key} {why}"));
        let address = *pod.addresses.first().ok_or_else(|| unreachable("has no address yet".to_owned()))?;
        if pod.ended {
            return Err(unreachable("has ended".to_owned()));
        }
        let node = pod.node.clone().ok_or_else(|| unreachable("is on no node yet".to_owned()))?;
        let own = Via::Node(node.clone());
        let other = match self.find(&Target::new(Host::Addr(address), 1)) {
            Ok(route) if route.last.is_none() && route.hops.iter().all(|hop| hop.via == own) => {
                return Ok(address);
            }
            Ok(route) => route.reason,
            Err(error) => error.to_string(),
        };
        Err(unreachable(format!(
            "on node {node} reports the address {address}, which leads elsewhere ({other}): it is not dialled there"
        )))
    }

    fn by_name(&self, name: &str, target: &Target) -> Result<Option<Route>, DialError> {
        let of_service = name.ends_with(".svc") || name.ends_with(&format!(".svc.{}", self.cluster_domain));
        if let Ok(node) = NodeName::from_str(name)
            && (self.inventory.nodes.contains_key(&node) || !of_service && self.has_node(name))
        {
            return Ok(Some(one(format!("node name {node}"), Via::Node(node), target)));
        }
        let domain = format!(".{}", self.cluster_domain);
        let short = name.strip_suffix(&domain).filter(|_| !self.cluster_domain.is_empty()).unwrap_or(name);
        let mut labels = short.rsplit('.');
        match (labels.next(), labels.next(), labels.next(), labels.next(), labels.next()) {
            (Some("svc"), Some(namespace), Some(service), hostname, None) => {
                let Some(service) = self.cluster.service(&format!("{namespace}/{service}")) else {
                    return Ok(None);
                };
                self.by_service(service, hostname, target).map(Some)
            }
            (Some("pod"), Some(_namespace), Some(dashed), None, None) => {
                // As in cluster DNS: 10-0-0-1, fd00--1.
                let address = dashed.replace('-', ".").parse().or_else(|_| dashed.replace('-', ":").parse());
                match address.map(|address: IpAddr| address.to_canonical()) {
                    Ok(address) => self.by_address(address, &Target::new(Host::Addr(address), target.port)),
                    Err(_) => Ok(None),
                }
            }
            _ => Ok(None),
        }
    }

    fn by_address(&self, addr: IpAddr, target: &Target) -> Result<Option<Route>, DialError> {
        let to_node =
            |node: &NodeName| one(format!("address of node {node}"), Via::Node(node.clone()), target);
        if let Some(node) = self.inventory.addresses.get(&addr) {
            return Ok(Some(to_node(node)));
        }
        if let Some(service) = self.cluster.service_of_address(addr) {
            return self.by_service(service, None, target).map(Some);
        }
        if let Some(node) = self.node_of_cluster(addr) {
            return Ok(Some(to_node(node)));
        }
        if let Some((pod, node)) = self.pod_of_cluster(addr) {
            return Ok(Some(one(format!("pod {} on node {node}", pod.key), Via::Node(node.clone()), target)));
        }
        let node = self.cidr_of(addr);
        let service = self.inventory.services.longest(addr).map(|(net, ())| net);
        let via_any =
            |net: IpNet| one(format!("service CIDR {net}, any connected node"), Via::AnyNode, target);
        Ok(match (node, service) {
            (Some((net, _)), Some(service)) if service.prefix_len() > net.prefix_len() => {
                Some(via_any(service))
            }
            (Some((net, node)), _) => {
                Some(one(format!("CIDR {net} of node {node}"), Via::Node(node.clone()), target))
            }
            (None, Some(service)) => Some(via_any(service)),
            (None, None) => None,
        })
    }

    /// The Node with this address, unless it is in the pod network of another node or in a service network.
    fn node_of_cluster(&self, addr: IpAddr) -> Option<&NodeName> {
        let node = self.cluster.node_of_address(addr)?;
        let others = self.cluster.cidr_of_address(addr).is_some_and(|(_, owner)| owner != node);
        (!others && self.inventory.services.longest(addr).is_none()).then_some(node)
    }

    /// The pod with this address, and its node, unless it is in a service network.
    fn pod_of_cluster(&self, addr: IpAddr) -> Option<(&Pod, &NodeName)> {
        self.cluster.pod_of_address(addr).filter(|_| self.inventory.services.longest(addr).is_none())
    }

    fn cidr_of(&self, addr: IpAddr) -> Option<(IpNet, &NodeName)> {
        match (self.inventory.cidrs.longest(addr), self.cluster.cidr_of_address(addr)) {
            (Some(a), Some(b)) if b.0.prefix_len() > a.0.prefix_len() => Some(b),
            (a, b) => a.or(b),
        }
    }

    fn by_default(&self, target: &Target) -> Option<Route> {
        let node = self.inventory.default_route.clone()?;
        Some(one(format!("default route {node}"), Via::Node(node), target))
    }

    /// The way to a service, by its ready endpoints (those named `hostname`, if given).
    fn by_service(
        &self,
        service: &Service,
        hostname: Option<&str>,
        target: &Target,
    ) -> Result<Route, DialError> {
        let key = &service.key;
        if let Some(other) = &service.external_name {
            return Err(DialError::NoRoute(format!("{target}: service {key} is only a name for {other}")));
        }
        let headless = service.addresses.is_empty();
        let port = service.ports.iter().find(|port| port.port == target.port);
        let reason = match port {
            Some(port) if port.name.is_empty() => format!("service {key}"),
            Some(port) => format!("service {key} port {}", port.name),
            // Clients that resolve a headless service's name connect to its pods at any port.
            None if headless => format!("headless service {key}"),
            None => return Err(DialError::NoRoute(format!("{target}: service {key} has no such TCP port"))),
        };
        let endpoints = self.endpoints(key, port, hostname, target.port);
        if endpoints.is_empty() {
            return Err(DialError::Unreachable(format!("{target}: service {key} has no ready endpoint")));
        }
        let hops = endpoints.into_iter().filter_map(|(endpoint, port)| self.endpoint_hop(endpoint, port));
        let hops: Vec<Hop> = hops.collect();
        // A node that forwards to services itself also reaches endpoints that are on no node.
        let last = service.addresses.first().map(|address| Hop {
            via: Via::AnyNode,
            target: Target::new(
                match target.host {
                    Host::Addr(asked) => Host::Addr(asked),
                    Host::Name(_) => Host::Addr(*address),
                },
                target.port,
            ),
        });
        match (hops.is_empty(), last) {
            (false, last) => Ok(Route { hops, last, reason }),
            (true, Some(last)) => Ok(Route { hops: vec![last], last: None, reason }),
            (true, None) => {
                Err(DialError::NoRoute(format!("{target}: the endpoints of service {key} are on no node")))
            }
        }
    }

    /// Up to [`ENDPOINTS`] ready endpoints of a service, each with the port to dial, beginning at a random one of all. The
    /// work does not grow with their number, but with that of the slices, unless a `hostname` has to be found.
    fn endpoints(
        &self,
        service: &str,
        port: Option<&ServicePort>,
        hostname: Option<&str>,
        asked: u16,
    ) -> Vec<(&Endpoint, u16)> {
        let slices = self.cluster.slices(service).filter_map(|slice| {
            let number = match port {
                Some(port) => slice.ports.iter().find(|(name, _)| *name == port.name)?.1,
                None => None,
            };
            Some((slice.endpoints.as_slice(), number.unwrap_or(asked)))
        });
        let slices: Vec<(&[Endpoint], u16)> = slices.collect();
        let count: usize = slices.iter().map(|(endpoints, _)| endpoints.len()).sum();
        // The slice in which the first endpoint is, and its place there.
        let (mut at, mut first) = (0, if count > ENDPOINTS { rand::random_range(0..count) } else { 0 });
        while let Some((endpoints, _)) = slices.get(at)
            && first >= endpoints.len()
        {
            first -= endpoints.len();
            at += 1;
        }
        let (before, after) = slices.split_at(at.min(slices.len()));
        let all = after
            .iter()
            .chain(before)
            .flat_map(|&(endpoints, port)| endpoints.iter().map(move |endpoint| (endpoint, port)));
        let from_first = all.clone().chain(all).skip(first).take(count);
        let named =
            from_first.filter(|(endpoint, _)| hostname.is_none() || endpoint.hostname.as_deref() == hostname);
        named.take(ENDPOINTS).collect()
    }

    fn endpoint_hop(&self, endpoint: &Endpoint, port: u16) -> Option<Hop> {
        let target = Target::new(Host::Addr(endpoint.address), port);
        if let Some(node) = &endpoint.node {
            return Some(Hop { via: Via::Node(node.clone()), target });
        }
        let addr = endpoint.address;
        let node = self.inventory.addresses.get(&addr).or_else(|| self.node_of_cluster(addr));
        let node = node.or_else(|| self.pod_of_cluster(addr).map(|(_, node)| node));
        let node = node.or_else(|| self.cidr_of(addr).map(|(_, node)| node))?;
        Some(Hop { via: Via::Node(node.clone()), target })
    }
}

fn one(reason: String, via: Via, target: &Target) -> Route {
    Route { hops: vec![Hop { via, target: target.clone() }], last: None, reason }
}
