//! The configuration of the Kubernetes API, and of the nodes that it adds to those of the inventory.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use proto::{Host, Target};
use proto_config::Section;

use crate::{
    fields::{WAIT, secs},
    host_trust::HostTrust,
    routing::{
        cluster::Node,
        inventory::{DEFAULT_USER, InventoryNode, front_end_listen, login_name},
    },
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// `None` uses the service account of the pod that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// What cluster DNS appends to the names of services.
    pub cluster_domain: String,
    /// How long the agent stays ready without hearing from the API server.
    pub stale_after: Duration,
    /// Whether to also serve metrics and a health check under the names of kube-apiserver's own SSH tunneler.
    pub legacy_names: bool,
    /// How to reach nodes that are not in the inventory; `None` leaves them alone.
    pub nodes: Option<WatchedNodes>,
}

impl KubernetesConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        Self {
            kubeconfig: s.file("kubeconfig"),
            cluster_domain: s.or("cluster_domain", "cluster.local".to_owned()),
            stale_after: s.duration("stale_after", secs(600), WAIT),
            legacy_names: s.or("legacy_names", false),
            nodes: s.section("nodes", |s| Some(WatchedNodes::read(s))),
        }
    }
}

/// What holds for every Node of the cluster that is not in the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedNodes {
    /// The port of their SSH server; `None` for nodes that call home.
    pub dial_port: Option<u16>,
    pub user: String,
    /// A private key to log in with, in place of the master's certificate.
    pub key_file: Option<PathBuf>,
    pub connections: usize,
    pub trust: HostTrust,
    /// The address on which their sshd listens for callers of the front end; `None` for node-agents.
    pub front_end_listen: Option<SocketAddr>,
}

impl WatchedNodes {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        let dial_port = s.number("dial_port", 22, 0..=65535);
        let dial_port = u16::try_from(dial_port).ok().filter(|port| *port > 0);
        let user = s.at("user").and_then(|at| login_name(&at)).unwrap_or_else(|| DEFAULT_USER.to_owned());
        let trust = s.section("host_keys", |s| HostTrust::read_for_all(s, dial_port.is_some()));
        if s.at("key_file").is_some() && dial_port.is_none() {
            s.error("key_file", "needs dial_port: to nodes that call home the master shows its certificate");
        }
        Self {
            dial_port,
            user,
            key_file: s.at("key_file").and_then(|_| s.required_private_file("key_file")),
            connections: s.number("connections", 1, 1..=16),
            trust: trust.unwrap_or(HostTrust::HostCa),
            front_end_listen: front_end_listen(s),
        }
    }
}

impl WatchedNodes {
    /// The inventory entry of a Node of the cluster.
    pub fn node(&self, node: &Node) -> InventoryNode {
        let address = node.addresses.first().copied();
        InventoryNode {
            name: node.name.clone(),
            dial: self.dial_port.zip(address).map(|(port, address)| Target::new(Host::Addr(address), port)),
            user: self.user.clone(),
            // Routes to it come from the cluster.
            addresses: Vec::new(),
            cidrs: Vec::new(),
            default_route: false,
            connections: self.connections,
            trust: self.trust.clone(),
            key_file: self.key_file.clone(),
            front_end_listen: self.front_end_listen,
        }
    }
}
