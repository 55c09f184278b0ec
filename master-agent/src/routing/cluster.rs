//! What is known of a cluster: nodes, pods, services and their endpoints, in indices that change object by object and
//! answer in constant time.
//!
//! An object can't take an address or a network from another object by claiming it, since each kubelet writes the
//! addresses of its own node and of that node's pods. If two nodes or two pods claim an address or a network, it belongs
//! to the one that had it first, or, if the first list shows both, to the one that was created first. If both claims were
//! refused, every kubelet could cut off every pod.
//!
//! The control plane assigns pod networks, so they take precedence: among pods that claim an address, it belongs to the
//! one whose node's network holds it, even if that pod comes later. If the networks of several nodes hold the address,
//! none of them counts.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use proto::NodeName;

use super::claims::{Age, Claims, Prefixes, Since};

/// The port of a kubelet whose Node object names no other.
pub const KUBELET_PORT: u16 = 10250;

/// `NAMESPACE/NAME`; for a node its name.
pub type Key = Arc<str>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Nodes,
    Pods,
    Services,
    EndpointSlices,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Nodes, Self::Pods, Self::Services, Self::EndpointSlices];

    /// The plural that the API's paths use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Pods => "pods",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: NodeName,
    pub created: Age,
    pub addresses: Vec<IpAddr>,
    pub cidrs: Vec<IpNet>,
    pub kubelet_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub key: Key,
    pub created: Age,
    /// Where it runs or has been scheduled to.
    pub node: Option<NodeName>,
    pub addresses: Vec<IpAddr>,
    /// Whether its addresses are its node's.
    pub host_network: bool,
    /// Whether it has ended, so that its addresses may belong to another pod by now.
    pub ended: bool,
    /// The first port that its containers declare.
    pub first_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub key: Key,
    pub created: Age,
    /// Cluster IPs; none for a headless service.
    pub addresses: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
    /// The host that an `ExternalName` service stands for.
    pub external_name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub name: String,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    pub key: Key,
    pub service: Key,
    /// TCP ports; the number is `None` for all ports.
    pub ports: Vec<(String, Option<u16>)>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub node: Option<NodeName>,
    pub hostname: Option<String>,
    pub ready: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Node(Node),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
}

impl Object {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(_) => Kind::Nodes,
            Self::Pod(_) => Kind::Pods,
            Self::Service(_) => Kind::Services,
            Self::EndpointSlice(_) => Kind::EndpointSlices,
        }
    }

    pub fn key(&self) -> Key {
        match self {
            Self::Node(node) => node.name.as_str().into(),
            Self::Pod(pod) => pod.key.clone(),
            Self::Service(service) => service.key.clone(),
            Self::EndpointSlice(slice) => slice.key.clone(),
        }
    }
}

/// A pod that claims an address: its node, then the pod, so that the pods of one node are next to each other.
type PodOfNode = (Option<Key>, Key);

/// The indices.
#[derive(Clone, Debug, Default)]
pub struct ClusterIndex {
    nodes: HashMap<Key, Node>,
    node_addresses: Claims<IpAddr, NodeName>,
    node_cidrs: Prefixes<NodeName>,
    pods: HashMap<Key, Pod>,
    pod_addresses: Claims<IpAddr, PodOfNode>,
    services: HashMap<Key, Service>,
    service_addresses: Claims<IpAddr, Key>,
    slices: HashMap<Key, EndpointSlice>,
    slices_of: HashMap<Key, BTreeSet<Key>>,
    /// The kinds of which a whole list has been applied.
    settled: HashSet<Kind>,
    /// The turn of the last claim after the first lists.
    turn: u32,
}

impl ClusterIndex {
    /// Adds an object or replaces its former version.
    pub fn apply(&mut self, object: Object) {
        match object {
            Object::Node(node) => {
                let old = self.nodes.remove(node.name.as_str());
                let (addresses, cidrs) = old.map(|n| (n.addresses, n.cidrs)).unwrap_or_default();
                let claims = node.addresses.iter().any(|a| !addresses.contains(a))
                    || node.cidrs.iter().any(|net| !cidrs.contains(net));
                let (since, settled) = self.since(Kind::Nodes, node.created, claims);
                for address in addresses.iter().filter(|a| !node.addresses.contains(a)) {
                    self.node_addresses.release(address, &node.name);
                }
                for address in node.addresses.iter().filter(|a| !addresses.contains(a)) {
                    self.node_addresses.claim(*address, since, node.name.clone(), settled);
                }
                for net in cidrs.iter().filter(|net| !node.cidrs.contains(net)) {
                    self.node_cidrs.release(net, &node.name);
                }
                for net in node.cidrs.iter().filter(|net| !cidrs.contains(net)) {
                    self.node_cidrs.claim(*net, since, node.name.clone(), settled);
                }
                self.nodes.insert(node.name.as_str().into(), node);
            }
            Object::Pod(pod) => {
                let owner = self.owner(&pod);
                let old =
                    self.pods.get(&pod.key).map(|old| (self.owner(old), addresses_of_its_own(old).to_vec()));
                let (former, had) = old.unwrap_or_else(|| (owner.clone(), Vec::new()));
                let has = addresses_of_its_own(&pod);
                // A pod that has only now been bound to its node claims its addresses anew.
                let stays = |a: &&IpAddr| former == owner && had.contains(a) && has.contains(a);
                let claims = has.iter().any(|a| !stays(&a));
                let (since, settled) = self.since(Kind::Pods, pod.created, claims);
                for address in had.iter().filter(|a| !stays(a)) {
                    self.pod_addresses.release(address, &former);
                }
                for address in has.iter().filter(|a| !stays(a)) {
                    self.pod_addresses.claim(*address, since, owner.clone(), settled);
                }
                self.pods.insert(pod.key.clone(), pod);
            }
            Object::Service(service) => {
                self.remove(Kind::Services, &service.key);
                for address in &service.addresses {
                    let since = Since::new(service.created, 0);
                    self.service_addresses.claim(*address, since, service.key.clone(), false);
                }
                self.services.insert(service.key.clone(), service);
            }
            Object::EndpointSlice(mut slice) => {
                // Nothing else is dialled, and a dial that draws one must not have to pass over the others.
                slice.endpoints.retain(|endpoint| endpoint.ready);
                self.remove(Kind::EndpointSlices, &slice.key);
                self.slices_of.entry(slice.service.clone()).or_default().insert(slice.key.clone());
                self.slices.insert(slice.key.clone(), slice);
            }
        }
    }

    pub fn remove(&mut self, kind: Kind, key: &str) {
        match kind {
            Kind::Nodes => {
                let Some(node) = self.nodes.remove(key) else { return };
                for address in &node.addresses {
                    self.node_addresses.release(address, &node.name);
                }
                for net in &node.cidrs {
                    self.node_cidrs.release(net, &node.name);
                }
            }
            Kind::Pods => {
                let Some(pod) = self.pods.remove(key) else { return };
                let owner = self.owner(&pod);
                for address in addresses_of_its_own(&pod) {
                    self.pod_addresses.release(address, &owner);
                }
            }
            Kind::Services => {
                let Some(service) = self.services.remove(key) else { return };
                for address in &service.addresses {
                    self.service_addresses.release(address, &service.key);
                }
            }
            Kind::EndpointSlices => {
                let Some(slice) = self.slices.remove(key) else { return };
                if let Some(slices) = self.slices_of.get_mut(&slice.service) {
                    slices.remove(key);
                    if slices.is_empty() {
                        self.slices_of.remove(&slice.service);
                    }
                }
            }
        }
    }

    /// Notes that all objects of a whole list have been applied. From now on nobody can take an address or a network from
    /// its owner.
    pub fn settle(&mut self, kind: Kind) {
        self.settled.insert(kind);
    }

    /// The objects of a kind that are not in a whole list, and have to be removed.
    pub fn unlisted(&self, kind: Kind, listed: &HashSet<Key>) -> Vec<Key> {
        fn keys<V>(of: &HashMap<Key, V>, listed: &HashSet<Key>) -> Vec<Key> {
            of.keys().filter(|key| !listed.contains(*key)).cloned().collect()
        }
        match kind {
            Kind::Nodes => keys(&self.nodes, listed),
            Kind::Pods => keys(&self.pods, listed),
            Kind::Services => keys(&self.services, listed),
            Kind::EndpointSlices => keys(&self.slices, listed),
        }
    }

    /// The age of a claim that an object makes now, if it `claims` anything, and whether it comes after the first list.
    fn since(&mut self, kind: Kind, created: Age, claims: bool) -> (Since, bool) {
        if !self.settled.contains(&kind) {
            return (Since::new(created, 0), false);
        }
        self.turn = self.turn.saturating_add(u32::from(claims));
        (Since::new(created, self.turn), true)
    }

    fn owner(&self, pod: &Pod) -> PodOfNode {
        let node = pod.node.as_ref().map(|node| {
            let known = self.nodes.get_key_value(node.as_str());
            known.map_or_else(|| node.as_str().into(), |(name, _)| name.clone())
        });
        (node, pod.key.clone())
    }

    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Nodes => self.nodes.len(),
            Kind::Pods => self.pods.len(),
            Kind::Services => self.services.len(),
            Kind::EndpointSlices => self.slices.len(),
        }
    }

    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    pub fn pod(&self, key: &str) -> Option<&Pod> {
        self.pods.get(key)
    }

    pub fn service(&self, key: &str) -> Option<&Service> {
        self.services.get(key)
    }

    /// The node that has this address, unless a pod of another node had it before.
    pub fn node_of_address(&self, address: IpAddr) -> Option<&NodeName> {
        let node = self.node_addresses.get(&address)?;
        let (pod, node_turn) = (self.pod_addresses.turn(&address), self.node_addresses.turn(&address));
        // If both claims share the last turn, the node's counts as the later one.
        let pod_was_first = (pod < node_turn || node_turn == Some(u32::MAX))
            && self
                .pod_of_address(address)
                .is_some_and(|(_, of)| of != node && self.node(of.as_str()).is_some());
        (!pod_was_first).then_some(node)
    }

    pub fn cidr_of_address(&self, address: IpAddr) -> Option<(IpNet, &NodeName)> {
        self.node_cidrs.longest(address)
    }

    /// The pod that has this address, if it is known where it runs.
    pub fn pod_of_address(&self, address: IpAddr) -> Option<(&Pod, &NodeName)> {
        let first = self.pod_addresses.get(&address)?;
        let (_, key) = self.pod_at_home(address, first).unwrap_or(first);
        let pod = self.pods.get(key)?;
        Some((pod, pod.node.as_ref()?))
    }

    /// A pod that claims this address and runs on the node whose network holds it, unless `first` does.
    fn pod_at_home(&self, address: IpAddr, first: &PodOfNode) -> Option<&PodOfNode> {
        let home = self.node_cidrs.only(address)?.as_str();
        let is_at_home = |pod: &&PodOfNode| pod.0.as_deref() == Some(home);
        if is_at_home(&first) {
            return None;
        }
        self.pod_addresses.waiting(&address, || (Some(home.into()), "".into())).filter(is_at_home)
    }

    pub fn service_of_address(&self, address: IpAddr) -> Option<&Service> {
        self.services.get(self.service_addresses.get(&address)?)
    }

    /// The slices of a service, in a fixed order.
    pub fn slices(&self, service: &str) -> impl Iterator<Item = &EndpointSlice> {
        let keys = self.slices_of.get(service);
        keys.into_iter().flatten().filter_map(|key| self.slices.get(key))
    }
}

fn addresses_of_its_own(pod: &Pod) -> &[IpAddr] {
    if pod.host_network || pod.ended { &[] } else { &pod.addresses }
}
