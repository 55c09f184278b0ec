//! The configuration of the Kubernetes API, and of the nodes that it adds to those of the inventory.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use proto::{Host, Target};
use proto_config::{Meanings, Section};

use crate::{
    fields::{WAIT, secs},
    host_trust::HostTrust,
    routing::{
        cluster::Node,
        inventory::{InventoryNode, front_end_listen, login_user},
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

const FIELDS: Meanings = &[
    (
        "kubeconfig",
        "The kubeconfig file, with mode 0600 or 0640. By default, the service account of the pod that the agent \
         runs in.",
    ),
    (
        "cluster_domain",
        "What cluster DNS appends to the names of services. Services are known as NAME.NAMESPACE.svc, and \
         with this domain appended.",
    ),
    ("stale_after", "/readyz fails when the API server has not been heard for so long. The routes stay."),
    ("legacy_names", "Also serves the metrics and the health check of kube-apiserver's own SSH tunneler."),
    ("nodes", "How Nodes of the cluster are reached that the inventory does not have."),
];

impl KubernetesConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        Self {
            kubeconfig: s.private_file("kubeconfig"),
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

const NODES_FIELDS: Meanings = &[
    (
        "dial_port",
        "The port of their SSH server, at their first InternalIP or, if they have none, ExternalIP. 0 means that \
         they call home.",
    ),
    ("user", "The SSH user to log in as."),
    (
        "key_file",
        "A private key to log in with (Ed25519 or ECDSA, with mode 0600 or 0640). By default, the master's \
         certificate.",
    ),
    ("connections", "Tunnels to keep at once."),
    (
        "host_keys",
        "How their host keys are verified, as in the inventory but without pins. By default, by a \
         certificate of the master's host CA.",
    ),
    (
        "front_end_listen",
        "For nodes with a plain sshd, ADDRESS:PORT where it listens for callers of the front end.",
    ),
];

impl WatchedNodes {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(NODES_FIELDS);
        let dial_port = s.number("dial_port", 22, 0..=65535);
        let dial_port = u16::try_from(dial_port).ok().filter(|port| *port > 0);
        let user = login_user(s);
        let trust = s.section("host_keys", |s| HostTrust::read_for_all(s, dial_port.is_some()));
        if s.at("key_file").is_some() && dial_port.is_none() {
            s.error("key_file", "needs dial_port: to nodes that call home the master shows its certificate");
        }
        Self {
            dial_port,
            user,
            key_file: s.private_file("key_file"),
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
