//! The errors of links that do not become tunnels, and of requests to a tunnel's node.

use std::{net::SocketAddr, time::Duration};

use proto::NodeName;
use proto_net::mux::ProtocolError;

use crate::identity::HostKeyError;

/// Why the registry rejects a tunnel.
#[derive(Debug, thiserror::Error)]
pub enum NotRegistered {
    #[error("node {0} has enough tunnels, active and standing by")]
    Full(NodeName),
    #[error("node {0} is no longer in the inventory")]
    Unknown(NodeName),
}

/// Why a link did not become a tunnel, or why the node of a tunnel did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("{0}")]
    HostKey(#[from] HostKeyError),
    #[error(
        "the node refused the master's certificate as SSH user {user:?}{said}: check that it trusts this master's user CA (TrustedUserCAKeys, or `node-agent join`), and the clocks"
    )]
    Unauthorized { user: String, said: String },
    #[error("no SSH handshake within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("the connection was closed before the master was authenticated")]
    Closed,
    #[error("a newer handshake has taken its permit")]
    Evicted,
    #[error("{0}")]
    Connect(String),
    #[error("{0}")]
    NotRegistered(#[from] NotRegistered),
    #[error("the node broke the stream protocol: {0}")]
    Multiplexer(#[from] ProtocolError),
    #[error("the node joins a further connection to another session")]
    NotJoined,
    #[error("{0}")]
    NotSsh(String),
    #[error(
        "the node's sshd does not listen on {0}: check that the address is the node's and free, and that sshd permits it (PermitListen, AllowTcpForwarding yes, see `master-agent sshd-config`)"
    )]
    NotListening(SocketAddr),
    #[error("SSH: {0}")]
    Ssh(#[from] russh::Error),
}

impl TunnelError {
    /// Returns the label under which a failed handshake is counted. Returns `None` for errors that do not come from a
    /// handshake.
    pub(crate) fn handshake_failure(&self) -> Option<&'static str> {
        match self {
            Self::HostKey(why) => Some(why.kind()),
            Self::Unauthorized { .. } => Some("unauthorized"),
            Self::Timeout(_) => Some("timeout"),
            Self::Evicted => Some("evicted"),
            Self::Closed => Some("closed"),
            Self::NotSsh(_) | Self::Ssh(_) | Self::Multiplexer(_) => Some("ssh"),
            Self::Connect(_) | Self::NotRegistered(_) | Self::NotListening(_) | Self::NotJoined => None,
        }
    }
}
