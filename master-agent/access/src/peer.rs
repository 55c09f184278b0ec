//! Where a caller of the front end comes from.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use proto::NodeName;

/// Where a caller comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    Address(SocketAddr),
    /// Through the tunnel of a node. `address` is the other end of the tunnel's link. The node's own account of the
    /// caller's address is not trusted.
    Node {
        name: NodeName,
        address: Option<SocketAddr>,
    },
    /// On the plain port: from this address by TCP, or by a Unix socket.
    Local(Option<SocketAddr>),
}

impl Peer {
    /// The known address that is nearest to the caller.
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
