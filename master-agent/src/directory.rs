//! Names of the cluster's objects, as proxy URLs use them.

use std::net::IpAddr;

use proto::DialError;

/// Looks up nodes, pods and services by name. What is not known is a [`DialError::NoRoute`] that says why.
pub trait Directory: Send + Sync + 'static {
    /// The port of a node's kubelet.
    fn kubelet_port(&self, node: &str) -> Result<u16, DialError>;

    /// The addresses of a node, which its kubelet's certificate may be for in place of its name.
    fn node_addresses(&self, node: &str) -> Vec<IpAddr>;

    fn pod(&self, namespace: &str, name: &str) -> Result<Pod, DialError>;

    /// The number of a service's port that is given by its name or number; with an empty `port`, of its only
    /// one, or of the one without a name. The service itself is dialled as `NAME.NAMESPACE.svc`.
    fn service_port(&self, namespace: &str, name: &str, port: &str) -> Result<u16, DialError>;
}

/// Where a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    pub address: IpAddr,
    /// The first port that its containers declare.
    pub first_port: Option<u16>,
}
