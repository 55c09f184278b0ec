//! Which node reaches a target, and why. Pure: a table built from the inventory, asked with a target.
//!
//! Longest prefix first: exact node name or address, then the most specific CIDR of a node, then a service
//! CIDR (any connected node), then the node marked `default_route`. Never a direct connection.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    str::FromStr,
};

use ipnet::IpNet;
use proto::{DialError, Host, NodeName, Target};

use crate::inventory::Inventory;

/// An immutable set of routes; a new inventory makes a new one.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    names: BTreeSet<NodeName>,
    addresses: HashMap<IpAddr, NodeName>,
    first_address: HashMap<NodeName, IpAddr>,
    /// Most specific first.
    cidrs: Vec<(IpNet, NodeName)>,
    services: Vec<IpNet>,
    default_route: Option<NodeName>,
}

/// Where a target leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub via: Via,
    /// For `explain`, logs and metrics.
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Via {
    Node(NodeName),
    /// Any node with a tunnel will do.
    AnyNode,
}

impl Routes {
    pub fn new(inventory: &Inventory) -> Self {
        let mut routes = Self { services: inventory.service_cidrs.clone(), ..Self::default() };
        for node in &inventory.nodes {
            routes.names.insert(node.name.clone());
            if let Some(first) = node.addresses.first() {
                routes.first_address.insert(node.name.clone(), first.to_canonical());
            }
            routes.addresses.extend(node.addresses.iter().map(|a| (a.to_canonical(), node.name.clone())));
            routes.cidrs.extend(node.cidrs.iter().map(|net| (*net, node.name.clone())));
            if node.default_route {
                routes.default_route = Some(node.name.clone());
            }
        }
        routes.cidrs.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
        routes.services.sort_by_key(|net| std::cmp::Reverse(net.prefix_len()));
        routes
    }

    /// Finds the way to `target`.
    pub fn find(&self, target: &Target) -> Result<Route, DialError> {
        let found = match &target.host {
            Host::Name(name) => self.by_name(name),
            Host::Addr(addr) => self.by_address(*addr),
        };
        found.or_else(|| self.by_default()).ok_or_else(|| {
            DialError::NoRoute(format!(
                "{target}: no node has this name, address or CIDR, and none is the default route"
            ))
        })
    }

    fn by_name(&self, name: &str) -> Option<Route> {
        let node = NodeName::from_str(name).ok().filter(|node| self.names.contains(node))?;
        Some(Route { reason: format!("node name {node}"), via: Via::Node(node) })
    }

    fn by_address(&self, addr: IpAddr) -> Option<Route> {
        let addr = addr.to_canonical();
        if let Some(node) = self.addresses.get(&addr) {
            return Some(Route { via: Via::Node(node.clone()), reason: format!("address of node {node}") });
        }
        let cidr = self.cidrs.iter().find(|(net, _)| net.contains(&addr));
        let service = self.services.iter().find(|net| net.contains(&addr));
        match (cidr, service) {
            (Some((net, _)), Some(service)) if service.prefix_len() > net.prefix_len() => Some(any(service)),
            (Some((net, node)), _) => {
                Some(Route { via: Via::Node(node.clone()), reason: format!("CIDR {net} of node {node}") })
            }
            (None, Some(service)) => Some(any(service)),
            (None, None) => None,
        }
    }

    pub fn node_addresses(&self, name: &str) -> Vec<IpAddr> {
        let of_node = self.addresses.iter().filter(|(_, node)| node.as_str() == name);
        of_node.map(|(address, _)| *address).collect()
    }

    pub fn has_node(&self, name: &str) -> bool {
        NodeName::from_str(name).is_ok_and(|node| self.names.contains(&node))
    }

    fn by_default(&self) -> Option<Route> {
        let node = self.default_route.clone()?;
        Some(Route { reason: format!("default route {node}"), via: Via::Node(node) })
    }

    /// The address that stands for a node's name where the node can't resolve it itself (a plain sshd).
    pub fn node_address(&self, name: &NodeName) -> Option<IpAddr> {
        self.first_address.get(name).copied()
    }
}

fn any(service: &IpNet) -> Route {
    Route { via: Via::AnyNode, reason: format!("service CIDR {service}, any connected node") }
}
