//! The `tunnels` and `call_home` sections of the configuration.

use std::{net::SocketAddr, time::Duration};

use proto_config::{Meanings, Section};

use crate::fields::{COUNT, DAY, WAIT, any, secs};

/// The `tunnels` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelsConfig {
    pub keepalive_interval: Duration,
    /// The number of keep-alives that may stay unanswered. One more ends the tunnel.
    pub keepalive_max: usize,
    pub handshake_timeout: Duration,
    /// The time between two key exchanges of a tunnel.
    pub rekey_interval: Duration,
    /// The longest time to open a stream, from the caller's request to the target's answer.
    pub dial_timeout: Duration,
    pub max_streams_per_tunnel: usize,
    pub max_streams_per_node: usize,
    /// The most connections of a tunnel beside its first one.
    pub max_further_connections: usize,
    /// How long one stream to a plain sshd may block the others on its connection. A stream that was fast before may do so a
    /// little longer.
    pub sshd_stall_timeout: Duration,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

const FIELDS: Meanings = &[
    (
        "keepalive_interval",
        "Time between keep-alives of a tunnel on which nothing comes. A node-agent is asked a little earlier, and at least \
         every 6 s.",
    ),
    (
        "keepalive_max",
        "A tunnel is dead when one more than this number of keep-alives is unanswered: with the defaults, \
         after 14 s.",
    ),
    ("handshake_timeout", "Time for an SSH handshake."),
    ("rekey_interval", "Time between key exchanges of a tunnel."),
    (
        "dial_timeout",
        "Time to open a stream, from the caller's request to the target's answer. A node-agent gives up a second earlier, \
         or an eighth of the time, and says why. The default is shorter than the 10 s of an admission webhook.",
    ),
    ("max_streams_per_tunnel", "Streams at once in one tunnel."),
    ("max_streams_per_node", "Streams at once through one node."),
    (
        "max_further_connections",
        "SSH connections at once that a tunnel makes to its node-agent in addition to the first one, while streams carry \
         much, so that small exchanges do not wait behind them and long paths are used well. 0 for none.",
    ),
    (
        "sshd_stall_timeout",
        "How long a caller may take nothing of a stream that comes through a plain sshd. Such a stream holds up the \
         others of its connection, so it is reset then.",
    ),
    ("backoff_min", "The shortest time between attempts to reach a node."),
    ("backoff_max", "The longest time between attempts to reach a node."),
];

impl TunnelsConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        let tunnels = Self {
            keepalive_interval: s.duration("keepalive_interval", secs(7), WAIT),
            keepalive_max: s.number("keepalive_max", 1, 1..=100),
            handshake_timeout: s.duration("handshake_timeout", secs(10), WAIT),
            rekey_interval: s.duration("rekey_interval", secs(3600), secs(1)..=DAY),
            dial_timeout: s.duration("dial_timeout", secs(9), WAIT),
            max_streams_per_tunnel: s.number("max_streams_per_tunnel", 8192, COUNT),
            max_streams_per_node: s.number("max_streams_per_node", 8192, COUNT),
            max_further_connections: s.number("max_further_connections", 4, 0..=8),
            sshd_stall_timeout: s.duration("sshd_stall_timeout", secs(1), WAIT),
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

/// The `call_home` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallHomeConfig {
    pub listen: SocketAddr,
    /// The maximum number of concurrent connections that have not authenticated yet.
    pub max_handshakes: usize,
}

const CALL_HOME_FIELDS: Meanings = &[
    ("listen", "The address to listen on."),
    ("max_handshakes", "Connections at once that have not authenticated."),
];

impl CallHomeConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(CALL_HOME_FIELDS);
        Self { listen: s.listen("listen", any(2222)), max_handshakes: s.number("max_handshakes", 256, COUNT) }
    }
}
