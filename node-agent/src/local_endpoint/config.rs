//! The configuration section `front_end`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use proto_config::{Meanings, Mode, Section};

use crate::fields::{COUNT, secs};

/// Where callers on this node reach a master's front end through the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpointConfig {
    pub tcp: Option<SocketAddr>,
    pub unix: Option<LocalUnixConfig>,
    /// Callers at once, over both listeners.
    pub max_connections: usize,
    /// How long a caller waits while there is no tunnel.
    pub wait: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalUnixConfig {
    pub path: PathBuf,
    pub mode: u32,
}

const FIELDS: Meanings = &[
    (
        "tcp",
        "The TCP address for callers: a loopback address, or an address of this node that pods use, but not \
         all addresses. This or unix is required.",
    ),
    ("unix", "The Unix socket for callers."),
    (
        "max_connections",
        "Callers at once, over both listeners. One address or local user has at most half of them.",
    ),
    ("wait", "How long a caller waits while there is no tunnel, before its connection is closed."),
];

const UNIX_FIELDS: Meanings = &[
    ("path", "The socket's path."),
    ("mode", "The socket's mode. Whoever may write to the socket may call."),
];

impl LocalEndpointConfig {
    pub(crate) fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let tcp = s.optional_listen("tcp");
        if let Some(address) = tcp.filter(|address| address.ip().is_unspecified()) {
            s.error("tcp", format!("{address}: give the one address that callers on this node use"));
        }
        let unix = s.section("unix", |s| {
            s.document(UNIX_FIELDS);
            let path = s.listen_unix("path", "/run/node-agent-local/front-end.sock");
            Some(LocalUnixConfig { path, mode: s.or("mode", Mode(0o660)).0 })
        });
        if s.at("tcp").is_none() && s.at("unix").is_none() {
            s.section_error("has no listener: give it tcp, unix or both");
        }
        let max_connections = s.number("max_connections", 1024, COUNT);
        let wait = s.duration("wait", secs(5), Duration::ZERO..=secs(60));
        Some(Self { tcp, unix, max_connections, wait })
    }
}
