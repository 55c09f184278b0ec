//! The origin of a front-end caller's connection.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use proto::NodeName;

/// The origin of a caller's connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The caller connected to the HTTPS port from this address.
    Address(SocketAddr),
    /// The caller came through the tunnel of a node. `address` is the other end of the tunnel's link. The address that
    /// the node reports for the caller is not trusted.
    Node { name: NodeName, address: Option<SocketAddr> },
    /// The caller connected to the plain port, from this address over TCP or to its Unix socket.
    Local(Option<SocketAddr>),
}

impl Peer {
    /// Returns the nearest known address to the caller.
    pub fn ip(&self) -> IpAddr {
        match self {
            Self::Address(address) | Self::Node { address: Some(address), .. } => address.ip(),
            Self::Node { address: None, .. } => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::Local(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Node { name, .. } => write!(f, "node {name}"),
            Self::Local(Some(address)) => write!(f, "local {address}"),
            Self::Local(None) => f.write_str("local"),
        }
    }
}
