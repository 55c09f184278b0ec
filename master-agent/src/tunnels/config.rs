//! The configuration of tunnels, and of the listener at which nodes call home.

use std::{net::SocketAddr, time::Duration};

use proto_config::Section;

use crate::fields::{COUNT, DAY, WAIT, any, secs};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelsConfig {
    pub keepalive_interval: Duration,
    /// Unanswered keep-alives after which a tunnel is dead.
    pub keepalive_max: usize,
    pub handshake_timeout: Duration,
    /// Between key exchanges of a tunnel.
    pub rekey_interval: Duration,
    /// For opening one stream, from the caller's request to the target's answer.
    pub dial_timeout: Duration,
    pub max_streams_per_tunnel: usize,
    pub max_streams_per_node: usize,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

impl TunnelsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        let tunnels = Self {
            keepalive_interval: s.duration("keepalive_interval", secs(3), WAIT),
            keepalive_max: s.number("keepalive_max", 2, 1..=100),
            handshake_timeout: s.duration("handshake_timeout", secs(10), WAIT),
            rekey_interval: s.duration("rekey_interval", secs(3600), secs(1)..=DAY),
            dial_timeout: s.duration("dial_timeout", secs(10), WAIT),
            max_streams_per_tunnel: s.number("max_streams_per_tunnel", 8192, COUNT),
            max_streams_per_node: s.number("max_streams_per_node", 8192, COUNT),
            backoff_min: s.duration("backoff_min", Duration::from_millis(200), WAIT),
            backoff_max: s.duration("backoff_max", secs(2), WAIT),
        };
        if tunnels.backoff_min > tunnels.backoff_max {
            let show = humantime::format_duration;
            let (min, max) = (show(tunnels.backoff_min), show(tunnels.backoff_max));
            s.error("backoff_min", format!("{min} is longer than backoff_max, {max}"));
        }
        tunnels
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallHomeConfig {
    pub listen: SocketAddr,
    /// Connections at once that have not authenticated yet.
    pub max_handshakes: usize,
}

impl CallHomeConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        let default = any(2222);
        Self {
            listen: s.listen("listen", Some(default)).unwrap_or(default),
            max_handshakes: s.number("max_handshakes", 256, COUNT),
        }
    }
}
