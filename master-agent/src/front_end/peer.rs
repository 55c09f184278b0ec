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
    /// From a node through its tunnel, whose other end is at `address`. What the node itself says of the caller
    /// is nothing to go by.
    Node {
        name: NodeName,
        address: Option<SocketAddr>,
    },
    /// Of the plain port: by TCP from this address, else by a Unix socket.
    Local(Option<SocketAddr>),
}

impl Peer {
    /// The address that is the nearest to the caller of those that are known for sure.
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
