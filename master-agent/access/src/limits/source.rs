//! The sources of connections, each of which limits count as one caller.

use std::net::IpAddr;

use proto::NodeName;

use crate::{peer::Peer, rates::network};

/// A group of peers that share one limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// An address, or the /64 of an IPv6 address.
    Network(IpAddr),
    /// All callers that come through the tunnels of a node.
    Node(NodeName),
    /// All callers of the plain port.
    Local,
}

impl Source {
    pub(super) fn of(peer: &Peer) -> Self {
        match peer {
            Peer::Address(address) => Self::Network(network(address.ip())),
            Peer::Node { name, .. } => Self::Node(name.clone()),
            Peer::Local(_) => Self::Local,
        }
    }
}
