//! The look-up of the cluster's objects by the names that proxy URLs contain.

use std::net::IpAddr;

use proto::DialError;

/// Looks up nodes, pods and services by name. An unknown name gives a [`DialError::NoRoute`] that says why.
pub trait Directory: Send + Sync + 'static {
    /// The port of a node's kubelet.
    fn kubelet_port(&self, node: &str) -> Result<u16, DialError>;

    /// The addresses of a node. Its kubelet's certificate may name one of them in place of the node.
    fn node_addresses(&self, node: &str) -> Vec<IpAddr>;

    fn pod(&self, namespace: &str, name: &str) -> Result<PodLocation, DialError>;

    /// The number of a service's port, given by its name or number. An empty `port` means the only one, or the one
    /// without a name. The service itself is dialled as `NAME.NAMESPACE.svc`.
    fn service_port(&self, namespace: &str, name: &str, port: &str) -> Result<u16, DialError>;
}

/// Where a pod is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodLocation {
    pub address: IpAddr,
    /// The first port that its containers declare.
    pub first_port: Option<u16>,
}
