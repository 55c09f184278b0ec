//! Nodes and tunnels as the status and the metrics show them.

use std::time::{Duration, SystemTime};

use proto::NodeName;

use super::tunnel::Tunnel;
use crate::{activity::Figures, admin_api::TunnelStatus};

/// A node as the metrics show it.
#[derive(Clone, Debug)]
pub struct NodeFigures {
    pub name: NodeName,
    pub connected: bool,
    pub round_trip: Option<Duration>,
    pub streams: usize,
    /// When the first of the certificates in use expires, in seconds since 1970.
    pub certificate_expires: Option<u64>,
    pub refused: u64,
    pub activity: Figures,
}

/// Returns the status of a tunnel.
pub(super) fn tunnel_status(tunnel: &Tunnel, active: bool) -> TunnelStatus {
    TunnelStatus {
        role: if active { "active" } else { "standby" }.to_owned(),
        direction: tunnel.direction.name().to_owned(),
        kind: tunnel.kind().to_owned(),
        peer: tunnel.peer,
        since_unix_seconds: unix_seconds(tunnel.since),
        streams: tunnel.streams(),
        connections: tunnel.connections(),
        round_trip_microseconds: tunnel.round_trip().map(micros),
        host_key: tunnel.host.key.fingerprint(Default::default()).to_string(),
        certificate_expires_unix_seconds: tunnel.certificate_expires().map(unix_seconds),
    }
}

pub(super) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
